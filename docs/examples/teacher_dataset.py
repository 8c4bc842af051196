"""The teacher's features of a cache as a torch Dataset."""

import torch
from torch.utils.data import Dataset

from cache_schema import StoreReader, find_store
from stages.teacher_store.features import decode_features


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
