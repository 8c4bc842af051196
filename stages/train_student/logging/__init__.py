"""What a training writes down as it goes: rows of JSON, the console's table, TensorBoard, W&B."""
