"""Two processes find what one finds, and both of them know it."""

import json

import numpy as np
import pytest
from PIL import Image
from side_by_side import two_of, wait_for
from two_scorers import main


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, draws = tmp_path_factory.mktemp("ranks"), np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count + (label == 0)):
                pixels = draws.integers(60 * label, 60 * label + 90, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    running = two_of("two_scorers.py", folder)
    alone = json.loads(json.dumps(main(folder, 1)))
    wait_for(running)
    return [alone, *(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))]


@pytest.mark.parametrize(
    "name", ["retrieval", "clustering", "knn", "discovery", "propagation", "probe", "finetune"]
)
def test_two_processes_score_like_one(found, name):
    one, first, second = (json.dumps(result[name]) for result in found)
    assert first == one
    assert second == one


def test_one_of_two_processes_may_search_alone(found):
    one, first, second = found
    assert first["alone"] == one["alone"]
    assert "alone" not in second


def test_confusion_counts_of_unequal_shares_add_up(found):
    one, first, second = (result["confusion"] for result in found)
    assert one["images"] == 5
    assert first == second == one


def test_the_probes_steps_are_those_of_the_whole_batch(found):
    one, first, second = (np.array(result["weights"]) for result in found)
    assert np.abs(one - first).max() < 1e-5
    assert np.array_equal(first, second)


def test_finetunings_steps_are_those_of_the_whole_batch(found):
    for layer in range(2):
        one, first, second = (np.array(result["tuned"][layer]) for result in found)
        assert np.abs(one - first).max() < 1e-5
        assert np.array_equal(first, second)


def test_every_process_mixes_its_batches_otherwise(found):
    one, first, second = (result["mixing"] for result in found)
    assert len(one) == 2
    assert first == one  # a function of seed, step and device
    assert not set(first) & set(second)
