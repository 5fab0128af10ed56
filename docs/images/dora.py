"""Draws ``dora.png``: heads, tracks and masks of a small DoRA that was trained on the one film it is shown.

Run ``python docs/images/dora.py FILM``. It trains for some minutes on a CPU; ``--checkpoint`` draws a run's.
"""

import argparse
import io
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from poodle_lightning import DoRA
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.cli import build
from poodle_lightning.data.decode import VideoReader
from poodle_lightning.draw.canvas import LIGHT, figure_png, fit, sheet
from poodle_lightning.draw.objects import chosen_heads, object_rows
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.types import Clip, Objects

FRAMES, HEIGHT, CELL = 8, 224, 200
# A batch of four clips of four frames; patches of 16 pixels, four blocks.
SETTINGS = [
    *("--data.source=film", "--data.batch_size=4", "--data.num_workers=0", "--data.val_fraction=0"),
    *("--model.encoder.init_args.patch=16", "--model.encoder.init_args.depth=4"),
    *("--model.head.out=256", "--model.crops.locals=4"),
    *("--model.recipe.lr=1e-3", "--model.recipe.ema_start=0.99"),
]


def trained(film: Path, steps: int) -> DoRA:
    """A small DoRA after some steps on one film."""
    own = [f"--data.root={film}", f"--model.recipe.horizon_steps={steps}"]
    own.append(f"--model.recipe.warmup_steps={steps // 10}")
    method, data = build(["experiment/quickstart_dora.yaml"], [*SETTINGS, *own])
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=data)
    return method


def whole(film: Path, patch: int) -> Clip:
    """The film as one clip of whole frames, evenly spread from its start to its end."""
    with VideoReader(film) as reader:
        times = torch.linspace(0, reader.info.duration, FRAMES, dtype=torch.float64)
        pixels, _ = reader.read(times.tolist())
        width = round(HEIGHT * reader.info.width / reader.info.height / patch) * patch
    frames = F.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (HEIGHT, width), mode="area")
    number = torch.zeros(1, dtype=torch.int64)
    stored = frames.round().byte()[None]
    return Clip(stored, Affine.identity(1), (HEIGHT, width), times[None], number, number)


@torch.no_grad()
def objects(method: DoRA, clip: Clip) -> Objects:
    """What the method finds in whole frames, uncoloured."""
    height, width = clip.size
    crop = ResizedCrop((height, width), (1.0, 1.0), (width / height, width / height), flip=0.0)
    method.crops = MultiCrop(crop, views=1, locals=0, colours=())
    found = method.eval().look(clip).objects
    assert found is not None
    return found


def rows(found: Objects) -> dict[str, list[Tensor]]:
    """Title → pictures side by side."""
    first = fit(found.frames[0, :1], CELL)[0]
    heads = {"first frame, attention of the six heads; the framed ones become objects": [
        first, *chosen_heads(first, found.heads[0], found.chosen)
    ]}  # fmt: skip
    words = {
        "frames": f"{FRAMES} frames of the film",
        "attention": "where the three heads' prototypes look",
        "refined": "where they look after Sinkhorn has shared out the patches of the first frame",
        "object 1": "what the student sees of the blue object",
        "object 2": "… of the red object",
        "object 3": "… of the green object",
    }
    drawn = object_rows(found, 0, CELL, most=3)
    return heads | {words[name]: list(row) for name, row in drawn.items()}


def main() -> None:
    """Write the picture beside this file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description="Draws dora.png from a film.")
    parser.add_argument("film", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
    parser.add_argument("--checkpoint", help="of a run of DoRA; nothing is trained then")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "dora.png")
    given = parser.parse_args()
    method = (
        DoRA.load_from_checkpoint(given.checkpoint) if given.checkpoint else trained(given.film, given.steps)
    )
    lines = rows(objects(method, whole(given.film, method.online.encoder.patch)))
    drawn = Figure(figsize=(9.6, 6.4), facecolor=LIGHT.ground, layout="constrained")
    FigureCanvasAgg(drawn)
    for axes, (title, pictures) in zip(drawn.subplots(len(lines), 1), lines.items(), strict=True):
        row = sheet(pictures, columns=FRAMES, gap=6, paper=1.0)
        missing = FRAMES - len(pictures)
        row = F.pad(row, (0, missing * (pictures[-2].shape[-1] + 6)), value=1.0) if missing else row
        axes.imshow(row.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=8, color=LIGHT.text, loc="left", pad=2)
        axes.set_axis_off()
    image = Image.open(io.BytesIO(figure_png(drawn, dpi=130))).convert("RGB")
    # 256 colours: a quarter of the bytes
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
