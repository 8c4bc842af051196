"""The contract on disk between the two stages: numpy and zarr only."""
