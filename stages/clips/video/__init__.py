"""Decoding and encoding of video files with PyAV."""
