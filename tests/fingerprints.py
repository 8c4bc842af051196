"""Made-up fingerprints for stores that tests write without a dataset."""

import hashlib

from stages.clips.fingerprints import hash_video


def fingerprint_of(key: str, video: bytes | None = None) -> str:
    """The same for every store of a clip, so that they can be joined.

    Args:
        key: The clip's key.
        video: The clip's video, if the dataset is read too.
    """
    digits = hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()[:32]
    return digits if video is None else digits[:16] + hash_video(video)
