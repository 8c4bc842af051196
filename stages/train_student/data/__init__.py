"""Training data from the cache: stores, splits, sample order, samples, loader processes."""
