"""J, F, recall and decay: numbers of the official evaluation, loops of the definitions, and edges."""

import math

import numpy as np
import pytest

from poodle_lightning.evaluation.video_metrics import (
    ObjectScore,
    contour,
    edge,
    region,
    score_sequence,
    summary,
    track,
)

SIZE = (40, 60)


def disk(x, y, radius, size=SIZE):
    rows, columns = np.mgrid[: size[0], : size[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def box(top, left, bottom, right, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


# davisvideochallenge/davis2017-evaluation (30b698a), metrics.py: db_eval_iou, f_measure at bound_th 0.008, 3
OFFICIAL = {
    "disks": (disk(20, 18, 10), disk(23, 20, 11), 0.6220095693779905, 0.29330499468650373, 0.75),
    "disk and box": (
        disk(30, 20, 12),
        box(9, 18, 31, 43),
        0.7656529516994633,
        0.5677210056772101,
        0.8979278587874135,
    ),
    "border": (
        box(0, 0, 20, 15),
        box(0, 0, 17, 22),
        0.6085918854415274,
        0.08333333333333334,
        0.5361702127659574,
    ),
    "inside": (box(5, 5, 35, 55), box(9, 9, 31, 50), 0.6013333333333334, 0.0, 0.0),
    "apart": (box(2, 2, 10, 10), box(25, 40, 35, 50), 0.0, 0.0, 0.0),
    "ring": (
        disk(30, 20, 15) & ~disk(30, 20, 7),
        disk(31, 20, 14) & ~disk(33, 21, 6),
        0.7217675941080196,
        0.6002475247524752,
        0.9474467030242935,
    ),
}
# utils.py, db_statistics of ((37 i + 11) mod 29) / 28, i < n: mean, recall, decay
STATISTICS = {
    1: (0.39285714285714285, 0.0, 0.0),
    2: (0.5357142857142857, 0.5, -0.28571428571428575),
    3: (0.6785714285714285, 0.6666666666666666, -0.4285714285714286),
    5: (0.55, 0.4, 0.17857142857142855),
    7: (0.5102040816326531, 0.42857142857142855, 0.2678571428571428),
    10: (0.5392857142857144, 0.5, 0.07142857142857129),
    13: (0.5137362637362638, 0.46153846153846156, 0.017857142857142794),
    50: (0.5157142857142857, 0.5, -0.05494505494505486),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_numbers(name):
    truth, guess, j, f, f3 = OFFICIAL[name]
    assert region(truth, guess) == pytest.approx(j, abs=1e-12)
    assert contour(truth, guess) == pytest.approx(f, abs=1e-12)
    assert contour(truth, guess, 3) == pytest.approx(f3, abs=1e-12)
    assert contour(guess, truth) == pytest.approx(contour(truth, guess), abs=1e-12)


def test_the_official_numbers_of_a_larger_image():
    truth, guess = disk(100, 70, 44, (150, 220)), disk(103, 71, 46, (150, 220))
    assert region(truth, guess) == pytest.approx(0.8983101540302079, abs=1e-12)
    assert contour(truth, guess) == pytest.approx(0.6672029146655942, abs=1e-12)


@pytest.mark.parametrize("count", STATISTICS)
def test_the_official_statistics(count):
    found = track((np.arange(count) * 37 + 11) % 29 / 28)
    assert (found.mean, found.recall, found.decay) == pytest.approx(STATISTICS[count], abs=1e-12)


def test_the_official_numbers_of_a_sequence():
    truth = np.zeros((6, *SIZE), np.uint8)
    guess = truth.copy()
    for t in range(6):
        truth[t][disk(15 + 2 * t, 18, 8)] = 1
        truth[t][box(25, 30 + 3 * t, 36, 40 + 3 * t)] = 2
        guess[t][disk(15 + t, 18 + t, 8)] = 1
        guess[t][box(25, 30 + 3 * t, 36, 38 + 3 * t)] = 2
    first, second = score_sequence(truth, guess, 2)
    wanted = (0.565095165896436, 0.5, 0.27190946675044114, 0.3958333333333333, 0.25, 0.42499999999999993)
    assert first.numbers() == pytest.approx(wanted, abs=1e-12)
    assert second.numbers() == pytest.approx((0.8, 1.0, 0.0, 0.75, 1.0, 0.0), abs=1e-12)
    assert ObjectScore.of(first.numbers()) == first
    found = summary([first, second])
    assert found["j_mean"] == pytest.approx((0.565095165896436 + 0.8) / 2)
    assert found["j_and_f"] == pytest.approx((0.565095165896436 + 0.8 + 0.3958333333333333 + 0.75) / 4)
    assert list(found) == ["j_and_f", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay"]


# ---- the definitions, pixel by pixel
def looped_edge(mask):
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
                found[y, x] |= mask[y, x] != mask[min(v, height - 1), min(u, width - 1)]
    return found


def looped_contour(truth, guess, bound):
    edges = [list(zip(*np.nonzero(looped_edge(mask)), strict=True)) for mask in (truth, guess)]
    if not all(edges):
        return float(not any(edges))
    reach = bound if bound >= 1 else math.ceil(bound * math.hypot(*truth.shape))
    right = [
        sum(any((y - v) ** 2 + (x - u) ** 2 <= reach**2 for v, u in other) for y, x in one) / len(one)
        for one, other in (edges, edges[::-1])
    ]
    return 2 * right[0] * right[1] / sum(right) if sum(right) else 0.0


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("bound", [0.008, 0.15, 2])
def test_contours_are_the_loop(share, bound):
    generator = np.random.default_rng(int(100 * share))
    for size in ((9, 14), (13, 6), (1, 5)):
        truth, guess = generator.random((2, *size)) < share
        assert np.array_equal(edge(truth), looped_edge(truth))
        assert contour(truth, guess, bound) == pytest.approx(looped_contour(truth, guess, bound), abs=1e-12)


def test_empty_masks():
    empty, full, some = np.zeros(SIZE, bool), np.ones(SIZE, bool), disk(20, 20, 6)
    assert region(empty, empty) == 1
    assert region(empty, some) == 0
    assert contour(empty, empty) == 1
    assert contour(empty, some) == contour(some, empty) == 0
    assert contour(full, empty) == 1  # neither has a contour inside the image
    assert region(np.stack([empty, some]), np.stack([some, some])).tolist() == [0, 1]


def test_first_and_last_frame_and_other_ids_do_not_count():
    truth = np.zeros((3, *SIZE), np.uint8)
    truth[:, 5:20, 5:20] = 1
    guess = truth.copy()
    guess[[0, 2]] = 0
    guess[1, 30:, 30:] = 2  # an id that the first mask does not have
    (found,) = score_sequence(truth, guess, 1)
    assert found.numbers() == (1, 1, 0, 1, 1, 0)


def test_long_sequences_are_cut_in_quarters():
    """The official evaluation counts frames in 8 bits and is wrong beyond 256."""
    values = np.concatenate([np.ones(201), np.full(398, 0.5), np.zeros(201)])
    assert track(values).decay == 1.0


def test_too_few_frames_and_unequal_shapes():
    with pytest.raises(ValueError, match="three frames"):
        score_sequence(np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), 1)
    with pytest.raises(ValueError, match="two equal"):
        score_sequence(np.zeros((3, 4, 4)), np.zeros((3, 4, 5)), 1)
    with pytest.raises(ValueError, match="no object"):
        summary([])
