"""AudioSet's videos: the folders that its lists of segments give their names to."""

from __future__ import annotations

from pathlib import Path

from poodle_lightning.data.sources import FolderSource, inner_path
from poodle_lightning.types import UserError

# Folders by split, without ``_segments``.
_FOLDERS = {
    "train": ("unbalanced_train", "balanced_train", "train"),
    "balanced": ("balanced_train",),
    "eval": ("eval", "val"),
    "val": ("eval", "val"),
}


class AudioSetSource(FolderSource):
    """AudioSet (Gemmeke et al. 2017): 10 s of a YouTube video each, which VITO trains on for comparison.

    Args:
        root: any folder above ``unbalanced_train_segments``, ``balanced_train_segments`` and
            ``eval_segments``, in which videos lie at any depth. ``_segments`` may be left out; what is in
            ``train`` counts as either list for training.
        split: ``train`` (both lists), ``balanced``, or ``eval``, which ``val`` is another name for.
        workers: see ``FolderSource``.

    Raises:
        UserError: there is no such split, or the layout is not there.
    """

    def __init__(self, root: str | Path, split: str = "train", workers: int = 0) -> None:
        if split not in _FOLDERS:
            raise UserError(f"split {split!r}: AudioSet has {', '.join(_FOLDERS)}")
        names = _FOLDERS[split]

        def keep(path: Path) -> bool:
            folders = inner_path(path, root).parts[:-1]
            return any(part.lower().removesuffix("_segments") in names for part in folders)

        super().__init__(root, keep, workers)
        if not self.entries:
            raise UserError(
                f"{root}: not laid out as AudioSet, no readable video below {names[0]}_segments; put the "
                "files there, or take source folder"
            )
