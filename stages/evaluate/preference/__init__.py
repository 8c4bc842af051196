"""Blind comparison by people: a page that asks which of two videos is better, and its answers."""
