"""The visual store: tokens of an image or video encoder of transformers, on whole frames."""
