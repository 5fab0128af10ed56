"""Sections of methods that see patches: each only where there is something to show, and with how much."""

import re

import pytest
import torch
from tiny_models import make_clip, tiny_crops, tiny_head, tiny_vit

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.evaluation.linear_readout import ReadoutRecipe
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.dino import DINO
from poodle_lightning.methods.dora import DoRA
from poodle_lightning.methods.ibot import IBOT, AttMask
from poodle_lightning.methods.mae import MAE, DecoderSizes
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.report import AttentionMaps, Material, gather, patches, write_report
from poodle_lightning.report.material import first_pairs
from poodle_lightning.types import Clip, Look, Objects

GRID, SIZE = (4, 4), (32, 32)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def plain(*shape):
    """Pictures that are quickly written."""
    return torch.full(shape, 0.5)


def objects(clips=2, frames=3, k=2, heads=6):
    raw = rand(clips, frames, k, *GRID)
    heads_seen = rand(clips, heads, *GRID)
    return Objects(plain(clips, frames, 3, *SIZE), heads_seen, tuple(range(k)), raw, raw**2, raw > 0.5)


def look(**parts):
    return Look(plain(2, 3, 3, *SIZE), **parts)


def shown(section):
    """How many pictures a section has."""
    return section.body.count("<img")


def captions(section):
    return re.findall("<figcaption>(.*?)</figcaption>", section.body)


def test_nothing_to_see_gives_no_section():
    for nothing in (None, look()):
        assert patches.crops(nothing) is None
        assert patches.hidden(nothing) is None
        assert patches.objects(nothing) == [None] * 3
    assert patches.attention(None) is None


def test_crops_have_a_row_of_large_and_one_of_small_ones_per_clip():
    large, small = plain(2, 2, 3, *SIZE), plain(2, 6, 3, 16, 16)
    assert captions(patches.crops(look(large=large, small=small))) == [
        "clip 1, global crops", "local crops", "clip 2, global crops", "local crops",
    ]  # fmt: skip
    alone = patches.crops(look(large=large))
    assert captions(alone) == ["clip 1, crops", "clip 2, crops"]
    assert "first frame" not in alone.sentence  # views of VITO are each of a frame of its own


def test_hidden_patches_are_counted_per_view():
    hidden = torch.zeros(2, 2, *GRID, dtype=torch.bool)
    hidden[0, 0, :2], hidden[1, 1, :, :3] = True, True
    parts = {"large": plain(2, 2, 3, *SIZE), "hidden": hidden}
    found = patches.hidden(look(**parts))
    assert shown(found) == 8
    shares = [words for words in captions(found) if "%" in words]
    assert [words.split("%")[0] for words in shares] == ["50", "0", "0", "75"]
    assert "decoder" not in found.sentence
    whole = patches.hidden(look(**parts, restored=plain(2, 2, 3, *SIZE)))
    assert shown(whole) == 12
    assert "decoder" in whole.sentence


def test_objects_show_heads_tracks_and_masks():
    heads, tracks, masks = patches.objects(look(objects=objects(clips=1)))
    assert shown(heads) == 1
    assert "each of the 6 heads" in heads.sentence
    assert "the 2 framed" in heads.sentence
    assert "object 2, head 2" in heads.body
    assert shown(tracks) == 3
    assert shown(masks) == 2
    many = patches.objects(look(objects=objects(1, k=5)))[2]
    assert shown(many) == 3
    assert "the first 3 of 5 objects" in many.sentence


def test_attention_is_shown_beside_that_of_an_untrained_network():
    maps = AttentionMaps(plain(5, 3, *SIZE), rand(5, 3, *GRID), rand(5, 3, *GRID, seed=1))
    assert shown(patches.attention(maps, most=2)) == 2 * 4


@pytest.mark.parametrize(("frames", "caption"), [(1, "2 clips of one frame"), (3, "clip 2, 3 frames")])
def test_page_of_clips_of_any_length(tmp_path, frames, caption):
    text = write_report(tmp_path, Material(look=Look(rand(2, frames, 3, *SIZE)))).read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == ["Clips"]
    assert caption in text
    assert text.count("<img") == (1 if frames == 1 else 2)


def test_page_has_all_sections_in_order(tmp_path):
    whole = look(
        large=plain(2, 1, 3, *SIZE),
        small=plain(2, 2, 3, 16, 16),
        hidden=torch.ones(2, 1, *GRID, dtype=torch.bool),
        objects=objects(clips=1),
    )
    maps = AttentionMaps(plain(1, 3, *SIZE), rand(1, 3, *GRID), rand(1, 3, *GRID))
    text = write_report(tmp_path, Material(look=whole, attention=maps)).read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == [
        "Clips", "Crops", "Hidden patches", "Object heads", "Object tracks", "Object masks", "Attention",
    ]  # fmt: skip
    sentences = re.findall("</h2><p>(.*?)</p>", text)
    assert all(sentence.endswith(".") for sentence in sentences)
    assert len(set(re.findall('id="(.*?)"', text))) == len(headings)


def test_fewer_clips_keep_their_own_rows():
    whole = look(large=rand(2, 2, 3, *SIZE), small=rand(2, 6, 3, 16, 16), objects=objects())
    some = first_pairs(whole, 1)
    assert torch.equal(some.large, whole.large[:1])
    assert torch.equal(some.small, whole.small[:1])
    assert some.hidden is None
    assert some.objects.chosen == whole.objects.chosen
    for part in ("frames", "heads", "raw", "tracks", "masks"):
        assert torch.equal(getattr(some.objects, part), getattr(whole.objects, part)[:1])


class Seeing(Method):
    def __init__(self):
        super().__init__()
        encoder = ViT(patch=8, dim=24, depth=2, heads=3, image_size=SIZE)
        self.online = Online(encoder)


def clip(size=(36, 44), count=2, frames=3):
    stored = (rand(count, frames, 3, *size) * 255).to(torch.uint8)
    index = torch.arange(count)
    labels = torch.zeros(count, frames, *size, dtype=torch.uint8)
    times = torch.zeros(count, frames, dtype=torch.float64)
    return Clip(stored, Affine.identity(count), size, times, index, index, labels=labels)


def test_attention_of_a_transformer_is_gathered_on_whole_patches():
    method = Seeing().train()
    found = gather(method, [clip()], pairs=1)
    # 36 x 44 pixels hold 4 x 5 whole patches of 8
    assert found.features.images.shape == (2, 3, 32, 40)
    assert torch.equal(found.attention.images, found.features.images)
    assert found.attention.trained.shape == found.attention.untrained.shape == (2, 3, 4, 5)
    assert not torch.allclose(found.attention.trained, found.attention.untrained)
    with torch.no_grad():
        wanted = method.online.encoder.eval().look(found.features.images).attention[:, :, 0, 1:]
    torch.testing.assert_close(found.attention.trained.flatten(2), wanted)


def test_labels_are_read_on_whole_patches():
    labelled = clip()
    halves = torch.arange(44).ge(22).to(torch.uint8).expand(36, 44)
    labelled.labels[:] = halves
    quick = ReadoutRecipe(steps=2, images=2, pixels=64)
    found = gather(Seeing(), [labelled], [labelled], labelled=2, recipe=quick)
    assert found.readout.images.shape == (2, 3, 32, 40)
    assert torch.equal(found.readout.labels, halves[:32, :40].expand(2, 32, 40))


def tiny(name):
    """A method of the family, as small as it gets."""
    if name == "MAE":
        return MAE(
            tiny_vit(positions="sincos"), ResizedCrop(SIZE, (0.2, 1.0)), decoder=DecoderSizes(24, 1, 2)
        )
    kind, views = {"DINO": (DINO, 2), "IBOT": (IBOT, 2), "AttMask": (AttMask, 2), "DoRA": (DoRA, 1)}[name]
    own = {"objects": 2} if kind is DoRA else {}
    token = {"mask_token": True} if kind in (IBOT, AttMask) else {}
    return kind(encoder=tiny_vit(**token), head=tiny_head(), crops=tiny_crops(views=views), **own)


@pytest.mark.parametrize(
    ("name", "headings"),
    [
        ("DINO", ["Crops"]),
        ("IBOT", ["Crops", "Hidden patches"]),
        ("AttMask", ["Crops", "Hidden patches"]),
        ("MAE", ["Crops", "Hidden patches"]),
        ("DoRA", ["Crops", "Object heads", "Object tracks", "Object masks"]),
    ],
)
def test_every_method_of_the_family_has_its_sections(tmp_path, name, headings):
    material = gather(tiny(name), [make_clip(frames=3)], pairs=1)
    text = write_report(tmp_path, material).read_text()
    assert re.findall("<h2>(.*?)</h2>", text) == ["Clips", *headings, "Attention", "Features"]
    assert ("decoder" in text) == (name == "MAE")
