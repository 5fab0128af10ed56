"""Flow that the data gives, and filling up what it lacks."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poodle_lightning.configured import build, spec
from poodle_lightning.flow.given import Given, ZeroFlow, complete
from poodle_lightning.ops import geometry
from poodle_lightning.ops.geometry import Affine, Flow
from poodle_lightning.types import Clip, FlowEstimator, UserError

PAIRS, SIZE = 3, (8, 12)


def clip_with(flow, size=SIZE, box=None):
    boxes = torch.tensor([box or [-1.0, -1.0, 1.0, 1.0]]).expand(PAIRS, 4)
    return Clip(
        frames=torch.zeros(PAIRS, 2, 3, 8, 12, dtype=torch.uint8),
        window=Affine.box(boxes),
        size=size,
        times=torch.zeros(PAIRS, 2, dtype=torch.float64),
        index=torch.arange(PAIRS),
        key=torch.arange(PAIRS),
        flow=flow,
    )


def some_flow():
    """Row r (of 2N) is everywhere (r + 1, −r) px."""
    rows = torch.arange(2.0 * PAIRS)
    both = torch.stack([rows + 1, -rows], dim=1)[:, :, None, None].expand(2 * PAIRS, 2, 8, 12)
    return both.unflatten(0, (2, PAIRS)).transpose(0, 1).contiguous()


class Estimate:
    """Everywhere 100 + row of the pairs asked for; remembers them."""

    def __init__(self):
        self.asked = []

    def __call__(self, clean):
        self.asked.append(clean[:, 0, 0, 0, 0].tolist())
        rows = 100 + torch.arange(2.0 * len(clean)).reshape(-1, 1, 1, 1)
        return Flow.from_pixels(rows.expand(-1, 2, *clean.shape[-2:]))


def numbered():
    """Frames whose value is their pair's number."""
    return torch.arange(float(PAIRS)).reshape(-1, 1, 1, 1, 1).expand(PAIRS, 2, 3, *SIZE)


def first_pixels(flow):
    return flow.to_pixels()[:, :, 0, 0]


def test_a_clip_without_flow_is_estimated_whole():
    estimate = Estimate()
    flow = complete(clip_with(None), numbered(), estimate)
    assert estimate.asked == [[0, 1, 2]]
    torch.testing.assert_close(first_pixels(flow)[:, 0], 100 + torch.arange(6.0))


def test_a_clip_with_all_flow_is_not_estimated():
    estimate = Estimate()
    flow = complete(clip_with(some_flow()), numbered(), estimate)
    assert estimate.asked == []
    torch.testing.assert_close(first_pixels(flow)[:, 0], torch.arange(1.0, 7.0))
    torch.testing.assert_close(first_pixels(flow)[:, 1], -torch.arange(6.0))


def test_only_the_missing_rows_are_filled_and_only_their_pairs_estimated():
    given = some_flow()
    given[0] = torch.nan  # both ways
    given[2, 1, 0, 4, 5] = torch.nan  # one value of pair 2, back
    estimate = Estimate()
    flow = complete(clip_with(given), numbered(), estimate)
    assert estimate.asked == [[0, 2]]
    # estimated rows: pair 0 there 100, pair 2 there 101, pair 0 back 102, pair 2 back 103
    torch.testing.assert_close(first_pixels(flow)[:, 0], torch.tensor([100.0, 2, 3, 102, 5, 103]))


def test_given_flow_is_in_pixels_of_the_crop():
    """A window of half the frame written at 3 times its size: the motion is 3 times as many pixels."""
    box = [-1.0, -1.0, 0.0, 0.0]
    flow = Given()(clip_with(some_flow(), (12, 18), box), torch.zeros(PAIRS, 2, 3, 12, 18))
    torch.testing.assert_close(first_pixels(flow)[:, 0], 3 * torch.arange(1.0, 7.0))


def test_given_refuses_a_clip_without_flow():
    with pytest.raises(UserError, match=r"3 pairs .* without flow"):
        Given()(clip_with(None), numbered())
    given = some_flow()
    given[1, 0] = torch.nan
    with pytest.raises(UserError, match="1 pairs"):
        Given()(clip_with(given), numbered())


def test_zero_flow_is_zero_whatever_the_clip_knows():
    flow = ZeroFlow()(clip_with(some_flow()), numbered())
    assert flow.displacement.shape == (2 * PAIRS, 2, *SIZE)
    assert not flow.displacement.any()


def test_more_or_fewer_than_two_frames_are_refused():
    for kind in (lambda clip, clean: complete(clip, clean, Estimate()), ZeroFlow()):
        for frames, words in ((1, "one frame"), (3, "3 frames")):
            with pytest.raises(
                UserError, match=f"pairs of frames, the data gives clips of {words}: leave out"
            ):
                kind(clip_with(None), torch.zeros(2, frames, 3, 8, 8))
    with pytest.raises(ValueError, match="between frames"):
        complete(clip_with(None), torch.zeros(2, 3, 8, 8), Estimate())


@pytest.mark.parametrize("kind", [Given, ZeroFlow])
def test_is_an_estimator_and_plain_data(kind):
    assert isinstance(kind(), FlowEstimator)
    assert isinstance(build(spec(kind())), kind)


class Ops(TorchDispatchMode):
    """Names of the operations that ran on a tensor of the device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.names = device, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(x, torch.Tensor) and x.device.type == self.device for x in args):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("missing", [[], [(0, 0), (2, 1)], [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]])
def test_nothing_is_read_from_the_device(monkeypatch, missing):
    """On ``meta``, where a read is an error: which rows are there is known on the host."""
    monkeypatch.setattr(geometry, "island", lambda device_type: contextlib.nullcontext())
    present = torch.ones(PAIRS, 2, dtype=torch.bool)
    for pair, way in missing:
        present[pair, way] = False
    clip = replace(clip_with(some_flow()), present=present).to("meta")
    assert clip.present.device.type == "cpu"
    assert clip.flow.device.type == "meta"
    asked = []

    def estimate(clean):
        asked.append(len(clean))
        return Flow(torch.zeros(2 * len(clean), 2, *SIZE, device=clean.device))

    clean = numbered().to("meta")
    with Ops("meta") as ops:
        flow = complete(clip, clean, estimate)
    assert flow.displacement.shape == (2 * PAIRS, 2, *SIZE)
    assert asked == ([len({pair for pair, _ in missing})] if missing else [])
    reads = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "aten.equal")
    assert not [name for name in ops.names if any(read in name for read in reads)]
    assert ops.names
