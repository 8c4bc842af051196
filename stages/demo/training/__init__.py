"""Training of the demo's tiny models, whose weights are packaged in `stages/demo/pretrained`."""
