"""Two processes find what one finds, and both of them know it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from two_scorers import main

HERE = Path(__file__).parents[1]


def start(folder, rank, port):
    # a seed that another test has set would be set again where processes join, and only there
    inherited = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    environment = inherited | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    words = [sys.executable, str(HERE / "two_scorers.py"), str(folder), "2"]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, draws = tmp_path_factory.mktemp("ranks"), np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count + (label == 0)):
                pixels = draws.integers(60 * label, 60 * label + 90, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [start(folder, rank, port) for rank in range(2)]
    alone = json.loads(json.dumps(main(folder, 1)))
    said = [process.communicate(timeout=240)[0] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text[-3000:]
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
