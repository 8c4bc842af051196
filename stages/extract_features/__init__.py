"""Stage one: a video dataset in, teacher, latents and text stores out; `extract` runs it.

Nothing is imported here: the configuration of stage one is read by commands that must not load
SAM2.
"""
