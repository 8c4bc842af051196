"""Local Gram Flow as pure tensor functions: similarities, loss, fusion, grid and time alignment.

Nothing here reads files, chooses devices or logs.
"""

from stages.local_gram_flow.alignment import (
    frames_to_latents,
    latent_frame_of_frame,
    resample_to_grid,
    time_weights,
)
from stages.local_gram_flow.fusion import (
    Directions,
    Fusion,
    fuse_directions,
    fuse_subjects,
    part_norms,
    regrid_fused,
    take_directions,
)
from stages.local_gram_flow.loss import (
    Divergence,
    flow_entropy,
    flow_probability,
    gram_flow_loss,
    implied_flow,
    implied_motion,
)
from stages.local_gram_flow.similarities import Kernel, local_gram_flow
from stages.local_gram_flow.windows import (
    neighbour_mask,
    neighbour_offsets,
    radius_of_window,
    reverse_pairs,
)

__all__ = [
    "Directions",
    "Divergence",
    "Fusion",
    "Kernel",
    "flow_entropy",
    "flow_probability",
    "frames_to_latents",
    "fuse_directions",
    "fuse_subjects",
    "gram_flow_loss",
    "implied_flow",
    "implied_motion",
    "latent_frame_of_frame",
    "local_gram_flow",
    "neighbour_mask",
    "neighbour_offsets",
    "part_norms",
    "radius_of_window",
    "regrid_fused",
    "resample_to_grid",
    "reverse_pairs",
    "take_directions",
    "time_weights",
]
