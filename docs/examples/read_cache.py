"""Read a cache: a clip's arrays with numpy, and the teacher's features as a torch Dataset."""

# Legend: T map of the teacher, H W token grid, G fused channel.

import sys

# [numpy]
import numpy as np

from cache_schema import StoreReader, find_store


def similarity_to_next_frame(cache: str) -> dict[str, float]:
    """Mean cosine of each token and the token at its place in the next frame, by clip."""
    reader = StoreReader(find_store(cache, "teacher"))  # a folder or a URL
    means = {}
    for key in reader.keys:
        clip = reader.read(key)  # new arrays, checked against their checksums
        features_THWG = clip["features"].astype(np.float32)  # unit norm
        cosine_THW = (features_THWG[:-1] * features_THWG[1:]).sum(-1)
        valid_T = clip["valid"] != 0  # maps on which both tracks see the subject
        means[key] = float(cosine_THW[valid_T[:-1] & valid_T[1:]].mean())
    return means


# [torch]
import torch  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from stages.teacher_store.features import decode_features  # noqa: E402


class TeacherClips(Dataset):
    """Each clip's key, fused features_THWG and valid_T; features stored as int8 are decoded."""

    def __init__(self, cache: str) -> None:
        self.reader = StoreReader(find_store(cache, "teacher"))
        self.keys = self.reader.keys  # loads the index once, before workers are started

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        clip = self.reader.read(self.keys[row])
        arrays = {name: torch.from_numpy(values) for name, values in clip.items()}
        return self.keys[row], decode_features(arrays), arrays["valid"] != 0


# [end]
if __name__ == "__main__":
    for name, mean in similarity_to_next_frame(sys.argv[1]).items():
        print(f"{mean:.3f}  {name}")
