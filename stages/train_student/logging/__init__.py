"""Logs of a training run: JSON lines, console table, TensorBoard, W&B."""
