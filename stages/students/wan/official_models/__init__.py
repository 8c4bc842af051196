"""Configurations of the official Wan 2.1 models, bundled so that they need no download."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = (
    "wan2.1-t2v-1.3b-diffusers",
    "wan2.1-t2v-14b-diffusers",
    "wan2.1-i2v-14b-480p-diffusers",
    "wan2.1-i2v-14b-720p-diffusers",
)
"""Folders in this package: the hub's names in lower case."""
OWNERS = ("wan-ai",)
"""Owner on the hub, in lower case."""
