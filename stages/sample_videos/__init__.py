"""Video generation with a base pipeline and the exported weights of a run."""
