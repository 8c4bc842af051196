"""Video from a base pipeline and the weights that a run trained."""
