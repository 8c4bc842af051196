"""FLOPs of a model, and the peak rates of GPUs."""
