"""Configuration files: reading, merging, checking."""
