"""CogVideoX: configurations, weights, diffusion maths, inputs, sampling."""
