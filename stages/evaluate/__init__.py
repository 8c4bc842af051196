"""Evaluation of generated videos: scores per video, and comparison of two sides."""
