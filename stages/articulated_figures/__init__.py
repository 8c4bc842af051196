"""The built-in demo: a procedural dataset and tiny models of the official classes."""
