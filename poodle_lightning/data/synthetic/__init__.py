"""Procedural driving scenes with exact flow, visibility, labels, objects and depth; no download needed."""

from poodle_lightning.data.synthetic.classes import CLASSES, IGNORE, LARGE, PALETTE, SMALL
from poodle_lightning.data.synthetic.scene import Frame, Pair, Scene, Street, flow_between, render
from poodle_lightning.data.synthetic.write import labelled_frames, write_videos

__all__ = [
    "CLASSES",
    "IGNORE",
    "LARGE",
    "PALETTE",
    "SMALL",
    "Frame",
    "Pair",
    "Scene",
    "Street",
    "flow_between",
    "labelled_frames",
    "render",
    "write_videos",
]
