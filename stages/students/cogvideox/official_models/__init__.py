"""Configurations of the official CogVideoX models, bundled so that they need no download."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = (
    "cogvideox-2b",
    "cogvideox-5b",
    "cogvideox-5b-i2v",
    "cogvideox1.5-5b",
    "cogvideox1.5-5b-i2v",
)
"""Folders in this package: the hub's names in lower case."""
OWNERS = ("zai-org", "thudm")
"""Owners on the hub, in lower case; the second is the old name, which the hub still redirects."""
