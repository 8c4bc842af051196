"""Maintenance of existing stores: verify, repair, drop, merge, copy."""
