"""A few labelled images whose class is a matter of colour and brightness, for readouts in tests."""

import lightning as L
import torch
from torch.utils.data import DataLoader

from poodle_lightning.ops.random import key_of
from poodle_lightning.types import IGNORE, ClassSet, LabelledBatch

NAMES = ("dark", "red", "green", "blue")
COLOURS = torch.tensor([[20, 20, 20], [220, 40, 40], [40, 220, 40], [40, 40, 220]], dtype=torch.uint8)


def few(count=4, size=(32, 64), seed=0, start=0, label_size=None) -> LabelledBatch:
    """Blocks of 8 px of one class each; a block in ten is ignored. Labels may have another size."""
    made = torch.Generator().manual_seed(seed)
    cells = torch.randint(4, (count, size[0] // 8, size[1] // 8), generator=made)
    ignored = torch.rand(cells.shape, generator=made) < 0.1

    def blown_up(cells, size):
        return torch.nn.functional.interpolate(cells[:, None].float(), size=size)[:, 0].to(torch.uint8)

    images = COLOURS[blown_up(cells, size).long()].permute(0, 3, 1, 2).contiguous()
    noise = torch.randint(-15, 16, images.shape, generator=made)
    numbers = torch.arange(start, start + count)
    return LabelledBatch(
        images=(images.int() + noise).clamp(0, 255).to(torch.uint8),
        labels=blown_up(cells.masked_fill(ignored, IGNORE), label_size or size),
        index=numbers,
        key=torch.stack([key_of(seed, 0, int(i)) for i in numbers]),
        names=tuple(f"image{int(i)}.png" for i in numbers),
    )


def part(batch: LabelledBatch, rows: slice) -> LabelledBatch:
    return LabelledBatch(
        batch.images[rows], batch.labels[rows], batch.index[rows], batch.key[rows], batch.names[rows]
    )


class FewLabels(L.LightningDataModule):
    """Eight steps of four training images, five test images; every process takes its own part."""

    def __init__(self, groups=True, label_size=None, val_batch_size=1, ignored=False):
        super().__init__()
        self.classes = ClassSet(NAMES, {"grey": ("dark",), "colour": NAMES[1:]} if groups else {})
        self.label_size, self.val_batch_size, self.ignored = label_size, val_batch_size, ignored

    def _loader(self, batches):
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        batches = [part(few(seed=step), mine) for step in range(8)]
        if self.ignored:
            batches = [
                LabelledBatch(b.images, torch.full_like(b.labels, IGNORE), b.index, b.key, b.names)
                for b in batches
            ]
        return self._loader(batches)

    def val_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        all_of_them = few(5, seed=100, label_size=self.label_size)
        rows = range(rank, 5, world)  # unequal parts
        size = self.val_batch_size
        if world == 1:
            return self._loader([part(all_of_them, slice(i, i + size)) for i in range(0, 5, size)])
        return self._loader([part(all_of_them, slice(i, i + 1)) for i in rows])
