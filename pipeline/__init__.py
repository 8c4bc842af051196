"""The command line: presets, overrides, consoles and run folders around `stages`."""
