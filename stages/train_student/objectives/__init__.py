"""The auxiliary losses, each beside the diffusion loss and with a weight of its own.

needs.py           which stores they read, and whether these can serve them
build.py           from the settings to objectives and their heads
weighting.py       how much one counts, at which step and at which noise
objective.py       what an objective is
lgf.py repa.py token_relation.py mask.py
"""
