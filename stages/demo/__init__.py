"""The built-in demo: a procedural dataset and tiny models of the official classes.

`tiny_cogvideox` and `tiny_sam2` import large libraries, so they are imported lazily.
"""

from pathlib import Path

from stages.demo.build import DemoConfig, DemoPaths, demo_paths, ensure_demo
from stages.demo.scenes import FigureClip, draw_clip

PROMPTS = Path(__file__).with_name("prompts.txt")
"""Prompts to compare models of the demo with, one per line."""

__all__ = [
    "PROMPTS",
    "DemoConfig",
    "DemoPaths",
    "FigureClip",
    "demo_paths",
    "draw_clip",
    "ensure_demo",
]
