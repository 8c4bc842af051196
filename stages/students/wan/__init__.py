"""Wan 2.1: configurations, flow matching, first frames."""
