"""Command line: commands, configuration and presets, console output."""
