"""Dry runs: cost estimates of extraction and training from headers, configurations and shapes."""
