import copy
import math

import lightning as L
import pytest
import torch
from lightly.loss import NTXentLoss
from side_by_side import in_two
from tiny_models import make_clip, tiny_crops, tiny_encoder, tiny_recipe, tiny_vit
from torch import nn
from torch.utils.data import DataLoader

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.methods.densecl import DenseCL
from poodle_lightning.methods.moco import MoCo
from poodle_lightning.nn.queue import Queue
from poodle_lightning.ops.distributed import world_size
from poodle_lightning.types import UserError

NORMS = nn.modules.batchnorm._BatchNorm


def two_crops(size=(32, 32)):
    return MultiCrop(ResizedCrop(size, (0.2, 1.0), fit="redraw"), locals=0, colours=(), clip_wide=False)


def tiny(kind=MoCo, **kwargs):
    """Every weight apart from its copy's; BatchNorm with running statistics; the queue takes keys."""
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "queue": 20, "crops": two_crops(), "recipe": tiny_recipe()}
    method = kind(tiny_encoder(), **{**sizes, **kwargs})
    with torch.no_grad():
        for parameter in method.target.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for queue in (module for module in method.double().modules() if isinstance(module, Queue)):
            queue.rows.copy_(nn.functional.normalize(queue.rows, dim=1))  # to float64's rounding
    return frozen(method)


def frozen(method, how=True):
    for module in method.train().modules():
        if isinstance(module, NORMS):
            module.train(not how)
    return method


def one_loss(q, k, negatives, temperature):
    q, k = q / q.norm(), k / k.norm()
    top = math.exp(float(q @ k) / temperature)
    return -math.log(top / (top + sum(math.exp(float(q @ n) / temperature) for n in negatives)))


@pytest.mark.parametrize("frames", ["frame", "pair"])
def test_loss_equals_the_formula_in_float64_batch_after_batch(frames):
    """MoCo Eq. 1 image by image; the keys of a batch are negatives from the next batch on."""
    method = tiny(frames=frames)
    negatives = [row.clone() for row in method.queue.rows]
    place = 0
    for seed in range(4):  # 8 keys a batch, 4 from pairs: the queue of 20 goes round
        clip = make_clip(seed=seed, batch=4)
        queries, keys = method.views(clip)
        assert len(queries) == len(keys) == (8 if frames == "frame" else 4)
        total, new = 0.0, []
        for x_q, x_k in zip(queries, keys, strict=True):
            with torch.no_grad():
                q, k = method.online.pooled(x_q[None])[0], method.target.module.pooled(x_k[None])[0]
            total += one_loss(q, k, negatives, 0.2)
            new.append(k / k.norm())
        found = method.losses(clip)
        assert list(found) == ["contrast"]
        assert float(found["contrast"].detach()) == pytest.approx(total / len(queries), rel=1e-9)
        for key in new:
            negatives[place] = key
            place = (place + 1) % 20
        torch.testing.assert_close(method.queue.rows, torch.stack(negatives))


def test_loss_and_gradients_equal_the_published_form():
    """A row of 1 + K logits whose first is right; lightly's loss with a memory bank."""
    method, clip = tiny(), make_clip()
    twin = copy.deepcopy(method)
    method.losses(clip)["contrast"].backward()
    queries, keys = twin.views(clip)
    with torch.no_grad():
        k = twin.target.module.pooled(keys)
    q = twin.online.pooled(queries)
    bank = NTXentLoss(temperature=0.2, memory_bank_size=(20, 8))
    bank.memory_bank.bank = twin.queue.rows.t().clone().t()
    theirs = bank(q, k)
    ours = tiny().losses(clip)["contrast"]
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-9)
    logits = torch.cat(
        [
            nn.functional.cosine_similarity(q, k)[:, None],
            nn.functional.normalize(q, dim=1) @ twin.queue.rows.t(),
        ],
        dim=1,
    )
    nn.functional.cross_entropy(logits / 0.2, torch.zeros(len(q), dtype=torch.long)).backward()
    for one, other in zip(method.online.parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_reach_everything_online_and_nothing_else():
    method = tiny()
    method.losses(make_clip())["contrast"].backward()
    assert [n for n, p in method.online.named_parameters() if not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in method.target.parameters())
    assert not method.queue.rows.requires_grad


def test_pairs_take_the_query_from_the_first_and_the_key_from_the_last_frame():
    clip = make_clip(frames=3)
    clip.frames[:, 2] = 0  # black
    queries, keys = tiny(frames="pair").views(clip)
    assert len(queries) == len(keys) == 2
    assert queries.std() > 0.01
    assert keys.abs().max() < 1e-3
    queries, keys = tiny().views(clip)
    assert len(queries) == 6
    assert queries[2::3].abs().max() < 1e-3
    assert keys[2::3].abs().max() < 1e-3
    assert keys[:2].std() > 0.01


def test_the_views_are_drawn_as_published():
    """Area, colours and their probabilities (Chen et al. 2020; ``main_moco.py``)."""
    crops = MoCo(tiny_encoder(), hidden=8, out=4, queue=2).crops
    assert (crops.large.size, crops.large.area, crops.large.flip) == ((224, 224), (0.2, 1.0), 0.5)
    assert crops.large.fit == "redraw"
    assert (crops.views, crops.locals, crops.clip_wide) == (2, 0, False)
    for colour in crops.colours:
        assert isinstance(colour, Colour)
        assert colour.factors == (0.4, 0.4, 0.4, 0.1)
        assert (colour.jitter, colour.gray, colour.blur, colour.solarize) == (0.8, 0.2, 0.5, 0.0)
        assert colour.sigma == (0.1, 2.0)


def test_held_out_batches_change_neither_queue_nor_statistics():
    method = tiny().eval()
    before = copy.deepcopy(method.state_dict())
    one, two = method.losses(make_clip())["contrast"], method.losses(make_clip())["contrast"]
    assert float(one.detach()) == float(two.detach())
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


def test_look_shows_the_first_query_and_its_key():
    method, clip = tiny(), make_clip(frames=3)
    queries, keys = method.views(clip)
    large = method.look(clip).large
    assert large.shape == (2, 2, 3, 32, 32)
    assert torch.equal(large[1, 0], queries[3])
    assert torch.equal(large[1, 1], keys[3])


# ---- two processes
@pytest.mark.parametrize("kind", [MoCo, DenseCL])
def test_two_processes_equal_one(kind):
    """BatchNorm frozen: the mean of their losses and gradients, and the queues of both."""
    clips = [make_clip(batch=4, seed=seed) for seed in range(2)]
    start = tiny(kind)

    def run(part):
        method = copy.deepcopy(start)
        losses = []
        for clip in clips:
            terms = method.losses(clip[part])
            torch.stack(list(terms.values())).sum().backward()
            losses += [float(value.detach()) for value in terms.values()]
        gradients = [p.grad for p in method.online.parameters()]
        return {
            "losses": torch.tensor(losses),
            "gradients": gradients,
            "buffers": dict(method.named_buffers()),
        }

    first, second = in_two(lambda rank: run(slice(2 * rank, 2 * rank + 2)))
    alone = run(slice(0, 4))
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, alone["losses"])
    for one, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close((one + other) / 2, whole)
    queues = [name for name in alone["buffers"] if "queue" in name]
    assert len(queues) == (2 if kind is MoCo else 4)
    for name in queues:
        assert torch.equal(first["buffers"][name], second["buffers"][name])
        torch.testing.assert_close(first["buffers"][name], alone["buffers"][name])


def keys_of(method, images):
    (k,) = method.observe(lambda images: (method.target.module.pooled(images),), images)
    return k


def moved_keys(method, clip, order):
    """Keys of four clips, of which two processes each see half, in a new order; statistics of each half."""
    _, images = method.views(clip)
    halves = images[order].chunk(2)
    seen = torch.cat([copy.deepcopy(method.target.module).pooled(half) for half in halves])
    return nn.functional.normalize(seen[order.argsort()], dim=1)


@torch.no_grad()
def test_batch_norm_sees_keys_of_both_processes(monkeypatch):
    """Four images fall into two halves in three ways, the first of which is that of no exchange."""
    monkeypatch.setattr(MoCo, "global_step", property(lambda self: self.at))
    clip = make_clip(batch=4, frames=1)
    start = frozen(tiny(), how=False)

    def act(rank, shuffle):
        found = []
        _, images = start.views(clip[2 * rank : 2 * rank + 2])
        for step in range(6):
            method = copy.deepcopy(start)
            method.shuffle, method.at = shuffle, step
            found.append(nn.functional.normalize(keys_of(method, images), dim=1))
        return torch.stack(found)

    shuffled = torch.cat(in_two(lambda rank: act(rank, True)), dim=1)
    apart = torch.cat(in_two(lambda rank: act(rank, False)), dim=1)
    ways = [moved_keys(start, clip, torch.tensor(o)) for o in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2])]
    near = [[torch.allclose(keys, way, atol=1e-10) for way in ways] for keys in shuffled]
    assert all(sum(which) == 1 for which in near)
    assert {which.index(True) for which in near} == {0, 1, 2}
    assert all(torch.allclose(keys, ways[0], atol=1e-10) for keys in apart)


def test_the_order_changes_with_the_step_and_is_the_same_in_all_processes(monkeypatch):
    from poodle_lightning.methods import moco

    seen = []

    def exchange(rows, order):
        seen.append(order)
        return rows

    monkeypatch.setattr(moco, "world_size", lambda: 2)
    monkeypatch.setattr(moco, "exchange", exchange)
    monkeypatch.setattr(MoCo, "global_step", property(lambda self: self.at))
    method, images = frozen(tiny(), how=False), torch.rand(8, 3, 32, 32)
    for method.at in (0, 1, 0):
        method.observe(lambda images: (images,), images)
    there, back = seen[::2], seen[1::2]
    assert all(torch.equal(x[y], torch.arange(16)) for x, y in zip(there, back, strict=True))
    assert not torch.equal(there[0], there[1])
    assert torch.equal(there[0], there[2])
    count = len(seen)
    frozen(method).observe(lambda images: (images,), images)  # nothing to hide
    method.shuffle = False
    frozen(method, how=False).observe(lambda images: (images,), images)
    assert len(seen) == count
    assert world_size() == 1


# ---- bad input
def test_other_crops_than_two_are_refused():
    with pytest.raises(UserError, match=r"MoCo compares two crops .* crops\.locals=0, not 2 and 2"):
        tiny(crops=tiny_crops())
    with pytest.raises(UserError, match=r"crops\.views=2 and crops\.locals=0, not 1 and 0"):
        tiny(crops=MultiCrop(locals=0, views=1))
    with pytest.raises(UserError, match=r"crops\.large\.size=\[30, 30\] does not divide"):
        MoCo(tiny_vit(), crops=two_crops((30, 30)), queue=2)


def test_a_pair_needs_two_frames():
    with pytest.raises(UserError, match="frames=pair needs clips of 2 frames or more, not 1"):
        tiny(frames="pair").losses(make_clip(frames=1))


class Data(L.LightningDataModule):
    batch_size = 2

    def train_dataloader(self):
        clips = [make_clip(seed=seed) for seed in range(3)]
        return DataLoader(clips, batch_size=None, collate_fn=lambda clip: clip)


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_of_fewer_clips_than_the_queue_needs_is_refused():
    """Three batches of two clips."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {**quiet, "enable_model_summary": False, "accelerator": "cpu", "max_steps": 2}
    method = tiny(queue=6).float()
    before = method.queue.rows.clone()
    L.Trainer(**settings).fit(method, Data())
    assert not torch.equal(method.queue.rows, before)
    with pytest.raises(UserError, match=r"fewer clips than the queue needs: model\.queue=7 keys"):
        L.Trainer(**settings).fit(tiny(queue=7).float(), Data())
