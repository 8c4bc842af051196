"""Made-up fingerprints for stores that tests write without a dataset."""

import hashlib


def fingerprint_of(key: str) -> str:
    """The same for every store of a clip, so that they can be joined."""
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()[:32]
