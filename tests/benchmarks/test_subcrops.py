"""What drawing and cutting of subcrops costs in operations and reads. Nothing is timed."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from device_reads import DeviceReads

from poodle_lightning.ops.crops import SubcropPairs, SubcropRecipe
from poodle_lightning.ops.geometry import Affine, pixels_to_extent

ROOT = Path(__file__).parents[2]


@pytest.fixture
def subcrops(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.subcrops")


@pytest.fixture
def step(subcrops):
    torch.manual_seed(0)
    return subcrops.Step(4, (128, 256))


def test_no_read_and_few_operations(subcrops, step):
    counts = subcrops.Counter(step.on_device).count(step.ours)
    assert counts["reads"] == counts["waits"] == 0
    assert 100 < counts["operations"] <= subcrops.GOAL_OPERATIONS
    with DeviceReads(step.on_device) as reads:
        step.ours()
    assert reads.found == []


def test_the_count_does_not_depend_on_the_batch(subcrops, step):
    more = subcrops.Step(9, (128, 256))
    few, many = (subcrops.Counter(s.on_device).count(s.ours)["operations"] for s in (step, more))
    assert few == many


def test_the_published_way_reads_at_every_try(subcrops, step):
    counts = subcrops.Counter(step.on_device).count(step.loop)
    tries = 8 * step.method.subcrops.count
    assert counts["waits"] >= 4 * tries  # a comparison is false, or all four are read
    assert counts["reads"] > counts["waits"]
    assert counts["operations"] > 2000


def test_the_counter_tells_device_from_host(subcrops):
    device, host = torch.arange(4.0), torch.arange(4.0)
    count = lambda work: subcrops.Counter([device]).count(work)  # noqa: E731
    ways = [
        lambda x: float((x + 1).sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 1],
        lambda x: (x > 1).nonzero(),
        lambda x: (x * 2)[1:].tolist(),
        lambda x: (x * 2).numpy(),
        lambda x: (x * 2).cpu(),
    ]
    for way in ways:
        assert count(lambda way=way: way(host))["waits"] == 0
        assert count(lambda way=way: way(device))["waits"] >= 1
    assert count(lambda: device[torch.tensor([0, 2])]) == {"operations": 2, "reads": 0, "waits": 0}


def test_both_ways_follow_one_recipe(subcrops, step):
    """The same ranges of areas, and partners that follow the flow: the loop is a fair comparison."""
    pairs = subcrops.published.draw(step.pixels, step.method.subcrops)
    assert len(pairs) == 48
    area = torch.tensor([pair.online[2] * pair.online[3] / (128 * 256) for pair in pairs])
    assert 0.045 < area.min() < area.max() < 0.31
    still = torch.full_like(step.pixels, 0.0)
    still[:, 0] = 9.0
    exact = SubcropRecipe(jitter=0.0)
    for pair in subcrops.published.draw(still, exact):
        (top, left, height, width), target = pair.online, pair.target
        if not pair.same and target[0] > 0 and target[1] > 0 and target[0] + target[2] < 128:
            assert abs(target[0] + target[2] // 2 - top - height // 2) <= 1
            if target[1] + target[3] < 256:
                assert abs(target[1] + target[3] // 2 - left - width // 2 - 9) <= 1


def test_both_ways_cut_the_same_where_boxes_are_whole_pixels(subcrops, step):

    looped = subcrops.published.draw(step.pixels, step.method.subcrops)
    boxes = lambda side: torch.tensor([getattr(pair, side) for pair in looped])  # noqa: E731

    def as_maps(box):
        corners = torch.stack([box[:, :2], box[:, :2] + box[:, 2:]], dim=1).flip(-1) - 0.5
        return Affine.box(pixels_to_extent(corners, (128, 256)).flatten(1))

    same = torch.tensor([pair.same for pair in looped])
    pairs = SubcropPairs(as_maps(boxes("online")), as_maps(boxes("target")), same)
    ours = step.method.cut(step.u, step.v, pairs)
    plain = subcrops.published.cut(step.u, step.v, looped, (192, 192))
    # at the border of a box the loop repeats its last pixel, ours reads the image's next one
    inner = (..., slice(8, -8), slice(8, -8))
    whole = ((boxes("online")[:, :2] + boxes("online")[:, 2:]) < torch.tensor([128, 256])).all(dim=1)
    assert whole.any()
    assert (ours[0][whole][inner] - plain[0][whole][inner]).abs().max() < 1e-3
    assert (ours[1][inner] - plain[1][inner]).abs().max() < 1e-3


def test_a_tiny_run_is_written(subcrops, tmp_path):
    subcrops.main(["--rounds", "1", "--h", "64", "--w", "128", "--pairs", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "subcrops.json").read_text())
    assert written["results"]["both"]["counts"]["ours"]["waits"] == 0
    assert written["results"]["both"]["times_faster"]["median"] > 0
