"""Files that are read and written with checks: text, YAML, safetensors, checksums."""
