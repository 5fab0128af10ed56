"""The data module that all methods share: videos on disk, or generated ones, to batches of clips."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from poodle_lightning.data.batches import Exhausted, collate
from poodle_lightning.data.cached_flow import CachedFlow, FixedPairs
from poodle_lightning.data.clips import ClipDataset, PixelFlow
from poodle_lightning.data.footage import FootageLoader, footage_loader
from poodle_lightning.data.loading import SharedDataModule
from poodle_lightning.data.opening import NO_FILMS, Origin, SourceName
from poodle_lightning.data.order import ClipLoader, Order, RequestSampler, batches_used
from poodle_lightning.data.sampling import ClipSampler, PairSampler, Sampler, WindowSampler
from poodle_lightning.data.skips import Ledger, listed
from poodle_lightning.data.sources import Entry, Source
from poodle_lightning.data.split import Division, Parts
from poodle_lightning.data.streets import StreetSet
from poodle_lightning.data.tracked import Stretches, TrackedFrames
from poodle_lightning.data.windows import TooSmall, WindowRule
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import Clip, Skip, UserError

# Held-out clips are drawn as if in an epoch that training never reaches.
HELD_OUT_EPOCH = -1
# Videos by which it is judged whether every window shrinks.
_LOOKED_AT = 50
# Classes beside their base: configurations that earlier versions wrote do not name the sampler.
AnySampler = Sampler | FixedPairs | PairSampler | ClipSampler | WindowSampler | TrackedFrames


class VideoDataModule(SharedDataModule):
    """Clips for pretraining, from any of the sources in ``poodle_lightning.data.sources``.

    An epoch takes every training video once (``repeats`` times), in an order that is a function of the seed
    and the epoch; the rest that does not fill a batch on all devices is left out, another rest in every
    epoch. A data set smaller than one batch on all devices is gone through several times per epoch. Training
    can stop and go on at any batch; nothing depends on the number of workers.

    Held-out clips come from ``val_fraction`` of the videos (at least one, chosen by the seed), with moments
    and windows that never change. A single video is held out in time: its end is for validation.

    Args:
        source: where the videos come from; see ``poodle_lightning.data.sources`` for the layouts.
        root: the folder; the file of a ``film``; not for ``synthetic``.
        split: of ``bdd100k`` and ``kinetics400``.
        city: of ``walking_tours``, or ``all``, or ``val``.
        rate: images per second, of ``frames``.
        synthetic: what to generate.
        size: height and width of the training crop, px.
        gap: shortest and longest time between the frames of a pair, s. ``(0, 0)`` is one frame seen twice.
        pairs_per_video: pairs from one opened video; they stand one after the other in the batch.
        spread: seconds within which those pairs begin. They share one decoded stretch, which saves most of
            the decoding, but are correlated: a batch holds fewer different scenes. None (the papers': the
            published code draws independent pairs) draws each anywhere in the video.
        jitter: for a gap of 0: how far the second window lies from the first, as a share of its size.
        sampler: draws the moments instead of ``gap`` and ``pairs_per_video``.
        clip_seconds: cut longer videos into stretches of this length, each of which counts as a video
            (Walking Tours: 10 s).
        start_every: or: one item per such step of time, each a clip that begins there, so that an epoch takes
            every start once (DoRA: 1/30 or 1/60 s, every frame). Held-out clips then do not overlap, and
            single frames are a second apart.
        cuts: ``avoid`` draws clips from within the shots of films, each of which then counts as a video; a
            detector finds them once (``data.shots``). ``keep`` does not care.
        hours: of all videos, take some at random that last so long in all.
        scale: the frame is resized to ``reference · U(scale)``, then cropped at random.
        area: or the window covers a share U(area) of the frame. Default: the share of PooDLe on BDD100K.
        reference: height and width that ``scale`` refers to; None is the video's own size.
        antialias: average raw pixels where a window shrinks by 2 or more.
        aspect: with ``area``: width over height of the window; None is that of ``size``.
        area_normal: with ``area``: mean and deviation of a normal law truncated to it, in place of a uniform.
        ratio: with ``area``: width over height of the window in px, log-uniform in this range (DoRA: area
            [0.2, 1], ratio [3/4, 4/3]).
        whole: the window is the whole frame, of whatever shape, and is squeezed to ``size``; ``Clip.aspect``
            tells the shape. Frames of many sizes want ``antialias`` too: a batch is stored as large as its
            largest frame.
        batch_size: clips per device and step.
        num_workers: processes that read videos.
        seed: of the order and of all draws; None is 0, or ``seed_everything`` on the command line.
        val_fraction: share of the videos that is held out; 0 holds out none.
        repeats: how often an epoch takes each video (PooDLe on Venice: 75).
        flow: an estimator that runs in the workers, e.g. ``poodle_lightning.flow.dis.DIS``.
        exact: take flow and labels from sources that know them.
        pixels: ``yuv`` sends the planes of 8-bit 4:2:0 videos to the device as they are stored, half the
            bytes of ``rgb``; ``Clip.unit`` makes them RGB there, within one level of ``rgb`` (two in a few of
            a million pixels). What has no such planes (other formats, rotated films, image folders, generated
            streets), what is averaged by ``antialias`` and what ``flow`` must see in the worker comes as RGB,
            and so does its whole batch; where that is all, a warning says so.
        max_skip_fraction: the largest share of training requests that may fail; see ``data.skips``.

    Raises:
        UserError: the settings contradict each other.
    """

    def __init__(
        self,
        source: SourceName = "folder",
        root: str | None = None,
        *,
        split: str = "train",
        city: str = "venice",
        rate: float = 10.0,
        synthetic: StreetSet | None = None,
        size: tuple[int, int] = (512, 1024),
        gap: tuple[float, float] = (0.5, 1.0),
        pairs_per_video: int = 1,
        spread: float | None = None,
        jitter: float = 0.1,
        sampler: AnySampler | None = None,
        clip_seconds: float | None = None,
        start_every: float | None = None,
        cuts: Literal["keep", "avoid"] = "keep",
        hours: float | None = None,
        scale: tuple[float, float] | None = None,
        area: tuple[float, float] | None = None,
        reference: tuple[int, int] | None = (1080, 1920),
        antialias: bool = False,
        aspect: float | None = None,
        area_normal: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
        whole: bool = False,
        batch_size: int = 4,
        num_workers: int = 2,
        seed: int | None = None,
        val_fraction: float = 0.05,
        repeats: int = 1,
        flow: PixelFlow | None = None,
        exact: bool = True,
        pixels: Literal["rgb", "yuv"] = "rgb",
        max_skip_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        self.origin = Origin(source, root, split, city, rate, synthetic, num_workers)
        self.source_name, self.root = source, root
        crop, frame = _pair(size), reference and _pair(reference)
        self.rule = WindowRule(crop, scale, area, frame, antialias, aspect, area_normal, ratio, whole)
        self.sampler: Sampler = _sampler(sampler, gap, jitter, pairs_per_video, spread)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed, self.repeats = seed or 0, repeats
        self.division = Division(
            self.sampler.span, self.seed, val_fraction, clip_seconds, start_every, hours, cuts
        )
        self.flow, self.exact, self.pixels = flow, exact, pixels
        self.ledger = Ledger(max_skip_fraction)
        self.source: Source | None = None
        self.train_entries: Sequence[Entry] = []
        self.val_entries: Sequence[Entry] = []
        self._stretches = Stretches(self.division, self.origin.name, num_workers, self.sampler)
        self._listed: Parts | None = None
        self._too_short: tuple[Skip, ...] = ()
        self._resumed_order: dict[str, int] | None = None
        self._check()

    @property
    def size(self) -> Size:
        """Height and width of the training crop, px."""
        return self.rule.size

    @property
    def clips_per_video(self) -> int:
        """Clips from one opened video."""
        return int(getattr(self.sampler, "pairs_per_video", 1))

    # ---- what there is
    def prepare_data(self) -> None:
        """Measure the videos, and find their shots, once per machine; the others read what is cached."""
        self.source = self.source or self.origin.open()
        if self.division.cuts == "avoid":
            # kept: without a cache to write to, hours of film are looked at once
            self._stretches.divided(self.source)

    def setup(self, stage: str | None = None) -> None:
        """List the videos and hold some out; to predict is to track them, so then none are.

        Raises:
            UserError: the folder is missing, or has no usable video, or there are no tracks to draw from.
        """
        self.source = self.source or self.origin.open()
        lists = self._stretches
        parts = lists.whole(self.source) if stage == "predict" else lists.divided(self.source)
        if parts is not self._listed:
            self.train_entries, self.val_entries, self._too_short = parts.train, parts.val, parts.left_out
            if isinstance(self.sampler, TrackedFrames) and stage != "predict":
                self.sampler.check_folder(self.source, lists.whole(self.source).train, self.root)
            self._listed = parts
            if self.pixels == "yuv" and (why := self._why_rgb()):
                rank_zero_warn(f"pixels yuv has no effect, all batches are RGB: {why}")
        if self.trainer is not None:
            # processes started apart (torchrun, srun) know the run's folder only from the first of them
            folder = self.trainer.strategy.broadcast(self.trainer.default_root_dir)
            self.ledger.open(folder, self.trainer.global_rank)
            refused = (*self.source.refused, *self._too_short)
            self.ledger.refused(refused)
            if refused and stage in ("fit", "predict"):
                reasons = listed(Counter(skip.reason for skip in refused))
                rank_zero_warn(f"{len(refused)} files are left out ({reasons}): see skipped.jsonl")

    # ---- loaders
    def train_dataloader(self) -> ClipLoader:
        """Batches of ``batch_size`` clips; starts where training stands."""
        groups = self.batch_size // self.clips_per_video * self._world
        videos = len(self.train_entries)
        passes = max(self.repeats, -(-groups // videos))
        order = Order(videos, passes, videos * passes // groups * groups, self._world, self.seed)
        return self._loader(
            self.train_entries, order, RequestSampler(order, self._rank), consumed=self._consumed
        )

    def val_dataloader(self) -> ClipLoader | list[Any]:
        """The same held-out clips every time, at least a batch per device; ``[]`` if none are held out."""
        if not len(self.val_entries):
            # asked for, so nothing to warn of
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        groups = self.batch_size // self.clips_per_video * self._world
        videos = len(self.val_entries)
        passes = -(-groups // videos)
        length = -(-videos * passes // self._world) * self._world
        order = Order(videos, passes, length, self._world, self.seed, shuffle=False)
        return self._loader(self.val_entries, order, RequestSampler(order, self._rank, HELD_OUT_EPOCH))

    def predict_dataloader(self) -> FootageLoader:
        """This device's share of what is tracked, each stretch from its first frame to its last."""
        assert self.source is not None
        entries = [*self.train_entries, *self.val_entries]
        return footage_loader(self.source, entries, self._rank, self._world, self.num_workers, root=self.root)

    def _loader(
        self, entries: Sequence[Entry], order: Order, requests: RequestSampler, **kwargs: Any
    ) -> ClipLoader:
        assert self.source is not None
        data = ClipDataset(
            self.source,
            entries,
            order,
            self.sampler,
            self.rule,
            seed=self.seed,
            repeats=self.clips_per_video,
            jitter=getattr(self.sampler, "jitter", None),
            flow=self.flow,
            exact=self.exact,
            pixels=self.pixels,
            root=self.root,
            tracked=self._stretches.only(self.source),
        )
        return ClipLoader(
            data,
            batch_size=self.batch_size // self.clips_per_video,
            sampler=requests,
            collate_fn=partial(collate, size=self.size),
            check=self._check_batch,
            num_workers=self.num_workers,
            seed=self.seed,
            **kwargs,
        )

    # ---- counting
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts what was used and skipped; here, because only batches that are used pass."""
        trainer = self.trainer
        if isinstance(batch, Clip) and trainer is not None:
            place = (trainer.current_epoch, trainer.global_step)
            if trainer.training:
                self.ledger.train(len(batch) // self.clips_per_video, batch.skipped, *place)
            else:
                self.ledger.held_out(batch.skipped, *place)
        return batch

    def teardown(self, stage: str) -> None:
        """Write the last epoch's sums."""
        if stage == "fit":
            self.ledger.sum_up()

    def on_exception(self, exception: BaseException) -> None:
        """Write the sums of the epoch that broke off."""
        self.ledger.sum_up()

    def state_dict(self) -> dict[str, Any]:
        """Counts so far, and what the order depends on, as plain data."""
        return {"ledger": self.ledger.state_dict(self._processed()), "order": self._order_facts()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; remembers the order for a check when the epoch goes on."""
        self.ledger.load_state_dict(state_dict["ledger"])
        self._resumed_order = state_dict["order"]

    def _order_facts(self) -> dict[str, int]:
        return {
            "videos": len(self.train_entries),
            "repeats": self.repeats,
            "clips per step": self.batch_size * self._world,
            "seed": self.seed,
        }

    def _consumed(self) -> int:
        if self.trainer is None or not self.trainer.training:
            return 0
        before, self._resumed_order = self._resumed_order, None
        return batches_used(self.trainer, before, self._order_facts())

    def _processed(self) -> int | None:
        trainer = self.trainer
        if trainer is None:
            return None
        total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def _check_batch(self, batch: Any) -> None:
        if isinstance(batch, Exhausted):
            raise self.ledger.exhausted(batch.skipped)

    # ---- settings
    def _why_rgb(self) -> str:
        """Why these settings never give planes; empty if they may."""
        if self.source_name in NO_FILMS:
            return f"source {self.source_name} has no planes"
        if self.flow is not None and not isinstance(self.flow, CachedFlow):
            kind = type(self.flow).__name__
            return f"flow {kind} has to see RGB in the workers; give the method a flow estimator instead"
        if self.sampler.span == 0 and getattr(self.sampler, "jitter", None):
            return "a gap of 0 sees one frame through two windows"
        if self.rule.antialias and all(map(self._is_averaged, self.train_entries[:_LOOKED_AT])):
            return "antialias averages the pixels in the workers, as every window shrinks; set it to false"
        return ""

    def _is_averaged(self, entry: Entry) -> bool:
        try:
            window = self.rule.draw(entry.width, entry.height, key_of(self.seed, 0, entry.path))
        except TooSmall:
            return True
        return window.factor != (1, 1)

    def _check(self) -> None:
        division = self.division
        if self.source_name == "images" and (
            self.sampler.span or division.hours or division.clip_seconds or division.start_every
        ):
            raise UserError(
                "source images: an image has one moment and no length; give --data.gap [0, 0] or"
                " a ClipSampler of frames 1, and no hours, clip_seconds or start_every"
            )
        if division.cuts == "avoid" and self.source_name in NO_FILMS:
            raise UserError(
                f"cuts avoid is for video files: set --data.cuts keep for source {self.source_name}"
            )
        if self.batch_size < 1 or self.batch_size % self.clips_per_video:
            raise UserError(
                f"batch_size {self.batch_size} must be a multiple of pairs_per_video {self.clips_per_video}"
            )
        if self.pixels not in ("rgb", "yuv"):
            raise UserError(f"pixels {self.pixels!r}: choose rgb or yuv")
        if self.repeats < 1 or self.num_workers < 0:
            raise UserError(
                f"repeats {self.repeats} must be at least 1, num_workers {self.num_workers} at least 0"
            )
        if self.flow is not None and not isinstance(self.sampler, PairSampler):
            raise UserError(f"flow is between two frames: a {type(self.sampler).__name__} draws no pairs")


def _pair(size: Sequence[int]) -> Size:
    return int(size[0]), int(size[1])


def _sampler(
    given: Sampler | None, gap: Sequence[float], jitter: float, pairs: int, spread: float | None
) -> Sampler:
    found = given or PairSampler((float(gap[0]), float(gap[1])), jitter, pairs, spread)
    if isinstance(found, PairSampler | ClipSampler | WindowSampler | TrackedFrames):
        found.check()
    return found
