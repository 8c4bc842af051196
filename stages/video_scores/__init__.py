"""Scores of a generated video: what each is, and how it is computed from frames or tracks."""
