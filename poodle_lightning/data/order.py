"""The order of an epoch as a pure function of (seed, epoch), a device's share, and the loader that keeps it.

Position p of an epoch belongs to device ``p mod world``; a device's i-th request is position
``i · world + rank``. The union of the devices' batches is therefore the batch of a single device with the
same global size, and a run can be continued from the number of batches that were used, with no other state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from poodle_lightning.ops.random import key_of, permutation

Request = tuple[int, int]


class Order:
    """Which item stands at which position of an epoch.

    An epoch goes over the videos in ``passes``, one permutation after the other, so that a video comes again
    only when all others have had their turn. Item ``i`` is video ``i mod videos``.

    Args:
        videos: how many there are.
        passes: over them, per epoch.
        length: positions in an epoch, over all devices; in training a multiple of ``stride``, or the devices
            would not take the same number of steps. Shorter than ``videos · passes`` leaves some out (others
            in every epoch), longer begins again from the front.
        stride: devices; a failed item is replaced by the one ``stride`` positions on, which is the next of
            the same device.
        seed: of the shuffle.
        shuffle: draw new permutations for every epoch; else the order is that of the items.
    """

    def __init__(
        self, videos: int, passes: int, length: int, stride: int = 1, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.videos, self.passes, self.length, self.stride = videos, passes, length, stride
        self.seed, self.shuffle = seed, shuffle
        self._epoch: int | None = None
        self._items = torch.arange(videos * passes)

    def item(self, epoch: int, position: int) -> int:
        """The item at a position; positions beyond the end begin again."""
        if self.shuffle and epoch != self._epoch:
            numbers = range(self.passes)
            keys = torch.stack([key_of(self.seed, "order", epoch, number) for number in numbers])
            start = torch.arange(self.passes)[:, None] * self.videos
            self._items, self._epoch = (permutation(keys, self.videos) + start).flatten(), epoch
        return int(self._items[position % self.length % len(self._items)])


class RequestSampler(DistributedSampler[Request]):
    """Requests ``(epoch, position)`` of one device.

    Being a ``DistributedSampler`` keeps Lightning from putting its own in its place, and lets it call
    ``set_epoch``.

    Args:
        order: the epoch's order.
        rank: of this device.
        epoch: fixed for held-out data (its draws never change), None follows ``set_epoch``.
    """

    def __init__(self, order: Order, rank: int = 0, epoch: int | None = None) -> None:
        super().__init__(range(order.length), num_replicas=order.stride, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.order, self.fixed_epoch = order, epoch
        self.start = 0

    def __iter__(self) -> Iterator[Request]:
        epoch = self.epoch if self.fixed_epoch is None else self.fixed_epoch
        for number in range(self.start, len(self)):
            yield epoch, number * self.order.stride + self.rank

    def __len__(self) -> int:
        """Requests of a whole epoch on this device, wherever it starts; no position is asked for twice."""
        return len(range(self.rank, self.order.length, self.order.stride))


class ClipLoader(DataLoader[Any]):
    """A loader that starts where training stands, of clips or of labelled images.

    Lightning may ask for an iterator before it has restored its counters, so the start is looked up when the
    first batch is asked for.

    Args:
        *args: of ``DataLoader``.
        consumed: batches of the current epoch that were used already.
        check: sees every batch first and may raise.
        seed: of its own generator: making an iterator must not advance the global one.
        **kwargs: of ``DataLoader``; workers stay from epoch to epoch, with one thread each, and batches are
            in page-locked memory where there is a GPU.
    """

    def __init__(
        self,
        *args: Any,
        consumed: Callable[[], int] | None = None,
        check: Callable[[Any], None] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        defaults = {
            "persistent_workers": kwargs.get("num_workers", 0) > 0,
            "worker_init_fn": single_thread,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator().manual_seed(seed),
        }
        super().__init__(*args, **{**defaults, **kwargs})
        self.consumed, self.check, self.seed = consumed, check, seed

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if isinstance(self.sampler, RequestSampler) and self.batch_size is not None:
            self.sampler.start = 0 if self.consumed is None else self.consumed() * self.batch_size
        for batch in super().__iter__():
            if self.check is not None:
                self.check(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the trainer's own count. Says to Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


def single_thread(worker: int) -> None:
    """One thread per worker: parallel over videos, never within one."""
    import cv2

    torch.set_num_threads(1)
    # 0 runs everything in the caller. 1 would join the pool's threads, which a fork does not copy: it hangs
    # for ever when the parent has used OpenCV
    cv2.setNumThreads(0)


def batches_used(trainer: Any, before: Mapping[str, int] | None, now: Mapping[str, int]) -> int:
    """Batches of the current epoch that were used: Lightning's own count, right after a restart too.

    Args:
        trainer: that is training.
        before: what the order depended on where the epoch began, if it was in another run.
        now: what it depends on; where that differs, a warning says so.
    """
    used = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    if used and before is not None and before != now:
        changed = ", ".join(
            f"{key} {before.get(key)} → {now[key]}" for key in now if before.get(key) != now[key]
        )
        rank_zero_warn(f"the epoch cannot go on as it began ({changed}): its rest is taken from a new order")
    return used
