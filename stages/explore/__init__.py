"""A local page to look through the clips of a cache: lists, filters, tracks and Gram flows."""
