"""Auxiliary losses, each added to the diffusion loss with its own weight.

build.py           objectives and heads from the settings; the stores that they read
objective.py       base class: interface, weight by step and by noise
lgf.py repa.py token_relation.py mask.py
"""
