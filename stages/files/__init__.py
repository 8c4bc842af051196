"""Checked reading and writing of files: text, JSON, YAML, safetensors, checksums."""
