"""Points tracked through videos, once, for methods that learn from what stays the same.

Sharma et al. 2022, "Pixel-level Correspondence for Self-Supervised Learning from Video" (PiCo), §3.2 and
App. A.1: points start uniformly in space and time and move by bilinear flow until they leave the frame or the
flow there and back disagree.

======================  ==================================================
symbol                  here
======================  ==================================================
γ, δ (eq. 3)            ``gamma``; any δ up to ``limit`` can be asked for
w, ŵ                    ``ops.tracks.follow``
number of points        ``points``
======================  ==================================================

Nothing is learnt, so this is no ``Method``: it has a prediction step only, which writes one file per stretch
of video (``data.tracks``). A stretch whose file is there is left out, so a run that was stopped goes on where
it was; each process takes its share of the stretches (``data.footage``) and no two write one file.

Deviations: PiCo's numbers of points, γ and δ are not known. γ and the default δ are those of Sundaram et al.
2010; 1,000 points and the limit are ours. Places are fixed-point numbers, consistencies half floats.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from itertools import pairwise, tee
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from poodle_lightning.configured import Configured
from poodle_lightning.data.footage import Footage, Stretch
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.track_counts import SKIPPED, Count, listed, note_skip
from poodle_lightning.data.tracks import Tracked, TrackStore
from poodle_lightning.flow.dis import DIS
from poodle_lightning.flow.given import Given
from poodle_lightning.flow.raft import RAFT
from poodle_lightning.ops.geometry import Flow
from poodle_lightning.ops.random import key_of
from poodle_lightning.ops.tracks import GAMMA, follow, starts
from poodle_lightning.types import UserError

_LONGEST = timedelta(days=30)  # that the first process to be done waits for the last one
LIMIT = 8.0  # squared pixels, ours: 16 times the default δ


class Trace(L.LightningModule, Configured):
    """Tracks of every stretch of video that the data module's ``predict_dataloader`` names.

    Args:
        flow: estimator, or ``Given``: the exact flow of generated videos.
        folder: of the track files; may hold some already.
        points: that are followed in every stretch.
        gamma: γ; another one needs other files.
        limit: largest δ that can be asked for later, squared pixels; infinity follows through occlusions.
        short_side: larger frames are reduced to this length of their shorter side, px, before flow is
            estimated; δ is then in such pixels. None takes frames as they are.
        every: follow over one frame of so many.
        seed: of the points.

    Raises:
        UserError: a number is out of range, or exact flow is asked for of reduced frames.
    """

    trains = False

    def __init__(
        self,
        flow: DIS | RAFT | Given,
        folder: str,
        points: int = 1000,
        gamma: float = GAMMA,
        limit: float = LIMIT,
        short_side: int | None = None,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(points, gamma, limit, short_side, every)
        if isinstance(flow, Given) and short_side is not None:
            raise UserError("exact flow is of frames as they are: leave out short_side")
        self.flow, self.folder, self.points = flow, Path(folder), points
        self.gamma, self.limit, self.short_side = gamma, limit, short_side
        self.every, self.seed = every, seed
        self.total = Count()
        self._began = 0.0
        self._group: Any = None

    @functools.cached_property
    def store(self) -> TrackStore:
        """The files, for this estimator and γ; the estimator is known with the size of frames that it saw."""
        about = "exact" if isinstance(self.flow, Given) else self.flow.fingerprint
        if self.short_side is not None:
            about += f", frames of {self.short_side} px"
        if self.every > 1:
            about += f", one frame of {self.every}"
        return TrackStore(self.folder, about, self.gamma)

    # ---- the loop
    def on_predict_start(self) -> None:
        """Start counting."""
        self.total, self._began = Count(), time.monotonic()
        if self.trainer.world_size > 1:  # all are here now; where they meet again they may be hours apart
            self._group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST)

    def predict_step(self, footage: Footage | None, batch_idx: int) -> int:
        """Track one stretch; None is that of a process that has none.

        Returns:
            Bytes written.
        """
        if footage is None:
            return 0
        count = self.video(footage)
        self.total += count
        return count.bytes

    def on_predict_epoch_end(self) -> None:
        """Say what all processes have done.

        Raises:
            UserError: most of the videos could not be tracked.
        """
        total = self.total
        if self.trainer.world_size > 1:
            counts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(counts, self.total, group=self._group)
            torch.distributed.destroy_process_group(self._group)
            total = Count()
            for count in counts:
                total += count
        if total.skipped:
            rank_zero_warn(f"videos left out: {listed(total.skipped)}; see {self.folder / SKIPPED}")
        total.check()
        rank_zero_info(f"{self.folder}: {total.told(time.monotonic() - self._began)}")

    # ---- one video
    def video(self, footage: Footage) -> Count:
        """Track a stretch and write its file, unless it is there; what cannot be tracked is written down.

        Raises:
            UserError: the file cannot be written, or is of another estimator, γ or seed; the device is full.
        """
        try:
            name, fingerprint = footage.name, footage.fingerprint()
            if self.store.holds(name, fingerprint, self.points, self.limit, self.seed):
                return Count(kept=1)
            tracked = self.track(footage)
        except (DecodeError, OSError) as error:
            reason = getattr(error, "reason", "unreadable")
            note_skip(self.folder, footage.name, reason, str(error))
            return Count(skipped=Counter([reason]))
        size = self.store.put(name, fingerprint, tracked.tracks, tracked.times, self.seed)
        seconds = float(tracked.times[-1] - tracked.times[0])
        return Count(1, 0, len(tracked.tracks), len(tracked.tracks.places), seconds, size)

    @torch.no_grad()
    def track(self, footage: Footage) -> Tracked:
        """The tracks of a stretch; a function of its frames, its name and the settings.

        Raises:
            DecodeError: it is damaged, or has fewer than two frames.
        """
        with ExitStack() as stack:
            stretch = stack.enter_context(footage.opened(self.every))
            pool = stack.enter_context(ThreadPoolExecutor(max(footage.workers, 1)))
            frames = len(stretch.times)
            points, first = starts(key_of(self.seed, "tracks", footage.name), self.points, frames)
            there, back = tee(self._flows(stretch, pool))
            ways = (pair[0] for pair in there), (pair[1] for pair in back)
            tracks = follow(*ways, points.to(self._place), first, self.gamma, limit=self.limit)
        return Tracked(tracks, stretch.times)

    @property
    def _place(self) -> torch.device:
        """Where the flow is estimated."""
        if isinstance(self.flow, RAFT):
            return next(self.flow.net.module.parameters()).device
        return torch.device("cpu")

    def _flows(self, stretch: Stretch, pool: ThreadPoolExecutor) -> Iterator[tuple[Flow, Flow]]:
        """From every frame to the next and back, of one row each."""
        for both in self._pixels(stretch, pool):
            self._stop_if_asked()
            flow = Flow.from_pixels(both)
            yield flow[:1], flow[1:]

    def _stop_if_asked(self) -> None:
        """Lightning notes a SIGTERM, but nothing looks at the note outside of training."""
        if self._trainer is not None and self._trainer.received_sigterm:
            raise SIGTERMException

    def _pixels(self, stretch: Stretch, pool: ThreadPoolExecutor) -> Iterator[Tensor]:
        """The same in pixels, ``(2, 2, H, W)``, there and back; few pairs at a time."""
        if isinstance(self.flow, Given):
            yield from map(torch.from_numpy, stretch.exact())
            return
        for frames in stretch.chunks(self.short_side):
            if isinstance(self.flow, RAFT):
                yield from self._on_device(self.flow, frames)
            else:
                yield from pool.map(functools.partial(_of_pair, self.flow), pairwise(frames))

    def _on_device(self, raft: RAFT, frames: np.ndarray) -> Iterator[Tensor]:
        place = self._place
        images = torch.from_numpy(frames)
        if place.type == "cuda":  # or the copy would wait for the flow of the frames before
            images = images.pin_memory()
        images = images.to(place, non_blocking=place.type == "cuda").permute(0, 3, 1, 2).float() / 255.0
        try:
            rows = raft.estimate(torch.stack([images[:-1], images[1:]], dim=1)).to_pixels()
        except torch.OutOfMemoryError as error:
            height, width = frames.shape[1:3]
            raise UserError(
                f"RAFT has no room for {raft.pairs_at_once} pairs of {height}x{width} on {place}: give it "
                "fewer pairs_at_once (--batch of poodle-lightning trace), or a short side"
            ) from error
        yield from rows.unflatten(0, (2, -1)).unbind(1)


def _of_pair(estimator: DIS, pair: tuple[np.ndarray, np.ndarray]) -> Tensor:
    try:
        return torch.from_numpy(estimator.pixels(*pair))
    except UserError as error:  # all that DIS has against two frames
        raise DecodeError("too_small", str(error)) from error


def _check(points: int, gamma: float, limit: float, short_side: int | None, every: int) -> None:
    if points < 1 or every < 1:
        raise UserError(f"points {points} and every {every} must be at least 1")
    if not 0 <= gamma < math.inf:
        raise UserError(f"gamma {gamma:g} must be a number from 0 on")
    if not limit > 0:
        raise UserError(f"limit {limit:g} must be above 0: it is the largest delta that can be asked for")
    if short_side is not None and short_side < 16:
        raise UserError(f"short_side {short_side} must be at least 16 px")
