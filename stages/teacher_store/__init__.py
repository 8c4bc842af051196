"""Storage encodings of teacher signals: fused features, and the Gram flow computed from them.

The maths is in `local_gram_flow`.
"""
