"""Read a cache with numpy: how alike each clip's features are from frame to frame."""

# Legend: T map of the teacher, H W token grid, G fused channel.

import sys

import numpy as np

from cache_schema import StoreReader, find_store


def similarity_to_next_frame(cache: str) -> dict[str, float]:
    """Mean cosine of each token and the token at its place in the next frame, by clip."""
    reader = StoreReader(find_store(cache, "teacher"))  # a folder or a URL
    means = {}
    for key in reader.keys:
        clip = reader.read(key)  # new arrays, checked against their checksums
        features_THWG = clip["features"].astype(np.float32)  # unit norm
        if "scale" in clip:  # stored as int8 with a scale per token
            features_THWG *= clip["scale"][..., None]
        cosine_THW = (features_THWG[:-1] * features_THWG[1:]).sum(-1)
        valid_T = clip["valid"] != 0  # maps on which both tracks see the subject
        means[key] = float(cosine_THW[valid_T[:-1] & valid_T[1:]].mean())
    return means


if __name__ == "__main__":
    for name, mean in similarity_to_next_frame(sys.argv[1]).items():
        print(f"{mean:.3f}  {name}")
