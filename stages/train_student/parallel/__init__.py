"""Process group, DeepSpeed engine, optimisers and weight averages."""
