"""Video datasets in: shards, folders, decoding, geometry, prompts."""
