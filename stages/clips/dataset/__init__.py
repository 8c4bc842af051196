"""Datasets on disk: layouts, their files, and the records read from them."""
