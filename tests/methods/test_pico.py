import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from device_reads import DeviceReads
from side_by_side import in_two
from tiny_models import make_clip, tiny_encoder
from tiny_pico import CROP, PLACES, tiny, tracked, two_crops, untracked
from torch import nn
from torch.nn import functional

from poodle_lightning.augment import photometric
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.pico import PiCo
from poodle_lightning.nn.optim import build_optimizer
from poodle_lightning.ops.geometry import Affine, sample
from poodle_lightning.types import UserError


# ---- points
class Box(ResizedCrop):
    """Crops that a test has chosen: ``(x0, y0, x1, y1, mirrored)`` per view, image by image."""

    def __init__(self, boxes):
        super().__init__(CROP)
        self.boxes = boxes

    def draw(self, key, size, aspect=None):
        made = Affine.box(torch.tensor([box[:4] for box in self.boxes]))
        mirror = torch.tensor([-1.0 if box[4] else 1.0 for box in self.boxes])
        matrix = made.matrix.clone()
        matrix[:, 0, 0] *= mirror
        return Affine(matrix)


def in_view(point, box):
    """A place of the clean frame in a crop of it, by hand; None if the crop does not show it."""
    x0, y0, x1, y1, mirrored = box
    x, y = (2 * (p - low) / (high - low) - 1 for p, low, high in zip(point, (x0, y0), (x1, y1), strict=True))
    x = -x if mirrored else x
    return (x, y) if abs(x) <= 1 and abs(y) <= 1 else None


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_points_go_through_crop_and_flip_as_by_hand(frames):
    """Mirrored crops too; what either view does not show has no weight and is asked for inside the view."""
    torch.manual_seed(1)
    clip = tracked(batch=2, frames=frames)
    boxes = []
    for number in range(2 * 2 * frames):
        side = torch.rand(2) * 0.6 + 1.2
        low = torch.rand(2) * (2 - side) - 1
        boxes.append((*low.tolist(), *(low + side).tolist(), number % 2 == 0 or number % 5 == 0))
    method = tiny(double=False)
    method.crops = MultiCrop(Box(boxes), locals=0, colours=(), clip_wide=False)
    _, x_k, p_q, p_k, weight = method.views(clip)
    others = [0] if frames == 1 else list(range(1, frames))
    assert len(x_k) == len(p_k) == len(weight) == 2 * len(others)
    shown = 0
    for n, t in enumerate(others):
        for i in range(2):
            for p in range(PLACES):
                one = in_view(clip.points[i, p, 0].tolist(), boxes[i * frames])
                two = in_view(clip.points[i, p, t].tolist(), boxes[2 * frames + i * frames + t])
                assert bool(weight[n * 2 + i, p]) == (one is not None and two is not None)
                for found, wanted in ((p_q[i, p], one), (p_k[n * 2 + i, p], two)):
                    if wanted is None:
                        assert found.abs().max() <= 1  # a place that the view does show
                    else:
                        assert found.tolist() == pytest.approx(wanted, abs=1e-5)
                shown += one is not None and two is not None
    assert 0 < shown < len(others) * 2 * PLACES
    again = method.views(clip)
    assert torch.equal(p_k, again[3])


def test_a_point_finds_the_pixel_that_it_names():
    """Key and query views are read where the frame has the point: by colours that tell the place."""
    clip = make_clip(batch=2, frames=2)
    height, width = clip.frames.shape[-2:]
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    clip.frames[:] = torch.stack([x * 3, y * 6, 0 * x]).to(torch.uint8)
    places = torch.rand(2, 40, 2, 2) * 1.8 - 0.9
    method = tiny(double=False)
    x_q, x_k, p_q, p_k, weight = method.views(replace(clip, points=places))
    assert weight.sum() > 5
    for images, points, frame in ((x_q, p_q, 0), (x_k, p_k, 1)):
        found = sample(images, points[:, None])[:, :2, 0] * 255
        # the training crop leaves out a border of 1 px, and pixel centres stand at halves
        wanted = (places[:, :, frame] + 1) / 2 * torch.tensor([width - 2, height - 2]) + 0.5
        wanted = (wanted * torch.tensor([3, 6])).transpose(1, 2)
        error = (found - wanted).abs().amax(dim=1)[weight]
        assert error.quantile(0.8) < 0.1
        assert error.max() < 4.0  # within half a pixel of a border views repeat their last one


# ---- the loss
def pixel(network, image, point, lookup):
    """The projected vector of one place, from the whole projected map."""
    maps = network.projector(network.decoder(network.encoder(image[None])).last)[0]
    height, width = maps.shape[-2:]
    x, y = ((float(c) + 1) / 2 * side for c, side in zip(point, (width, height), strict=True))
    if lookup == "nearest":
        return maps[:, min(int(y), height - 1), min(int(x), width - 1)]
    x, y = (min(max(c - 0.5, 0.0), side - 1.0) for c, side in ((x, width), (y, height)))
    i, j = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - i, y - j
    rows = (1 - b) * maps[:, j] + b * maps[:, j + 1]
    return (1 - a) * rows[:, i] + a * rows[:, i + 1]


def by_loops(method, clip, lookup):
    """The loss point by point with a graph, and the keys in the order in which they join the queue."""
    x_q, x_k, p_q, p_k, weight = method.views(clip)
    batch, others = len(x_q), len(x_k) // len(x_q)
    losses, keys = [], []
    for i in range(batch):
        for n in range(others):
            row = n * batch + i
            for p in range(p_q.shape[1]):
                with torch.no_grad():
                    k = functional.normalize(
                        pixel(method.target.module, x_k[row], p_k[row, p], lookup), dim=0
                    )
                keys.append(k)
                if weight[row, p]:
                    q = functional.normalize(pixel(method.online, x_q[i], p_q[i, p], lookup), dim=0)
                    scores = torch.stack([q @ k, *(q @ row for row in method.queue.rows)]) / 0.2
                    losses.append(scores.logsumexp(0) - scores[0])
    return torch.stack(losses).mean(), torch.stack(keys)


def learnt(network):
    return [*network.decoder.parameters(), *network.projector.parameters()]


@pytest.mark.parametrize(
    ("lookup", "frames"), [("nearest", 2), ("bilinear", 2), ("nearest", 1), ("nearest", 3)]
)
def test_loss_gradients_and_queue_equal_loops(lookup, frames):
    method, twin = tiny(lookup=lookup), tiny(lookup=lookup)
    clip = tracked(batch=2, frames=frames) if frames > 1 else untracked(batch=2, frames=1)
    found, (wanted, keys) = method.losses(clip), by_loops(twin, clip, lookup)
    assert list(found) == ["pixels"]
    torch.testing.assert_close(found["pixels"], wanted)
    count = 2 * max(1, frames - 1) * PLACES
    assert len(keys) == count
    torch.testing.assert_close(method.queue.rows[:count], keys)
    torch.testing.assert_close(method.queue.rows[count:], twin.queue.rows[count:])
    found["pixels"].backward()
    wanted.backward()
    for one, other in zip(learnt(method.online), learnt(twin.online), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        assert one.grad.abs().sum() > 0


def test_a_batch_without_any_point_in_sight_has_no_loss():
    method, clip = tiny(), tracked()
    clip.points.fill_(math.nan)
    loss = method.losses(clip)["pixels"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() == 0 for p in learnt(method.online))
    assert method.queue.rows.isfinite().all()


def test_places_of_a_frame_are_uniform_and_of_the_clips_key():
    method = tiny(places=400)
    clip = untracked(batch=2, frames=1)
    found = method.points(clip)
    assert found.shape == (2, 400, 1, 2)
    assert torch.equal(found, method.points(clip))
    assert torch.equal(found[1:], method.points(clip[1:]))
    assert not torch.equal(found[0], found[1])
    assert (found.mean(dim=(0, 1, 2)).abs() < 0.1).all()
    assert found.std(dim=(0, 1, 2)).tolist() == pytest.approx([3**-0.5] * 2, abs=0.05)


def test_what_the_key_view_does_not_show_joins_the_queue_as_another_pixel_of_it():
    """A clip that fills up with NaN: keys are those of random places, all different, none of the border."""
    method, clip = tiny(queue=30), tracked(points=30, batch=1)
    clip.points[:, 3:] = math.nan
    _, x_k, _, p_k, weight = method.views(clip)
    assert not weight[:, 3:].any()
    filler = p_k[0, 3:]
    assert len(filler.unique(dim=0)) == 27
    assert (filler.abs() < 1).all()
    assert (filler.abs().amax(dim=1) < 0.95).any()
    method.losses(clip)
    for row, point in zip(method.queue.rows[3:], filler, strict=True):
        with torch.no_grad():
            wanted = pixel(method.target.module, x_k[0], point, "nearest")
        torch.testing.assert_close(row, functional.normalize(wanted, dim=0))


# ---- who learns
def test_the_encoder_is_frozen_and_decoder_and_projector_learn():
    method = tiny()
    encoder = copy.deepcopy(method.online.encoder.state_dict())
    target = copy.deepcopy(method.target.module)
    optimizer = build_optimizer(method.recipe, method, 2)
    for _ in range(2):
        method.train()
        assert not any(module.training for module in method.online.encoder.modules())
        assert not any(module.training for module in method.target.module.encoder.modules())
        assert method.online.decoder.training
        optimizer.zero_grad()
        method.losses(tracked())["pixels"].backward()
        optimizer.step()
        method.target.update(method.online, 0.9)
    for network in (method.online, method.target.module):
        assert all(torch.equal(encoder[name], x) for name, x in network.encoder.state_dict().items())
    assert all(p.grad is None for p in [*method.online.encoder.parameters(), *method.target.parameters()])
    assert all(p.grad.abs().sum() > 0 for p in learnt(method.online))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in learnt(method.online)}
    for old, new in zip(learnt(target), learnt(method.target.module), strict=True):
        assert not torch.equal(old, new)


def test_the_target_moves_by_its_momentum():
    method = tiny()
    before = [p.clone() for p in learnt(method.target.module)]
    method.target.update(method.online, 0.9)
    for old, new, online in zip(before, learnt(method.target.module), learnt(method.online), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


def test_held_out_batches_change_nothing():
    method = tiny().eval()
    before = copy.deepcopy(method.state_dict())
    one, two = (method.losses(tracked())["pixels"] for _ in range(2))
    assert float(one.detach()) == float(two.detach())
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


# ---- processes and devices
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_two_processes_equal_one(frames):
    """The mean of their losses and gradients, and the queues of both; they see different points."""
    make = partial(tracked, frames=frames) if frames > 1 else partial(untracked, frames=1)
    clips, start = [make(batch=4, seed=seed) for seed in range(2)], tiny()

    def run(part):
        method, losses = copy.deepcopy(start), []
        for clip in clips:
            loss = method.losses(clip[part])["pixels"]
            loss.backward()
            losses.append(float(loss.detach()))
        gradients = [p.grad for p in learnt(method.online)]
        return {"losses": torch.tensor(losses), "gradients": gradients, "queue": method.queue.rows}

    first, second = in_two(lambda rank: run(slice(2 * rank, 2 * rank + 2)))
    alone = run(slice(0, 4))
    assert first["losses"].tolist() != second["losses"].tolist()
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, alone["losses"], rtol=1e-6, atol=0)
    for one, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-6, atol=1e-9)
    assert torch.equal(first["queue"], second["queue"])
    torch.testing.assert_close(first["queue"], alone["queue"])


@pytest.mark.parametrize(("lookup", "frames"), [("nearest", 1), ("nearest", 2), ("bilinear", 3)])
def test_a_step_reads_nothing_back(lookup, frames, monkeypatch):
    monkeypatch.setattr(photometric, "one_by_one", lambda device: False)  # the form of a GPU
    crops = two_crops(colours=(Colour(0.4, 0.4, 0.4, 0.1),))
    method = tiny(lookup=lookup, crops=crops, double=False)
    clip = tracked(frames=frames) if frames > 1 else untracked(frames=1)
    clip = clip if clip.points is None else replace(clip, points=clip.points.float())
    optimizer = build_optimizer(method.recipe, method, 2)
    on_device = [*method.parameters(), *method.buffers(), clip.frames, clip.window.matrix, clip.points]
    with DeviceReads(on_device) as reads:
        method.losses(clip)["pixels"].backward()
        optimizer.step()
        method.target.update(method.online, 0.99)
    assert reads.found == []


def test_half_precision_changes_the_loss_by_little():
    method, clip = tiny(double=False).eval(), tracked()
    exact = method.losses(clip)["pixels"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = method.losses(clip)["pixels"]
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.03)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="PiCo compares two crops"):
        tiny(crops=MultiCrop())
    with pytest.raises(
        UserError, match="lookup is nearest or bilinear and places at least 1, not cubic and 7"
    ):
        tiny(lookup="cubic")
    with pytest.raises(UserError, match="not nearest and 0"):
        tiny(places=0)


def test_health_is_judged_by_what_learns_too():
    """The encoder is frozen: a collapse of the decoder or the projector shows in the pixels alone."""
    method, images = tiny(), torch.rand(2, 3, 32, 48, dtype=torch.float64)
    healthy = method.embed(images)
    assert healthy["pixels"].shape == (2 * 8 * 12, 8)
    place = torch.tensor([2 * 5.5 / 12 - 1, 2 * 3.5 / 8 - 1])  # the cell in row 3 and column 5
    wanted = pixel(method.online, images[1], place, "nearest")
    torch.testing.assert_close(healthy["pixels"][8 * 12 + 3 * 12 + 5], wanted.float())
    with torch.no_grad():
        method.online.projector[-1].weight.zero_()
    collapsed = method.embed(images)
    assert torch.equal(collapsed["encoder"], healthy["encoder"])
    assert collapsed["pixels"].std(dim=0).max() < 1e-6 < healthy["pixels"].std(dim=0).min()


def test_look_shows_points_and_both_views():
    method, clip = tiny(), tracked(frames=3)
    look = method.look(clip)
    assert isinstance(method, Method)
    assert look.frames.shape == (3, 3, 3, 32, 64)
    assert look.points.shape == (3, PLACES, 3, 2)
    x_q, x_k, *_ = method.views(clip)
    assert torch.equal(look.large[:, 0], x_q)
    assert torch.equal(look.large[:, 1], x_k[-3:])


def test_the_published_sizes():
    """MoCo-v2's queue, projector, temperature and recipe (Chen et al. 2020; PiCo, section 4.1)."""
    method = PiCo(tiny_encoder(), queue=8)
    assert [layer.out_channels for layer in method.online.projector if isinstance(layer, nn.Conv2d)] == [
        2048,
        128,
    ]
    assert method.temperature == 0.2
    assert (method.recipe.ema_start, method.recipe.ema_end) == (0.999, 0.999)
    assert method.online.decoder.dims == 128
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in method.online.projector.modules())
