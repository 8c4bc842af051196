"""Signal handling and background threads."""
