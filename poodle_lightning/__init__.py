"""poodle_lightning: learn image encoders from raw video.

Names are imported when they are first used, so that ``import poodle_lightning`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from poodle_lightning.data.labelled import LabelledDataModule
    from poodle_lightning.data.video import VideoDataModule
    from poodle_lightning.evaluation.segmentation import Segmentation
    from poodle_lightning.hub import (
        dilate,
        export_torchvision,
        from_pretrained,
        load_encoder,
        save_pretrained,
    )
    from poodle_lightning.methods.base import Method
    from poodle_lightning.methods.byol import BYOL
    from poodle_lightning.methods.densecl import DenseCL
    from poodle_lightning.methods.dino import DINO
    from poodle_lightning.methods.dora import DoRA
    from poodle_lightning.methods.flowe import FlowE
    from poodle_lightning.methods.ibot import IBOT, AttMask
    from poodle_lightning.methods.mae import MAE
    from poodle_lightning.methods.moclr import MoCLR
    from poodle_lightning.methods.moco import MoCo
    from poodle_lightning.methods.pico import PiCo
    from poodle_lightning.methods.pixpro import PixPro
    from poodle_lightning.methods.poodle import PooDLe
    from poodle_lightning.methods.simclr import SimCLR
    from poodle_lightning.methods.swav import SwAV
    from poodle_lightning.methods.trace import Trace
    from poodle_lightning.methods.vicreg import VICReg
    from poodle_lightning.methods.vito import VITO
    from poodle_lightning.types import Clip, Features, View

_WHERE = {
    "AttMask": "methods.ibot",
    "BYOL": "methods.byol",
    "Clip": "types",
    "DINO": "methods.dino",
    "DenseCL": "methods.densecl",
    "DoRA": "methods.dora",
    "Features": "types",
    "FlowE": "methods.flowe",
    "IBOT": "methods.ibot",
    "LabelledDataModule": "data.labelled",
    "MAE": "methods.mae",
    "Method": "methods.base",
    "MoCLR": "methods.moclr",
    "MoCo": "methods.moco",
    "PiCo": "methods.pico",
    "PixPro": "methods.pixpro",
    "PooDLe": "methods.poodle",
    "Segmentation": "evaluation.segmentation",
    "SimCLR": "methods.simclr",
    "SwAV": "methods.swav",
    "Trace": "methods.trace",
    "VICReg": "methods.vicreg",
    "VITO": "methods.vito",
    "VideoDataModule": "data.video",
    "View": "types",
    "dilate": "hub",
    "export_torchvision": "hub",
    "from_pretrained": "hub",
    "load_encoder": "hub",
    "save_pretrained": "hub",
}

__all__ = [
    "BYOL",
    "DINO",
    "IBOT",
    "MAE",
    "VITO",
    "AttMask",
    "Clip",
    "DenseCL",
    "DoRA",
    "Features",
    "FlowE",
    "LabelledDataModule",
    "Method",
    "MoCLR",
    "MoCo",
    "PiCo",
    "PixPro",
    "PooDLe",
    "Segmentation",
    "SimCLR",
    "SwAV",
    "Trace",
    "VICReg",
    "VideoDataModule",
    "View",
    "__version__",
    "dilate",
    "export_torchvision",
    "from_pretrained",
    "load_encoder",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
