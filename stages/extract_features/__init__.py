"""Stage one: a video dataset in, teacher, latents and text stores out."""
