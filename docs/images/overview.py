"""Draws ``overview.png``: what PooDLe sees of two frames. Run ``python docs/images/overview.py``."""

import io
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from poodle_lightning.cli import build
from poodle_lightning.draw.boxes import frame_crops, outline
from poodle_lightning.draw.canvas import LIGHT, figure_png, sheet
from poodle_lightning.draw.flow import flow_colours, longest_of, visibility
from poodle_lightning.draw.pairs import warp_pairs
from poodle_lightning.methods.base import Look
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.ops.random import key_of

STREET, DRAW = 4, 381
SETTINGS = [
    "--data.source=synthetic",
    f"--data.synthetic={{videos: 1, size: [320, 640], seconds: 4.0, supersample: 2, seed: {STREET}}}",
    *("--data.size=[256, 512]", "--data.area=[0.95, 1.0]", "--data.gap=[0.3, 0.3]", "--data.flow=null"),
    *("--data.batch_size=1", "--data.num_workers=0", "--data.val_fraction=0", "--data.seed=1"),
    "--model.flow=poodle_lightning.flow.given.Given",
    "--model.subcrops={count: 6, size: [96, 96], area: [0.02, 0.07]}",
]


def look() -> Look:
    """One generated pair as the method sees it, with the exact flow."""
    method, data = build(["experiment/demo_poodle.yaml"], SETTINGS)
    data.setup("fit")
    clip = next(iter(data.train_dataloader()))
    return method.look(replace(clip, key=key_of(DRAW).reshape(1)))


def strip(crops: Tensor) -> Tensor:
    """Crops in a row, framed in their colours."""
    return sheet(list(frame_crops(crops, width=4)), columns=len(crops), gap=6, paper=1.0)


def panels(seen: Look) -> dict[str, Tensor]:
    """Title → picture ``(3, H, W)``, row by row."""
    warped = warp_pairs(seen.frames, seen.flow)
    count = len(seen.boxes[0]) // 2  # the first half belongs to the first frame
    online, target = (Affine(boxes.matrix[:count]) for boxes in seen.boxes)
    other = ~seen.same[:count]
    hidden = visibility(warped.rebuilt[:1], seen.visible[:1])
    motion = seen.flow.to_pixels()[:1]
    return {
        "first frame, six subcrops": outline(warped.here[:1], online, only=other)[0],
        "0.3 s later, their partners": outline(warped.there[:1], target, only=other)[0],
        "optical flow, first to second frame": flow_colours(motion, longest_of(motion, 0.9))[0],
        "second frame warped onto the first; magenta: not in both": hidden[0],
        "the six subcrops, recoloured as in training": strip(seen.crops[0][:count]),
        "their partners, recoloured on their own": strip(seen.crops[1][:count]),
    }


def main() -> None:
    """Write the picture beside this file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    drawn = Figure(figsize=(9.6, 6.3), facecolor=LIGHT.ground, layout="constrained")
    FigureCanvasAgg(drawn)
    places = drawn.subplots(3, 2, height_ratios=[2.9, 2.9, 1.0]).flatten()
    for axes, (title, picture) in zip(places, panels(look()).items(), strict=True):
        axes.imshow(picture.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=9, color=LIGHT.text)
        axes.set_axis_off()
    whole = Image.open(io.BytesIO(figure_png(drawn, dpi=110))).convert("RGB")
    # 256 colours: a third of the bytes
    small = whole.quantize(palette=whole.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    small.save(Path(__file__).parent / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
