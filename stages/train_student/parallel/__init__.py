"""Process group, DeepSpeed engine, optimizers and EMA weights."""
