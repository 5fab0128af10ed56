"""Parts of the page for methods that see an image as patches: crops, hidden patches, attention, objects."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from poodle_lightning.draw.attention import attention_overlay, masked_frames, object_colours
from poodle_lightning.draw.canvas import fit, sheet
from poodle_lightning.draw.objects import chosen_heads, object_rows, restored_patches
from poodle_lightning.report.material import AttentionMaps
from poodle_lightning.report.page import Section, chips, grid, picture
from poodle_lightning.types import Look, Objects

_STRIP = 1000
_CELL = 224
# Objects whose masked frames are shown; with more the page grows long.
_SHOWN = 3
_GREY = (0.5, 0.5, 0.5)


def strip(images: Sequence[Tensor], caption: str, columns: int | None = None) -> str:
    """Pictures in a row with one caption."""
    across = columns or len(images)
    return picture(sheet(list(images), across), caption, _STRIP)


def cell(across: int) -> int:
    """Width of one of so many pictures in a row, in pixels."""
    return max(1, min(_CELL, _STRIP // across - 4))


def _limited(body: str, across: int) -> str:
    """Rows of few pictures do not fill the page."""
    return f'<div style="max-width:{7 * max(across, 2)}rem;margin-bottom:1.5rem">{body}</div>'


def crops(look: Look | None) -> Section | None:
    """Global and local crops; without local ones, the crops may be of other frames than the first (MoCLR)."""
    if look is None or look.large is None:
        return None
    body, kind = "", "crops" if look.small is None else "global crops"
    for i, large in enumerate(look.large):
        across = max(len(large), 2)
        body += _limited(strip(list(fit(large, _CELL)), f"clip {i + 1}, {kind}"), across)
        if look.small is not None:
            small = look.small[i]
            body += _limited(strip(list(fit(small, 112)), "local crops"), len(small))
    sentence = "Crops of the first frame, as the networks get them: large ones, and small ones at their size."
    if look.small is None:
        sentence = "Crops of each clip, as the networks get them."
    return Section("Crops", sentence, body)


def hidden(look: Look | None) -> Section | None:
    """Patches that the student does not see, and what was predicted for them."""
    if look is None or look.large is None or look.hidden is None:
        return None
    views, images = look.large.shape[1], fit(look.large.flatten(0, 1), _CELL)
    where = look.hidden.flatten(0, 1)
    left = masked_frames(images, ~where[:, None], _GREY)[:, 0]
    whole = None if look.restored is None else fit(look.restored.flatten(0, 1), _CELL)
    cells = []
    for i, (image, rest) in enumerate(zip(images, left, strict=True)):
        share = float(where[i].float().mean())
        name = f"clip {i // views + 1}" + (f", view {i % views + 1}" if views > 1 else "")
        cells += [picture(image, name), picture(rest, f"{share:.0%} of the patches are hidden")]
        if whole is not None:
            filled = restored_patches(image[None], where[i : i + 1], whole[i : i + 1])[0]
            cells.append(picture(filled, "the hidden patches as predicted"))
    columns = 2 if whole is None else 3
    ending = " and what the decoder makes of the rest." if whole is not None else "."
    sentence = "Which patches of the crops are hidden from the student (grey)" + ending
    return Section("Hidden patches", sentence, grid(cells, columns, columns))


def attention(maps: AttentionMaps | None, most: int = 4) -> Section | None:
    """Where [CLS] looks, head by head, trained beside untrained."""
    if maps is None:
        return None
    body = ""
    images = fit(maps.images[:most], _CELL)
    means = [attention_overlay(images, found[:most].mean(dim=1)) for found in (maps.trained, maps.untrained)]
    for i, image in enumerate(images):
        cells = [picture(image, "frame"), picture(means[0][i], "all heads, trained")]
        cells.append(picture(means[1][i], "all heads, same architecture, untrained"))
        body += grid(cells, 3, 3)
        heads = chosen_heads(image, maps.trained[i], ())
        body += _limited(strip(heads, "head by head, trained", min(len(heads), 8)), min(len(heads), 8))
    sentence = (
        "Where the class token looks in the last block; each picture has its own range, black to yellow."
    )
    return Section("Attention", sentence, body)


def objects(look: Look | None) -> list[Section | None]:
    """Heads that became objects, their tracks before and after refinement, and what the student sees."""
    if look is None or look.objects is None:
        return [None, None, None]
    found = look.objects
    return [_heads(found), _tracks(found), _masked(found)]


def _key(found: Objects) -> str:
    colours = object_colours(len(found.chosen))
    return chips(
        {
            f"object {i + 1}, head {head + 1}": shade.tolist()
            for i, (head, shade) in enumerate(zip(found.chosen, colours, strict=True))
        }
    )


def _heads(found: Objects) -> Section:
    body = _key(found)
    across = min(found.heads.shape[1], 8)
    for i, first in enumerate(fit(found.frames[:, 0], cell(across))):
        drawn = chosen_heads(first, found.heads[i], found.chosen)
        body += _limited(strip(drawn, f"clip {i + 1}, first frame, head by head", across), across)
    sentence = (
        f"Where each of the {found.heads.shape[1]} heads of the teacher looks in the first frame; "
        f"the {len(found.chosen)} framed ones were drawn and become objects."
    )
    return Section("Object heads", sentence, body)


def _tracks(found: Objects) -> Section:
    body, across = _key(found), found.frames.shape[1]
    words = {
        "frames": "frames",
        "attention": "where the heads' own prototypes look",
        "refined": "the same of the refined prototypes",
    }
    for i in range(len(found.frames)):
        rows = object_rows(found, i, cell(across), 0)
        lines = [strip(list(row), f"clip {i + 1}, {words[name]}") for name, row in rows.items()]
        body += _limited("".join(lines), across)
    sentence = (
        "The objects of the first frame, found again in every frame by cross-attention; each frame has its "
        "own range, so colour says where an object is most likely, not how likely it is there at all."
    )
    return Section("Object tracks", sentence, body)


def _masked(found: Objects) -> Section:
    body, across = "", found.frames.shape[1]
    for i in range(len(found.frames)):
        rows = object_rows(found, i, cell(across), _SHOWN)
        lines = [
            strip(list(row), f"clip {i + 1}, {name}")
            for name, row in rows.items()
            if name.startswith("object")
        ]
        body += _limited("".join(lines), across)
    count = found.masks.shape[2]
    some = f" (the first {_SHOWN} of {count} objects)" if count > _SHOWN else ""
    sentence = f"What the student gets to see of each object{some}; the rest has the mean colour of images."
    return Section("Object masks", sentence, body)
