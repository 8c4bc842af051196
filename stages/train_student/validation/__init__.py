"""Validation during training: losses on held-out clips, and sample videos."""
