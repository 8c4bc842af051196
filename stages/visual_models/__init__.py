"""Image and video encoders in transformers' format: where their files are, and what is accepted."""
