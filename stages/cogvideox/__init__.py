"""CogVideoX: configurations, weight checks, diffusion maths, transformer inputs, sampling."""
