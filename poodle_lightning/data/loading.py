"""What the data modules share: the devices they serve, and the two orders in which items are taken."""

from __future__ import annotations

import lightning as L

from poodle_lightning.data.order import Order
from poodle_lightning.types import UserError


class SharedDataModule(L.LightningDataModule):
    """Knows its devices, and where training stands in the epoch."""

    @property
    def _world(self) -> int:
        """Devices that take part."""
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        """Number of this device."""
        return 0 if self.trainer is None else self.trainer.global_rank

    def _consumed(self) -> int:
        """Batches of this epoch that were used: Lightning's own count, right after a restart too."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def whole_batches(items: int, batch: int, devices: int, seed: int, passes: int = 1) -> Order:
    """A training epoch: shuffled, of whole batches on all devices, at least one.

    Args:
        items: how many there are.
        batch: items per device and step.
        devices: that take part.
        seed: of the order.
        passes: over the items, unless a single batch takes more.
    """
    together = batch * devices
    passes = max(passes, -(-together // items))
    return Order(items, passes, items * passes // together * together, devices, seed)


def each_once(items: int, devices: int, what: str) -> Order:
    """Every item exactly once over all devices, in its place.

    Args:
        items: how many there are.
        devices: that take part.
        what: is counted, and where, for the message.

    Raises:
        UserError: there are fewer items than devices.
    """
    if items < devices:
        raise UserError(f"{what} for {devices} devices: use at most {items} devices")
    return Order(items, 1, items, devices, shuffle=False)
