"""Wan 2.1 and Wan 2.2 A14B: configurations, flow matching, first frames."""
