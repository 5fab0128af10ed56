"""Frames rebuilt from their partner by exact shifts."""

import pytest
import torch

from poodle_lightning.draw.pairs import difference, warp_pairs
from poodle_lightning.ops.geometry import Flow


@pytest.fixture(scope="module")
def shifted():
    """The second frame is the first moved right by 4 and down by 2 pixels; flow in pixels."""
    first = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    second = first.roll((2, 4), dims=(-2, -1))
    there = torch.tensor([4.0, 2.0]).reshape(1, 2, 1, 1).expand(1, 2, 32, 64)
    return torch.stack([first, second], dim=1), Flow.from_pixels(torch.cat([there, -there]))


def test_integer_shift_gives_the_frame_back(shifted):
    frames, flow = shifted
    warped = warp_pairs(frames, flow)
    assert torch.equal(warped.here, torch.cat([frames[:, 0], frames[:, 1]]))
    assert torch.equal(warped.there, torch.cat([frames[:, 1], frames[:, 0]]))
    # sizes are powers of two, so integer shifts are exact
    assert torch.equal(warped.rebuilt[0, :, :30, :60], frames[0, 0, :, :30, :60])
    assert torch.equal(warped.rebuilt[1, :, 2:, 4:], frames[0, 1, :, 2:, 4:])
    assert warped.seen[0, :30, :60].all()
    assert not warped.seen[0, 30:].any()
    assert not warped.seen[0, :, 60:].any()


def test_error_counts_seen_pixels_only(shifted):
    frames, flow = shifted
    before, after = warp_pairs(frames, flow).error()
    assert after == 0.0
    assert before > 0.2
    hidden = torch.zeros(2, 32, 64, dtype=torch.bool)
    hidden[0, 3, 5] = True
    warped = warp_pairs(frames, flow, hidden)
    assert warped.seen.sum() == 1
    expected = (frames[0, 0, :, 3, 5] - frames[0, 1, :, 3, 5]).abs().mean()
    assert warped.error()[0] == pytest.approx(float(expected), abs=1e-6)


def test_difference_is_black_where_equal_and_grey_where_unseen():
    a = torch.zeros(1, 3, 1, 3)
    b = torch.tensor([0.0, 0.1, 0.9]).reshape(1, 1, 1, 3).expand(1, 3, 1, 3)
    made = difference(a, b, torch.tensor([[[True, True, False]]]), gain=3.0)
    assert made[0, 0, 0].tolist() == pytest.approx([0.0, 0.3, 0.5])
    assert difference(a, b, gain=3.0).max() == 1.0
