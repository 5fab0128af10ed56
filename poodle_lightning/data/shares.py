"""Which part of a data set one of several processes works on, when they share nothing but the list of videos.

A video is in one share only: two writers of one video's files would undo each other's work.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from poodle_lightning.types import UserError

# A launcher's own rank comes before SLURM's: inside a job step that starts one launcher per node, SLURM
# counts nodes while RANK counts processes. Of SLURM's, the size of the *step*, which srun sets: a batch
# script without srun is one process, though SLURM_PROCID is 0 and SLURM_NTASKS what the job may start.
_COUNTED = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
_MOST = 100_000  # shares; every process makes the list of all


@dataclass(frozen=True)
class Share:
    """One of ``count`` shares.

    Args:
        number: from 1 to ``count``.
        count: how many there are.
        origin: who said so, for messages; empty if there is nothing to share.

    Raises:
        ValueError: no such share.
    """

    number: int = 1
    count: int = 1
    origin: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"there is no share {self.number} of {self.count}")

    @classmethod
    def find(cls, flag: str | None, environment: Mapping[str, str]) -> Self:
        """The share of this process.

        A flag comes first, then ``RANK`` of ``WORLD_SIZE`` (torchrun and others), then ``SLURM_PROCID`` of
        ``SLURM_STEP_NUM_TASKS`` (srun); both are needed, and they count from 0. Without any of them all is
        one share.

        Args:
            flag: ``i/n``, i from 1 to n; None if it was not given.
            environment: ``os.environ``.

        Raises:
            UserError: not such a share, or of more than 100 000.
        """
        if flag is not None:
            found = re.fullmatch(r"(\d+)/(\d+)", flag)
            if not found or not 1 <= int(found[1]) <= int(found[2]) <= _MOST:
                raise UserError(
                    f"--shard {flag}: give i/n with i from 1 to n, e.g. 1/4 … 4/4, and n at most {_MOST}"
                )
            return cls(int(found[1]), int(found[2]), "--shard")
        for rank, size in _COUNTED:
            if environment.get(rank) and environment.get(size):
                number, count = environment[rank], environment[size]
                if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) <= _MOST):
                    raise UserError(
                        f"{rank}={number} of {size}={count} is no share: mend them or give --shard i/n"
                    )
                return cls(int(number) + 1, int(count), f"{rank} and {size}")
        return cls()

    def of(self, weights: Mapping[str, float]) -> list[str]:
        """The names in this share, sorted; see :func:`split`."""
        return split(weights, self.count)[self.number - 1]

    def __str__(self) -> str:
        return f"share {self.number} of {self.count}"


def split(weights: Mapping[str, float], count: int) -> list[list[str]]:
    """Share out names so that every share weighs about the same.

    The heaviest first, each to the share that is the lightest so far (Graham 1969, "Bounds on Multiprocessing
    Timing Anomalies": the heaviest share is at most 4/3 - 1/(3 count) of the best possible one). It depends
    on names and weights alone, not on their order, so all processes find the same shares without talking.

    Args:
        weights: of names, e.g. seconds of video by path; not negative.
        count: how many shares.

    Returns:
        ``count`` lists, each sorted; every name is in exactly one.

    Raises:
        ValueError: no share, or a weight that is negative or not a number.
    """
    if count < 1:
        raise ValueError(f"there must be a share, not {count}")
    if not all(weight >= 0 for weight in weights.values()):
        raise ValueError("weights must not be negative")
    shares: list[list[str]] = [[] for _ in range(count)]
    loads: list[tuple[float, int, int]] = [(0.0, 0, number) for number in range(count)]
    for name in sorted(weights, key=lambda name: (-weights[name], name)):
        weight, names, number = heapq.heappop(loads)
        shares[number].append(name)
        heapq.heappush(loads, (weight + weights[name], names + 1, number))
    return [sorted(share) for share in shares]
