"""Signals and background threads."""
