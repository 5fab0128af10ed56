"""Figures of ``prepare``: what a run would take, and what it has gained."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    from poodle_lightning.data.cost import Cost
    from poodle_lightning.data.index import Index
    from poodle_lightning.data.info import VideoInfo
    from poodle_lightning.data.prepare import Job
    from poodle_lightning.data.prepared import Made, Settings

# Damaged samples that a forecast passes over before it gives up.
_SAMPLES_TRIED = 10


@dataclass(frozen=True)
class Plan:
    """What there is, what is to be made, and what stands already.

    Args:
        index: of the sources.
        out: folder of the prepared videos.
        settings: how they are made.
        jobs: to be done, the longest first.
        kept: what stands.
        known: all that was made before, by source.
    """

    index: Index
    out: Path
    settings: Settings
    jobs: list[Job]
    kept: list[Made]
    known: dict[str, Made]

    @property
    def infos(self) -> dict[str, VideoInfo]:
        """Videos by path."""
        return {video.path: video for video in self.index.videos}


def counted(number: int, noun: str) -> str:
    """A number and its noun: ``1 video``, ``2 videos``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def gain(plan: Plan, fresh: Sequence[Made], measured: int, pairs_per_s: float) -> tuple[str, list[Skip]]:
    """A table of size, key frames, pairs per CPU-second and cores, before and after; and what is damaged.

    Args:
        plan: of the run.
        fresh: what it has made.
        measured: on how many videos; both sides are measured on the same.
        pairs_per_s: that one GPU trains on.
    """
    from poodle_lightning.data.cost import cores_for, together

    videos = sorted((*fresh, *plan.kept), key=lambda made: made.source)
    sizes = [sum(made.bytes[i] for made in videos) for i in (0, 1)]
    gops = [sum(made.gop[i] for made in videos) / len(videos) for i in (0, 1)]
    rows = [
        ("", "before", "after", ""),
        ("size", *(_size(size) for size in sizes), f"{sizes[1] / sizes[0]:.2f} ×"),
        ("frames between key frames", *(f"{gop:.0f}" for gop in gops), ""),
    ]
    note = "lowest PSNR of the frames that were compared: " + f"{min(made.psnr for made in videos):.1f} dB"
    costs, faults = _before_and_after(plan, videos, measured)
    if costs:
        rates = together([before for before, _ in costs]), together([after for _, after in costs])
        cores = [cores_for(pairs_per_s, rate) for rate in rates]
        rows.append(
            ("pairs per CPU-second", *(f"{rate:.1f}" for rate in rates), f"{rates[1] / rates[0]:.1f} ×")
        )
        rows.append((f"cores for {pairs_per_s:g} pairs/s", *(f"{number:.1f}" for number in cores), ""))
        note += f"; pairs measured on {counted(len(costs), 'video')}, frames 0.5 to 1 s apart"
    elif faults:
        note += "; pairs per CPU-second not measured: the videos that were tried cannot be read"
    elif measured:
        note += "; pairs per CPU-second not measured: the videos that were tried are too short"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), note]), faults


def _before_and_after(
    plan: Plan, videos: Sequence[Made], most: int
) -> tuple[list[tuple[Cost, Cost]], list[Skip]]:
    """Prices of some videos and of what was made of them, where both can be had; and what is damaged."""
    from poodle_lightning.data.cost import TOO_SHORT, measure_each, spread

    chosen = [videos[place] for place in spread(len(videos), most)]
    before = measure_each([os.path.join(plan.index.root, made.source) for made in chosen])
    after = measure_each([str(plan.out / made.made) for made in chosen])
    skips = [one for one in (*before, *after) if isinstance(one, Skip)]
    pairs = [
        (old, new)
        for old, new in zip(before, after, strict=True)
        if not isinstance(old, Skip) and not isinstance(new, Skip)
    ]
    return pairs, [skip for skip in skips if skip.reason != TOO_SHORT]


def forecast(plan: Plan, workers: int) -> str:
    """What would be made, how large, and how long it would take.

    Raises:
        UserError: no sample can be re-encoded.
    """
    from poodle_lightning.data.cost import frames_per_pair

    settings, infos = plan.settings, plan.infos
    videos = [infos[job.source] for job in plan.jobs]
    lines = [
        f"{counted(len(videos), 'video')} to make, {sum(v.duration for v in videos) / 3600:.2f} h, "
        f"{_size(sum(os.path.getsize(v.path) for v in videos))}; {len(plan.kept)} are there, "
        f"{len(plan.index.refused)} cannot be read"
    ]
    if not videos:
        return lines[0]
    for (old, new), number in Counter(
        ((v.width, v.height), settings.size(v.width, v.height)) for v in videos
    ).most_common(5):
        lines.append(f"  {number} of {old[0]}x{old[1]} to {new[0]}x{new[1]}")
    sample, (per_frame, seconds), failed = _sampled(videos, settings)

    def scaled(new: bool) -> float:
        """Frames of all videos, each by its size against the sample's."""
        areas = [_area(v, settings, new) * -(-v.frames // settings.every) for v in videos]
        return sum(areas) / _area(sample, settings, new)

    free = shutil.disk_usage(
        next(path for path in (plan.out, *plan.out.absolute().parents) if path.exists())
    ).free
    busy = min(workers, len(videos), os.cpu_count() or 1)  # more than the cores are no faster
    minutes = scaled(new=False) * seconds / busy / 60
    now = frames_per_pair(max(1.0, sample.gop), sample.fps)
    then = frames_per_pair(settings.gop, sample.fps / settings.every)
    lines += [f"cannot be re-encoded: {line}" for line in failed]
    lines += [
        f"from a sample of {sample.path}:",
        f"  about {_size(scaled(new=True) * per_frame)} ({_size(free)} are free)",
        f"  about {minutes:.1f} minutes with {counted(busy, 'worker')}",
        f"  decoded frames for a pair, 0.5 to 1 s apart: {now:.0f} now, {then:.0f} then",
    ]
    return "\n".join(lines)


def _sampled(
    videos: Sequence[VideoInfo], settings: Settings
) -> tuple[VideoInfo, tuple[float, float], list[str]]:
    """The middlemost video that can be re-encoded, its bytes and seconds per frame, and what failed."""
    from poodle_lightning.data.info import DecodeError
    from poodle_lightning.data.prepare import estimate

    failed: list[str] = []
    for place in sorted(range(len(videos)), key=lambda place: abs(place - len(videos) // 2)):
        sample = videos[place]
        try:
            return sample, estimate(sample.path, settings), failed
        except DecodeError as error:
            failed.append(f"{sample.path}: {error.reason}: {error.detail}")
        except ValueError as error:
            failed.append(f"{sample.path}: not_encodable: {error}")
        if len(failed) == _SAMPLES_TRIED:
            break
    raise UserError(
        f"no forecast: {counted(len(failed), 'sample')} cannot be re-encoded, the first is {failed[0]}"
    )


def _area(video: VideoInfo, settings: Settings, new: bool) -> int:
    width, height = settings.size(video.width, video.height) if new else (video.width, video.height)
    return width * height


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
