"""Object discovery with a frozen ViT: the attention of [CLS] as a mask, and a box around its largest piece.

The last block's attention of [CLS] to the patches is averaged over the heads; the patches that hold 80 % of
it are the mask (DoRA, Venkataramanan et al., ICLR 2024, appendix B.3; the rule is that of DINO's
``visualize_attention.py``). **Jaccard**: overlap of the mask with the true one. **CorLoc**: share of images
in which the box around the mask's largest connected component overlaps a true box by half or more (LOST,
Siméoni et al., BMVC 2021, ``object_discovery.py``, ``dino_seg``).

What the paper leaves open, and what is done here:

======================  ======================================================================================
size of the image       its own, filled up to whole patches with the mean colour, as LOST; ``data.size``
                        resizes (480 in DINO's script, 512×512 in Muzammal-Naseer/IPViT)
Jaccard of what         ``jaccard``: all objects of an image together, mean over images;
                        ``jaccard_object``: every object alone, mean over objects;
                        ``jaccard_object_image``: the same, mean within an image, then over images
void pixels (255)       not counted; ``void: background`` takes them for background, as IPViT does
heads                   averaged, as the paper says; LOST reads head 4 with 60 % of the mass; IPViT takes the
                        best head for each object: ``head: best``, an upper bound
overlap of exactly 0.5  counts, as in LOST's code; the paper says "> 0.5"
which component         the largest. LOST's code never chooses the last one, takes the background where there
                        is one only, and leaves the box uncut at the border: ``compat: lost``
======================  ======================================================================================

Masks and boxes are compared in the pixels of the image's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.configured import spec
from poodle_lightning.data.objects import ObjectBatch, ObjectDataModule
from poodle_lightning.draw.attention import discovery
from poodle_lightning.draw.canvas import fit, png, sheet
from poodle_lightning.evaluation.base import Evaluation, Scores
from poodle_lightning.evaluation.inference import padded
from poodle_lightning.evaluation.memory import gathered
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.components import box_iou, extent, keep_mass, largest_component
from poodle_lightning.types import IGNORE, UserError

_PICTURE = 360  # px, width of a cell


@dataclass(frozen=True)
class DiscoveryRecipe:
    """How attention becomes a mask and a box, see the module.

    Args:
        mass: share of the attention that the mask holds.
        head: ``mean`` of all, the number of one, or ``best``: each score takes the head that is best for it.
        fit: ``pad`` images to whole patches with the mean colour, or ``crop`` them at the right and bottom
            (DINO's script); what is cut off is no part of the mask.
        void: what pixels are that nobody has judged.
        overlap: of boxes, from which on an object is found.
        compat: ``lost`` repeats what is odd in LOST's code.
        pictures: of so many images, evenly spread over the split, into ``pictures/`` of the run.
    """

    mass: float = 0.8
    head: int | Literal["mean", "best"] = "mean"
    fit: Literal["pad", "crop"] = "pad"
    void: Literal["left_out", "background"] = "left_out"
    overlap: float = 0.5
    compat: Literal["lost"] | None = None
    pictures: int = 0

    def __post_init__(self) -> None:
        head = self.head if isinstance(self.head, int) else 0
        if not (0 < self.mass <= 1 and 0 < self.overlap <= 1) or min(head, self.pictures) < 0:
            raise UserError("DiscoveryRecipe: mass and overlap above 0 up to 1, head and pictures 0 or more")


@dataclass(frozen=True)
class Found:
    """What the attention of one image says, in the pixels of its file.

    Args:
        masks: ``(M, H, W)`` bool: one, or one of each head.
        boxes: ``(M, 4)`` float64: left, top, right, bottom.
    """

    masks: Tensor
    boxes: Tensor


def find_objects(
    attention: Tensor, patch: int, seen: tuple[int, int], size: tuple[int, int], recipe: DiscoveryRecipe
) -> Found:
    """Masks and boxes from the attention of [CLS] to the patches of one image.

    Args:
        attention: ``(heads, h, w)`` on the host, not negative.
        patch: side of a patch in pixels that the network sees.
        seen: height and width of the image as the network sees it, without what it was filled up with.
        size: height and width of its file.
        recipe: what is done.

    Raises:
        UserError: the head is not there, or the attention is not finite.
    """
    if not bool(attention.isfinite().all()):
        raise UserError("the encoder's attention is not finite: nothing can be found with it")
    maps = _chosen(attention.double(), recipe.head)
    grids = keep_mass(maps.flatten(1), recipe.mass).unflatten(1, maps.shape[1:])
    rule: Literal["largest", "lost"] = recipe.compat or "largest"
    cells = torch.stack([extent(largest_component(grid, rule)) for grid in grids])
    (height, width), scale = size, (size[1] / seen[1], size[0] / seen[0])
    boxes = cells * patch * torch.tensor([*scale, *scale], dtype=torch.float64)
    if recipe.compat is None:
        boxes = boxes.minimum(torch.tensor([width, height, width, height], dtype=torch.float64))
    return Found(_at_pixels(grids, patch, seen, size), boxes)


def _chosen(attention: Tensor, head: int | str) -> Tensor:
    """The maps that are read, ``(M, h, w)``."""
    if head == "best":
        return attention
    if isinstance(head, int):
        if head >= len(attention):
            raise UserError(f"recipe.head {head}: the last block has heads 0 to {len(attention) - 1}")
        return attention[head : head + 1]
    return attention.mean(dim=0, keepdim=True)


def _at_pixels(grids: Tensor, patch: int, seen: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Every pixel of the file has the value of the patch in which its centre lies; of none: 0."""
    places = []
    for pixels, network, cells in zip(size, seen, grids.shape[1:], strict=True):
        centres = 2 * torch.arange(pixels) + 1
        places.append((centres * network).div(2 * pixels * patch, rounding_mode="floor").clamp(max=cells))
    with_border = F.pad(grids, (0, 1, 0, 1))
    return with_border[:, places[0][:, None], places[1]]


def jaccard(masks: Tensor, truth: Tensor, counted: Tensor) -> float:
    """Intersection over union of the best of some masks with a true one, over the pixels that count.

    Args:
        masks: ``(M, H, W)`` bool.
        truth: ``(H, W)`` bool.
        counted: ``(H, W)`` bool.

    Returns:
        The largest over the masks; NaN where the true mask has no counted pixel.
    """
    inside = truth & counted
    if not bool(inside.any()):
        return float("nan")
    both = (masks & inside).sum(dim=(1, 2))
    either = ((masks | truth) & counted).sum(dim=(1, 2))
    return float((both.double() / either.double()).max())


def best_of(found: Found, boxes: Tensor, objects: Tensor | None) -> tuple[int, int]:
    """Which mask and which box are the best of those that were found: of ``head: best`` those that scored.

    Args:
        found: of one image.
        boxes: ``(k, 4)``, the true ones.
        objects: ``(H, W)``, the true objects; without them the mask is that of the box.

    Returns:
        Their numbers; the first of equal ones.
    """
    overlaps = [float(box_iou(box, boxes).max()) if len(boxes) else 0.0 for box in found.boxes]
    box = overlaps.index(max(overlaps))
    if objects is None or not bool(((objects > 0) & (objects != IGNORE)).any()):
        return box, box
    truth, counted = (objects > 0) & (objects != IGNORE), objects != IGNORE
    shares = [jaccard(mask[None], truth, counted) for mask in found.masks]
    return shares.index(max(shares)), box


def _nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values ``(H, W)`` of any kind at another size, each of its nearest pixel."""
    large = F.interpolate(values[None, None].double(), size=size, mode="nearest-exact")
    return large[0, 0].to(values.dtype)


class ObjectDiscovery(Evaluation):
    """Unsupervised object discovery (see the module); the data module is ``ObjectDataModule``.

    Args:
        encoder: see ``Evaluation``; a ViT with a class token. A decoder on top is left out.
        recipe: how attention becomes a mask and a box.

    Raises:
        UserError: the encoder has no attention of a class token.
    """

    def __init__(
        self, encoder: str | Encoder | None = None, *, recipe: DiscoveryRecipe | None = None
    ) -> None:
        super().__init__(encoder, decoder="drop", classes=("object",))
        self.recipe = recipe or DiscoveryRecipe()
        # per image: number, boxes, found (0 or 1), Jaccard, sum of the objects' Jaccard, number of objects
        self._rows: list[tuple[float, ...]] = []
        self._found = torch.empty(0, 6, dtype=torch.float64)
        if self.encoder is not None:
            self.the_vit()

    def the_vit(self) -> ViT:
        """The encoder.

        Raises:
            UserError: it has no attention of a class token.
        """
        encoder = self.the_encoder()
        bare = encoder.encoder if isinstance(encoder, DecodedEncoder) else encoder
        if not isinstance(bare, ViT) or bare.cls_token is None:
            raise UserError(
                f"object discovery reads the attention of [CLS], which {type(bare).__name__} does not have: "
                "give a ViT with a class token as --encoder"
            )
        return bare

    def setup(self, stage: str) -> None:
        """Data without classes: only their kind is looked at.

        Raises:
            UserError: there is no encoder, or the data are no images with objects.
        """
        self.the_vit()
        self._data()

    def _data(self) -> ObjectDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ObjectDataModule):
            raise UserError("object discovery needs images with objects: give data: ObjectDataModule")
        return data

    def on_validation_epoch_start(self) -> None:
        """Begins anew."""
        self._rows = []
        if self.recipe.pictures and self.trainer.is_global_zero:
            for path in self._folder().glob("discovery_*.png"):
                path.unlink()
        self.trainer.strategy.barrier()

    def validation_step(self, batch: ObjectBatch, batch_idx: int) -> None:
        """Finds the objects of some images; those of one size go through the network together."""
        by_size = sorted(range(len(batch)), key=lambda place: (batch.images[place].shape, place))
        for _, places in groupby(by_size, key=lambda place: batch.images[place].shape):
            self._score(batch, list(places))

    def attention(self, images: Tensor) -> Tensor:
        """Attention of [CLS] to the patches in the last block, ``(B, heads, h, w)`` float32 on the host.

        Args:
            images: ``(B, 3, H, W)`` uint8 on the module's device, of any size.

        Raises:
            UserError: the image is smaller than a patch, and is to be cropped.
        """
        vit = self.the_vit()
        unit = images.float() / 255.0
        if self.recipe.fit == "crop":
            height, width = (side - side % vit.patch for side in images.shape[-2:])
            if not (height and width):
                raise UserError(f"an image is smaller than a patch of {vit.patch} pixels: set fit to pad")
            unit = unit[..., :height, :width]
        looked = vit.look(padded(unit, (vit.patch, vit.patch), vit.mean), rows=1)
        assert looked.attention is not None
        grid = (looked.last.shape[-2], looked.last.shape[-1])
        return looked.attention[:, :, 0, 1:].float().cpu().unflatten(-1, grid)

    def _score(self, batch: ObjectBatch, places: Sequence[int]) -> None:
        images = torch.stack([batch.images[place] for place in places])
        seen = (images.shape[-2], images.shape[-1])
        for place, attention in zip(places, self.attention(images.to(self.device)), strict=True):
            try:
                found = find_objects(attention, self.the_vit().patch, seen, batch.sizes[place], self.recipe)
            except UserError as error:
                raise UserError(f"{batch.names[place]}: {error}") from error
            self._rows.append(self._row(batch, place, found))
            self._draw(batch, place, attention, found)

    def _row(self, batch: ObjectBatch, place: int, found: Found) -> tuple[float, ...]:
        boxes, objects = batch.boxes[place], batch.objects[place]
        overlaps = [box_iou(box, boxes) for box in found.boxes]
        hit = any(bool((overlap >= self.recipe.overlap).any()) for overlap in overlaps)
        whole, alone = float("nan"), torch.empty(0, dtype=torch.float64)
        if objects is not None:
            void = objects == IGNORE
            counted = ~void if self.recipe.void == "left_out" else torch.ones_like(void)
            whole = jaccard(found.masks, (objects > 0) & ~void, counted)
            numbers = [number for number in objects.unique().tolist() if number not in (0, IGNORE)]
            each = [jaccard(found.masks, objects == number, counted) for number in numbers]
            alone = torch.tensor(each, dtype=torch.float64)
        return (int(batch.index[place]), len(boxes), hit, whole, float(alone.sum()), len(alone))

    def on_validation_epoch_end(self) -> None:
        """Puts the devices' images together; logs ``val/corloc``.

        Raises:
            UserError: no image has a box.
        """
        rows = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, 6)
        (whole,) = gathered((rows,))
        # in the order of the images, so that sums do not depend on the devices
        self._found = whole[whole[:, 0].argsort()]
        if not bool((self._found[:, 1] > 0).any()):
            raise UserError("no image has a box to be found: give another data.split, or data.hard keep")
        self.log("val/corloc", torch.tensor(self._corloc(), device=self.device), sync_dist=True)

    def _corloc(self) -> float:
        judged = self._found[self._found[:, 1] > 0]
        return float(judged[:, 2].mean())

    def scores(self) -> Scores:
        """CorLoc, and Jaccard where objects are drawn.

        Raises:
            UserError: there was no validation yet.
        """
        if not len(self._found):
            raise UserError("object discovery has no result yet: validate it first")
        _, boxes, _, whole, alone, count = self._found.unbind(dim=1)
        shown = count > 0
        scores = {"corloc": self._corloc()}
        if bool(shown.any()):
            scores |= {
                "jaccard": float(whole[shown].mean()),
                "jaccard_object": float(alone.sum() / count.sum()),
                "jaccard_object_image": float((alone[shown] / count[shown]).mean()),
            }
        return Scores(
            protocol="object discovery",
            headline="corloc",
            scores=scores,
            counts={
                "images": len(self._found),
                "images_with_boxes": int((boxes > 0).sum()),
                "boxes": int(boxes.sum()),
                "drawn_objects": int(count.sum()),
            },
            details={"recipe": spec(self.recipe)},
        )

    # ---- pictures
    def _folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / "pictures"

    def _draw(self, batch: ObjectBatch, place: int, attention: Tensor, found: Found) -> None:
        """A picture of the image, if it is one that is wanted; of several heads, those that scored."""
        number, total = int(batch.index[place]), self._data().count()
        wanted = min(self.recipe.pictures, total)
        if number not in {i * total // wanted for i in range(wanted)}:
            return
        size, seen = batch.sizes[place], (batch.images[place].shape[-2], batch.images[place].shape[-1])
        boxes, objects = batch.boxes[place], batch.objects[place]
        mask, box = best_of(found, boxes, objects)
        heat = _at_pixels(
            _chosen(attention, self.recipe.head)[mask : mask + 1], self.the_vit().patch, seen, size
        )
        image = batch.images[place].cpu().float()[None] / 255.0
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        # lines are drawn at the picture's size: scaled with it they would be bars, or fade
        image = fit(image, _PICTURE)
        shape = (image.shape[-2], image.shape[-1])
        scale = torch.tensor([shape[1] / size[1], shape[0] / size[0]] * 2, dtype=torch.float64)
        shown = discovery(
            image[0],
            _nearest(heat[0], shape),
            _nearest(found.masks[mask], shape),
            found.boxes[box] * scale,
            boxes * scale,
            None if objects is None else _nearest(objects, shape),
        )
        self._folder().mkdir(parents=True, exist_ok=True)
        drawn = sheet(shown, columns=2, paper=1.0)
        name = "".join(letter if letter.isalnum() else "-" for letter in batch.names[place])[:60]
        (self._folder() / f"discovery_{number:05d}_{name}.png").write_bytes(png(drawn))
