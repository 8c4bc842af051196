"""FLOP counts of models, and peak FLOP/s of GPUs."""
