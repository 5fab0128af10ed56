"""Shares of a list of videos: nothing twice, nothing left out, about the same work, the same everywhere."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from poodle_lightning.data.shares import Share, split
from poodle_lightning.types import UserError


def videos(count, seed=0, longest=3600.0):
    lengths = np.random.default_rng(seed).uniform(1.0, longest, count)
    return {f"city/{number:03d}.mp4": float(length) for number, length in enumerate(lengths)}


def load(share, weights):
    return sum(weights[name] for name in share)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_every_video_is_in_exactly_one_share(count):
    weights = videos(40)
    shares = split(weights, count)
    assert len(shares) == count
    assert sorted(itertools.chain(*shares)) == sorted(weights)
    assert all(share == sorted(share) for share in shares)


def test_shares_differ_by_at_most_one_video():
    for seed in range(5):
        weights = videos(50, seed)
        loads = [load(share, weights) for share in split(weights, 6)]
        assert max(loads) - min(loads) <= max(weights.values())


def test_no_share_is_above_grahams_bound():
    """The best of all ways to share out a few videos, by trying them."""
    for seed in range(4):
        weights = videos(7, seed)
        names, values = list(weights), np.array(list(weights.values()))
        ways = np.array(list(itertools.product(range(3), repeat=len(names))))
        best = np.stack([(values * (ways == n)).sum(axis=1) for n in range(3)]).max(axis=0).min()
        assert max(load(share, weights) for share in split(weights, 3)) <= best * (4 / 3 - 1 / 9) + 1e-9


def test_videos_of_one_weight_are_dealt_out_evenly():
    for weight in (0.0, 5.0):
        weights = {f"{number}.mp4": weight for number in range(11)}
        assert sorted(len(share) for share in split(weights, 4)) == [2, 3, 3, 3]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_videos_of_one_weight_are_dealt_out_by_name_in_whatever_order_they_come(weight):
    weights = dict.fromkeys((f"{number:02d}.mp4" for number in range(30)), weight)
    dealt = [sorted(weights)[start::4] for start in range(4)]  # like cards
    names = list(weights)
    orders = [names, names[::-1], [str(name) for name in np.random.default_rng(1).permutation(names)]]
    for order in orders:
        assert split(dict.fromkeys(order, weight), 4) == dealt


def test_depends_on_names_and_weights_alone():
    weights = videos(30) | {"same a": 10.0, "same b": 10.0, "same c": 10.0}
    expected = split(weights, 4)
    shuffled = np.random.default_rng(1).permutation(list(weights))
    assert split({str(name): weights[name] for name in shuffled}, 4) == expected
    code = (
        "from poodle_lightning.data.shares import split\n"
        f"print(split({dict(reversed(weights.items()))!r}, 4) == {expected!r})"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}  # another process hashes names otherwise
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True"


def test_impossible_shares_are_refused():
    for weights, count in (({}, 0), ({"a": -1.0}, 1), ({"a": float("nan")}, 1)):
        with pytest.raises(ValueError, match="must"):
            split(weights, count)
    assert split({}, 2) == [[], []]
    with pytest.raises(ValueError, match="no share 3 of 2"):
        Share(3, 2)


def test_a_share_takes_its_part():
    weights = videos(9)
    parts = [Share(number, 3).of(weights) for number in (1, 2, 3)]
    assert parts == split(weights, 3)


# ---- who decides
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "16"}
RANK = {"RANK": "5", "WORLD_SIZE": "6"}


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        (None, {}, (1, 1)),
        ("2/4", {}, (2, 4)),
        ("2/4", SLURM | RANK, (2, 4)),
        (None, SLURM, (2, 8)),
        (None, RANK, (6, 6)),
        (None, SLURM | RANK, (6, 6)),
        (None, SLURM | {"RANK": "3"}, (2, 8)),  # half of a pair says nothing
        (None, {"SLURM_STEP_NUM_TASKS": "8"}, (1, 1)),
    ],
)
def test_the_flag_comes_first_then_the_launcher_then_slurm(flag, environment, expected):
    share = Share.find(flag, environment)
    assert (share.number, share.count) == expected
    assert str(share) == f"share {expected[0]} of {expected[1]}"
    assert bool(share.origin) == bool(flag or len(environment) > 1)


@pytest.mark.parametrize("flag", ["0/4", "5/4", "1", "a/b", "-1/4", "1/0", "", "1/300000000"])
def test_a_flag_that_is_no_share_is_refused(flag):
    with pytest.raises(UserError, match="i/n"):
        Share.find(flag, {})


def test_a_batch_script_without_srun_has_all_the_work():
    """It is one process of a job that may start eight: nobody would do the other shares."""
    assert Share.find(None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Share()


@pytest.mark.parametrize("rank", ["8", "x", "-1"])
def test_an_environment_that_is_no_share_is_refused(rank):
    with pytest.raises(UserError, match=r"SLURM_PROCID=.* --shard"):
        Share.find(None, {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": "8"})
    with pytest.raises(UserError, match=r"WORLD_SIZE=300000000 .* --shard"):
        Share.find(None, {"RANK": "1", "WORLD_SIZE": "300000000"})
