"""CogVideoX: configurations, diffusion maths, transformer inputs, first frames."""
