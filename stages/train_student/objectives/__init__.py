"""Auxiliary losses, each added to the diffusion loss with its own weight.

needs.py           stores that the losses read, and checks that these suffice
build.py           objectives and heads from the settings
weighting.py       weight of a loss by step and by noise
objective.py       the objective interface
lgf.py repa.py token_relation.py mask.py
"""
