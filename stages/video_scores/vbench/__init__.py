"""VBench's five dimensions of motion and consistency, with networks of maintained libraries."""
