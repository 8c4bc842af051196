"""Configurations of the official models of Wan 2.1 and 2.2 A14B, so that they need no download."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = (
    "wan2.1-t2v-1.3b-diffusers",
    "wan2.1-t2v-14b-diffusers",
    "wan2.1-i2v-14b-480p-diffusers",
    "wan2.1-i2v-14b-720p-diffusers",
    "wan2.2-t2v-a14b-diffusers",
    "wan2.2-i2v-a14b-diffusers",
)
"""Folders in this package: the hub's names in lower case."""
OWNERS = ("wan-ai",)
"""Owner on the hub, in lower case."""
