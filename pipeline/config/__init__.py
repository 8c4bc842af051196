"""Configuration: presets and files, overrides, validation."""
