"""Tracks of synthetic streets over 1 s, against where the points truly are and when they are truly hidden.

The truth asks no tracker: a street knows where the pixels of a frame are at any later time and whether they
are seen there (homographies and a depth test). The bounds have room below what was measured on these streets,
and are argued where they stand; of two numbers the first is the easy street's.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from poodle_lightning.data.synthetic import Street
from poodle_lightning.flow.dis import DIS
from poodle_lightning.ops.geometry import Flow, extent_to_pixels, pixel_grid
from poodle_lightning.ops.tracks import GAMMA, Tracks, alive, follow

STEPS, DELTA = 10, 0.5  # 10 frames in the second, squared pixels
STREETS = {"easy": (2, (128, 256)), "hard": (3, (192, 384))}


@dataclass(frozen=True)
class Truth:
    """P points, every second pixel of the first frame.

    Args:
        tracks: by exact flow.
        guessed: by DIS.
        place: ``(STEPS + 1, 2, P)`` pixels, where the points truly are.
        seen: ``(STEPS + 1, P)`` whether they are seen there.
        hidden: ``(P,)`` the first frame on which a point is in the frame but hidden, having been seen before.
        clear: ``(P,)`` the consistency of that step at the true places, squared pixels.
    """

    tracks: Tracks
    guessed: Tracks
    place: np.ndarray
    seen: np.ndarray
    hidden: np.ndarray
    clear: np.ndarray
    size: tuple[int, int]


def flows(pixels):
    return Flow.from_pixels(torch.from_numpy(np.ascontiguousarray(pixels)))


@pytest.fixture(scope="module", params=STREETS)
def truth(request):
    seed, size = STREETS[request.param]
    street, times = Street(seed, size, request.param), 1.0 + np.arange(STEPS + 1) / STEPS
    pairs = list(pairwise(times))
    forward = np.stack([street.flow(a, b)[0] for a, b in pairs])
    backward = np.stack([street.flow(b, a)[0] for a, b in pairs])
    images, _ = street.read(times)
    guess = np.stack([DIS().pixels(a, b) for a, b in pairwise(images)])
    points, zero = pixel_grid(size)[::2, ::2].reshape(-1, 2), torch.zeros(size[0] * size[1] // 4).long()
    way = [street.flow(1.0, t) for t in times]
    place = np.stack([f[:, ::2, ::2].reshape(2, -1) for f, _ in way])
    place += extent_to_pixels(points, size).numpy().T
    seen = np.stack([v[::2, ::2].reshape(-1) for _, v in way])
    return Truth(
        follow(flows(forward), flows(backward), points, zero),
        follow(flows(guess[:, 0]), flows(guess[:, 1]), points, zero),
        place,
        seen,
        *hidings(place, seen, backward, size),
        size,
    )


def hidings(place, seen, backward, size):
    """When each point is first hidden inside the frame (else −9), and how clearly its flows then differ."""
    count = place.shape[2]
    first = np.where(seen.all(0), STEPS, seen.argmin(0))
    here, before = place[first, :, np.arange(count)], place[first - 1, :, np.arange(count)]
    edge = np.array(size[::-1])
    inside = (here >= -0.5).all(1) & (here < edge - 0.5).all(1) & ~seen.all(0)
    node = np.clip(np.round(here).astype(int), 0, edge - 1)
    way, back = here - before, backward[first - 1, :, node[:, 1], node[:, 0]]
    clear = ((way + back) ** 2).sum(1) - GAMMA * ((way**2).sum(1) + (back**2).sum(1))
    return np.where(inside, first, -9), clear


def drift(truth, tracks):
    """Pixels between track and truth after 1 s, where both are there; and their share of what is seen."""
    both = np.flatnonzero((alive(tracks, DELTA).last == STEPS) & truth.seen[-1])
    end = extent_to_pixels(torch.from_numpy(tracks.at(both, STEPS)), truth.size).numpy()
    return np.linalg.norm(end - truth.place[-1].T[both], axis=1), len(both) / truth.seen[-1].sum()


def stops(truth, tracks):
    """The first frame without the track, where it ended by the check (else 99)."""
    spans = alive(tracks, DELTA)
    broke = spans.last - spans.first + 1 < tracks.lengths
    return np.where(broke, spans.last + 1, 99)


def precision(stop, hidden):
    """Share of stops within one frame of a true hiding."""
    return (np.abs(stop - hidden) <= 1)[stop < 99].mean()


def test_exact_flow_keeps_points_on_their_surface(truth):
    """Inside a surface only bilinear interpolation of a homography is wrong, by thousandths of a pixel.

    Near its border a step may be wrong by √δ = 0.7 px unnoticed; few points are there. Measured: median 0.002
    px, 90 % below 0.26 and 0.04 px.
    """
    error, kept = drift(truth, truth.tracks)
    assert np.median(error) < 0.01
    assert np.quantile(error, 0.9) < 0.5
    assert kept > 0.6  # measured 0.70 and 0.94; in the nearer street more of the frame is near a border


def test_exact_flow_stops_at_true_hidings(truth):
    """Recall is of what the check can see: surfaces that move apart by twice the threshold in that step.

    Measured 0.97 and 0.94. The rest was lost before, at a border; so are the stops that are no hidings
    (precision 0.87 and 0.89): points within a pixel of what is hidden, whose flow is mixed of two surfaces.
    """
    stop = stops(truth, truth.tracks)
    clear = (truth.hidden > 0) & (truth.clear >= 2 * DELTA)
    assert clear.sum() > 1000
    assert (np.abs(stop - truth.hidden) <= 1)[clear].mean() > 0.88
    assert precision(stop, truth.hidden) > 0.8


def test_of_all_hidings_those_stay_unseen_that_move_less_than_the_threshold(truth):
    """What δ cannot see it does not stop: recall of slow hidings is far below that of clear ones."""
    stop = stops(truth, truth.tracks)
    hit = np.abs(stop - truth.hidden) <= 1
    slow = (truth.hidden > 0) & (truth.clear < 0.5 * DELTA)
    clear = (truth.hidden > 0) & (truth.clear >= 2 * DELTA)
    assert slow.sum() > 100
    assert hit[slow].mean() < 0.6 * hit[clear].mean()


def test_dis_flow_drifts_by_a_fraction_of_the_motion(truth):
    """Against zero flow on the same points, which is as wrong as they move.

    Measured: median 0.9 of 10.4 px and 1.4 of 13.6 px; 0.64 and 0.91 of the seen points kept.
    """
    error, kept = drift(truth, truth.guessed)
    still = np.linalg.norm(truth.place[-1] - truth.place[0], axis=0)[truth.seen[-1]]
    assert np.median(error) < np.median(still) / 3
    assert kept > 0.5


def test_dis_flow_stops_at_hidings_more_than_chance_does(truth):
    """Chance: the same stops, dealt out to the points at random.

    Measured: precision 0.38 and 0.13 where chance has 0.12 and 0.035; recall of clear hidings 0.64 and 0.32.
    """
    stop = stops(truth, truth.guessed)
    rng = np.random.default_rng(0)
    chance = np.mean([precision(rng.permutation(stop), truth.hidden) for _ in range(20)])
    clear = (truth.hidden > 0) & (truth.clear >= 2 * DELTA)
    assert precision(stop, truth.hidden) > 2 * chance
    assert (np.abs(stop - truth.hidden) <= 1)[clear].mean() > 0.2
