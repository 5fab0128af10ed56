"""A queue of keys from earlier batches, the negatives of MoCo (He et al., CVPR 2020) and its kin."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from poodle_lightning.ops.distributed import gather
from poodle_lightning.ops.geometry import island
from poodle_lightning.ops.random import key_of, normal
from poodle_lightning.types import UserError


class Queue(nn.Module):
    """The last ``size`` keys of all processes, of length 1; new ones take the place of the oldest.

    Every process has the same rows: the first are drawn from the seed, and all that comes later is gathered.
    The batch need not divide the size (facebookresearch/moco ``builder.py`` asks for it): keys go on at the
    beginning where they reach the end. The place is kept on the device, so that none is waited for.

    Both buffers are equal in all processes; a ``DistributedDataParallel`` that broadcasts buffers would send
    them at every step for nothing.

    Args:
        dims: length of a key.
        size: how many keys; 65,536 in MoCo.
        seed: of the random rows with which it begins, as MoCo's does.

    Attributes:
        rows: ``(size, dims)`` float32, the negatives; in the state dict.
        place: ``()`` int64, where the next key goes; in the state dict.

    Raises:
        UserError: ``size`` or ``dims`` is below 1.
    """

    rows: Tensor
    place: Tensor

    def __init__(self, dims: int, size: int = 65_536, seed: int = 0) -> None:
        super().__init__()
        if size < 1 or dims < 1:
            raise UserError(
                f"a queue needs at least one key of at least one number, not {size} of {dims}: set "
                "model.queue and model.out to 1 or more"
            )
        with torch.device("cpu"):  # draws are the host's, whatever the device on which the module is made
            first = normal(key_of(seed, "queue"), size * dims).view(size, dims)
        self.register_buffer("rows", normalize(first, dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Shown in the printed network."""
        return f"{self.rows.shape[1]}, size={len(self.rows)}"

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Puts keys in, those of process 0 first, then those of process 1 …; in eval mode nothing.

        Of more keys than there is room for, the last remain. Rows change in place: a loss that keeps them for
        its backward pass must have gone backward before
        (:func:`poodle_lightning.losses.contrastive.info_nce` keeps none).

        Args:
            keys: ``(n, dims)`` of any length, floating. All processes must call it, with the same shape.
        """
        if not self.training:
            return
        with island(keys.device.type):
            keys = gather(normalize(keys.to(self.rows.dtype), dim=1))
        size, count = len(self.rows), len(keys)
        # of one place twice in a call, which value stays would be left to chance
        kept = min(count, size)
        places = torch.arange(count - kept, count, device=self.place.device).add_(self.place).remainder_(size)
        self.rows.index_copy_(0, places, keys[count - kept :])
        self.place.add_(count).remainder_(size)
