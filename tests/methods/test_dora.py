"""DoRA against its algorithm written out: one frame, one mask, one head, one patch at a time, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_clip, stirred, tiny_crops, tiny_encoder, tiny_head, tiny_recipe, tiny_vit

from poodle_lightning import DoRA
from poodle_lightning.ops.masking import block_masks, mask_ratios
from poodle_lightning.ops.random import fold
from poodle_lightning.types import UserError

SIDE, PATCH = 32, 8


def tiny(encoder=None, views=1, locals=2, **kwargs) -> DoRA:
    torch.manual_seed(0)
    settings = {"head": tiny_head(), "objects": 2, "recipe": tiny_recipe(), **kwargs}
    return stirred(
        DoRA(encoder or tiny_vit(), crops=tiny_crops(views=views, locals=locals), views=views, **settings)
    )


# ---- the algorithm, slowly
def sinkhorn(prototypes, tokens, method):
    """Eq. 4 as in the code: exp, then rows to 1/k and columns to 1/n, in turn."""
    k, n = len(prototypes), len(tokens)
    scores = torch.stack([torch.stack([p @ z for z in tokens]) for p in prototypes]) / method.epsilon
    plan = (scores - scores.max()).exp()
    plan = plan / plan.sum()
    for _ in range(method.iterations):
        for i in range(k):
            plan[i] = plan[i] / plan[i].sum() / k
        for j in range(n):
            plan[:, j] = plan[:, j] / plan[:, j].sum() / n
    return plan * n if method.mass == "patch" else plan


def tracks(method, frames, heads):
    """Eq. 2–6 for one clip ``(T, 3, h, w)``: rows of cross-attention ``[t][object] -> (n,)``."""
    looks = [method.teacher.encoder.look(frame[None]) for frame in frames]
    flat = lambda part: torch.cat(list(part[0, :, 1:]), dim=1)  # noqa: E731  heads side by side
    found = []
    for t, here in enumerate(looks):
        first = looks[0] if method.tracking else here
        queries, tokens = flat(first.queries), first.last[0].flatten(1).t()
        prototypes = []
        for head in heads:
            attention = first.attention[0, head, 0, 1:]
            prototypes.append(sum(weight * query for weight, query in zip(attention, queries, strict=True)))
        if method.sinkhorn:
            if method.patches == "normalised":
                tokens = torch.stack([z / z.norm() for z in tokens])
            plan = sinkhorn(prototypes, tokens, method)
            prototypes = [sum(w * z for w, z in zip(row, tokens, strict=True)) for row in plan]
        keys = flat(looks[t].keys)
        found.append([(keys @ p / math.sqrt(len(p))).softmax(0) for p in prototypes])
    return found


def bilinear(mask, size):
    """A map enlarged at pixel centres, clamped at the border."""
    count = len(mask)
    weights = torch.zeros(size, count, dtype=torch.float64)
    for i in range(size):
        at = min(max((i + 0.5) * count / size - 0.5, 0), count - 1)
        low = int(at)
        weights[i, low] += 1 - (at - low)
        weights[i, min(low + 1, count - 1)] += at - low
    return weights @ mask @ weights.t()


def pixel_masks(method, followed):
    """``[clip][t][object] -> (h, w)``; hard: above the mean over patches and clips, by time and object."""
    clips, frames, objects = len(followed), len(followed[0]), len(followed[0][0])
    grid = SIDE // PATCH
    found = [[[None] * objects for _ in range(frames)] for _ in range(clips)]
    # without tracking every frame is a clip of its own
    groups = [[(c, t) for c in range(clips)] for t in range(frames)]
    groups = groups if method.tracking else [[place for group in groups for place in group]]
    for group in groups:
        for o in range(objects):
            rows = {place: followed[place[0]][place[1]][o] for place in group}
            lengths = {place: row / row.norm() for place, row in rows.items()}
            threshold = sum(row.mean() for row in lengths.values()) / len(lengths)
            for (c, t), row in rows.items():
                if method.masks == "hard":
                    blocks = (lengths[c, t] > threshold).double().reshape(grid, grid)
                    mask = torch.kron(blocks, torch.ones(PATCH, PATCH, dtype=torch.float64))
                else:
                    row = row / row.max() if method.soft_scale == "peak" else row
                    mask = bilinear(row.reshape(grid, grid), SIDE)
                found[c][t][o] = mask
    return found


def cross_entropy(method, teacher, student):
    p = ((teacher - method.centre.value) / 0.04).softmax(0)
    return -(p * (student / 0.1).log_softmax(0)).sum()


def reference(method, clip):
    """Both terms, Eq. 8–10, with the masks it found."""
    crops, (batch, frames) = method.crops(clip), clip.times.shape
    views = len(crops.large)
    large = crops.large.unflatten(1, (batch, frames))
    small = crops.small.unflatten(1, (batch, frames))
    heads = method.chosen().tolist()
    encoder = method.student.encoder
    with torch.no_grad():
        followed = [tracks(method, large[v, c], heads) for v in range(views) for c in range(batch)]
        masks = pixel_masks(method, followed)
        outputs = {
            (v, c, t): method.teacher.logits(large[v, c, t][None])[0]
            for v in range(views) for c in range(batch) for t in range(frames)
        }  # fmt: skip
    on_objects, on_crops = [], []
    for c in range(batch):
        for t in range(frames):
            for v in range(views):
                teacher = outputs[views - 1 - v, c, t]  # u ≠ v; the only one where there is one
                for mask in masks[v * batch + c][t]:
                    seen = (large[v, c, t] - encoder.mean) / encoder.std * mask
                    student = method.student.head(encoder.features(seen[None]).vector)[0]
                    on_objects.append(cross_entropy(method, teacher, student))
                for crop in small[:, c, t]:
                    student = method.student.head(encoder(crop[None]).vector)[0]
                    on_crops.append(cross_entropy(method, outputs[v, c, t], student))
    size = 1 if method.reduced is torch.mean else len(method.chosen()) * views, len(small) * views
    scale = (1, 1) if method.reduced is torch.mean else size
    mean = [torch.stack(terms).mean() for terms in (on_objects, on_crops)]
    return {
        "object": method.object_weight * mean[0] * scale[0],
        "local": method.local_weight * mean[1] * scale[1],
    }, masks


CASES = {
    "code": {},
    "two views": {"views": 2},
    "soft masks": {"masks": "soft"},
    "Eq. 7 to the letter": {"masks": "soft", "soft_scale": "none"},
    "mass 1 in all": {"mass": "total"},
    "raw patches": {"patches": "raw"},
    "sums": {"reduce": "sum", "object_weight": 1.0, "local_weight": 1.0},
    "paper": {
        "views": 2, "masks": "soft", "mass": "total", "patches": "raw",
        "reduce": "sum", "object_weight": 1.0, "local_weight": 1.0,
    },
    "no Sinkhorn": {"sinkhorn": False},
    "no tracking": {"tracking": False},
    "one object": {"objects": 1},
    "all heads": {"objects": 3},
    "more heads": {"objects": 5, "encoder": {"last_heads": 6}},
    "other Sinkhorn": {"epsilon": 0.5, "iterations": 3},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_equal_the_algorithm_in_loops(case):
    settings = dict(CASES[case])
    method = tiny(tiny_vit(**settings.pop("encoder", {})), **settings)
    clip = make_clip(batch=2, frames=3, shift=(5.0, 2.0))
    expected, _ = reference(method, clip)
    losses = method.losses(clip)
    assert {k: float(v.detach()) for k, v in losses.items()} == pytest.approx(
        {k: float(v.detach()) for k, v in expected.items()}, rel=1e-9
    )
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(sum(losses.values()), parameters)
    wanted = torch.autograd.grad(sum(expected.values()), parameters)
    for one, other in zip(found, wanted, strict=True):
        # positions are interpolated for the small crops in float32
        assert (one - other).norm() <= 1e-6 * other.norm() + 1e-14
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())


@pytest.mark.parametrize("case", ["code", "soft masks", "no tracking", "more heads"])
def test_pictures_show_the_algorithms_heads_tracks_and_masks(case):
    settings = dict(CASES[case])
    method = tiny(tiny_vit(**settings.pop("encoder", {})), **settings)
    clip = make_clip(batch=2, frames=3, shift=(5.0, 2.0))
    seen = method.look(clip).objects
    _, masks = reference(method, clip)
    large = method.crops(clip).large[0].unflatten(0, (2, 3))
    assert torch.equal(seen.frames, large)
    assert list(seen.chosen) == method.chosen().tolist()
    with torch.no_grad():
        for c in range(2):
            attention = method.teacher.encoder.look(large[c, :1]).attention[0, :, 0, 1:]
            assert torch.allclose(seen.heads[c].flatten(1), attention)
            refined = tracks(method, large[c], seen.chosen)
            method.sinkhorn = False
            raw = tracks(method, large[c], seen.chosen)
            method.sinkhorn = True
            for t in range(3):
                assert torch.allclose(seen.tracks[c, t].flatten(1), torch.stack(refined[t]))
                assert torch.allclose(seen.raw[c, t].flatten(1), torch.stack(raw[t]))
                if method.masks == "hard":
                    blocks = torch.stack(masks[c][t])[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
                    assert torch.equal(seen.masks[c, t].double(), blocks)
    assert 0 < seen.masks.mean() < 1


def test_masks_are_not_those_of_chance_nor_all_alike():
    """With weights far from their start the switches really change what is masked."""
    clip = make_clip(batch=2, frames=3)
    seen = {case: tiny(**CASES[case]).look(clip).objects for case in ("code", "no Sinkhorn", "mass 1 in all")}
    assert not torch.equal(seen["code"].masks, seen["no Sinkhorn"].masks)
    assert not torch.equal(seen["code"].tracks, seen["mass 1 in all"].tracks)
    assert not torch.equal(seen["code"].masks[:, :, 0], seen["code"].masks[:, :, 1])
    assert not torch.equal(seen["code"].masks[:, 0], seen["code"].masks[:, 1])


def test_random_masks_hide_blocks_drawn_for_every_frame_and_object():
    method, clip = tiny(masks="random"), make_clip(batch=2, frames=3)
    seen = method.look(clip).objects
    for t in range(3):
        for o in range(2):
            keys = fold(clip.key, "mask", o, t)
            hidden = block_masks(keys, mask_ratios(keys, (0.3,), (0.2,)), (4, 4))
            assert torch.equal(seen.masks[:, t, o].bool(), ~hidden)
    assert seen.masks.std() > 0
    assert method.losses(clip)["object"] > 0


def test_a_clip_of_one_frame_is_an_image():
    """DoRA*: with T = 1 tracking changes nothing."""
    clip = make_clip(batch=3, frames=1)
    followed, alone = (tiny(tracking=tracking).losses(clip) for tracking in (True, False))
    assert {k: float(v.detach()) for k, v in followed.items()} == {
        k: float(v.detach()) for k, v in alone.items()
    }


def test_no_local_crops_no_local_loss():
    assert list(tiny(locals=0).losses(make_clip())) == ["object"]


def test_masked_pixels_have_the_mean_colour_and_the_others_stay():
    method = tiny()
    images = torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64)
    masks = torch.rand(2, 3, 1, 4, 4) > 0.5
    masked = method.masked(images, masks)
    back, encoder = masked, method.student.encoder
    blocks = masks.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2).expand_as(back)
    assert torch.allclose(back[blocks], images.expand_as(back)[blocks])
    mean = encoder.mean.expand_as(back)
    assert torch.allclose(back[~blocks], mean[~blocks])


def trainer_at(step, accumulate=1, seed=0):
    return SimpleNamespace(
        accumulate_grad_batches=accumulate, global_step=step, datamodule=SimpleNamespace(seed=seed),
        current_epoch=0,
    )  # fmt: skip


def heads_at(monkeypatch, step, batch_idx=0, batch=2, **kwargs):
    method = tiny(tiny_vit(last_heads=12), objects=3).float().train()
    monkeypatch.setattr(DoRA, "trainer", trainer_at(step, **kwargs))
    monkeypatch.setattr(DoRA, "global_step", step)
    monkeypatch.setattr(DoRA, "log_dict", lambda *_args, **_kwargs: None)
    method.training_step(make_clip(batch=batch), batch_idx)
    return tuple(method.chosen().tolist())


def test_heads_follow_from_seed_step_and_micro_batch_alone(monkeypatch):
    drawn = [heads_at(monkeypatch, step) for step in range(12)]
    assert all(len(set(heads)) == 3 and set(heads) <= set(range(12)) for heads in drawn)
    assert len(set(drawn)) > 6
    assert heads_at(monkeypatch, 5, batch=4) == drawn[5]  # whatever the batch: the same on all devices
    assert heads_at(monkeypatch, 5, batch_idx=8, accumulate=4) == drawn[5]
    assert heads_at(monkeypatch, 5, batch_idx=9, accumulate=4) != drawn[5]
    assert heads_at(monkeypatch, 5, seed=1) != drawn[5]


def test_held_out_clips_always_have_the_same_heads():
    method = tiny(tiny_vit(last_heads=12), objects=3)
    before = method.chosen()
    method.moment = (0, 7, 0)
    assert torch.equal(before, method.chosen())
    assert not torch.equal(before, method.train().chosen())


def test_the_default_is_the_codes():
    """shashankvkt/DoRA_ICLR24: main.py, pretrain.slurm.sh, vit_small."""
    with torch.device("meta"):
        method = DoRA()
    assert (method.objects, method.heads, method.epsilon, method.iterations) == (3, 6, 0.05, 30)
    assert method.student.head.last_layer.weight_v.shape == (65536, 256)
    assert method.student.head.last_layer.weight_g.requires_grad
    crops = method.crops
    assert (crops.large.size, crops.large.area, crops.large.flip) == ((224, 224), (0.4, 1.0), 0.5)
    assert (crops.small.size, crops.small.area, crops.small.flip) == ((112, 112), (0.05, 0.4), 0.0)
    assert (crops.views, crops.locals, crops.clip_wide) == (1, 6, True)
    assert (crops.colours[0].blur, crops.colours[0].solarize, crops.local_colour.blur) == (0.1, 0.0, 0.5)


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match=r"objects=4, .* 3 heads: choose 1 to 3, or set encoder\.last_heads"):
        tiny(objects=4)
    assert tiny(tiny_vit(last_heads=4), objects=4).objects == 4
    with pytest.raises(UserError, match="objects=0"):
        tiny(objects=0)
    for bad in ((0.9, 0.2), (0.1, 0.2), (-0.3, 0.0)):
        with pytest.raises(UserError, match=r"DoRA: block_ratio=\[.*\]: choose"):
            tiny(block_ratio=bad)
    with pytest.raises(UserError, match="DoRA: set iterations=0 to at least 1"):
        tiny(iterations=0)
    with pytest.raises(UserError, match=r"epsilon=0\.0 above 0"):
        tiny(epsilon=0.0)
    with pytest.raises(UserError, match="needs a ViT"):
        tiny(tiny_encoder())
    with pytest.raises(UserError, match=r"crops\.large\.size=\[32, 32\].*patches of 12"):
        tiny(tiny_vit(patch=12, image_size=(36, 36)))
    with pytest.raises(UserError, match=r"views=2 and crops\.views=1"):
        DoRA(tiny_vit(), tiny_head(), tiny_crops(views=1), views=2)
