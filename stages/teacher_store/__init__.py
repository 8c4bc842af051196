"""The two forms in which a teacher is cached: fused features, or the Gram flow made from them.

Stage one writes both, training and inspection read either. The maths is in `local_gram_flow`.
"""
