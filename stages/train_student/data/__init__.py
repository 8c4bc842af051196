"""Clips from the cache: which stores, which clip when, and what stands in for a damaged one."""
