"""Detection, depth and actions: two processes take the steps of one and find what one finds."""

import pytest
import torch
from side_by_side import two_of, wait_for
from two_evaluations import NAMES, made, main, trees


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process has, and each of two, which run at the same time."""
    folder = tmp_path_factory.mktemp("evaluations")
    trees(folder)
    running = two_of("two_evaluations.py", folder)
    alone = main(folder, 1)
    wait_for(running)
    return folder, [alone, *(torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))]


# Of the way that a weight has gone. Rounding turns a few of a detector's many ReLUs on or off: 0.2 % of it.
# Means over what one process has, or samples that depend on the batch, are 10 % and more.
NEAR = {"maskrcnn": 1e-2, "fcos": 1e-2, "depth": 1e-4, "action": 1e-4}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_step_like_one(name, found):
    folder, results = found
    one, *both = (result[name]["weights"] for result in results)
    start = {key: value.detach() for key, value in made(name, folder, 1)[0].named_parameters()}
    assert max(float((one[key] - value).norm()) for key, value in start.items()) > 1e-2
    for key, value in start.items():
        way = float((one[key] - value).norm())
        for two in both:
            assert float((two[key] - one[key]).norm()) <= NEAR[name] * way + 1e-6, key


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_count_each_item_once_and_score_like_one(name, found):
    one, *both = (result[name] for result in found[1])
    assert one["counts"]["videos" if name == "action" else "images"] == 3
    for two in both:
        assert two["counts"] == one["counts"]
        assert two["scores"] == pytest.approx(one["scores"], rel=1e-9, nan_ok=True)
        for measure, values in one["per_class"].items():
            assert two["per_class"][measure] == pytest.approx(values, rel=1e-9, nan_ok=True)
