"""``metrics.csv``: one row per logged step, in the run folder, complete on disk after every row."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from poodle_lightning.callbacks.checkpoints import write_atomically

_FIRST = ("epoch", "step")


class MetricsFile(Logger):
    """Writes metrics to ``<folder>/metrics.csv``; goes on in an existing file.

    Rows of one step are joined. A value that was not logged at a step is an empty cell. Lightning's own
    CSV logger deletes the rows of the run that is resumed, hence this one.

    Args:
        folder: the run folder; the file is made at the first row.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._columns: list[str] = []
        self._last: dict[str, str] = {}
        self._last_at = 0  # byte offset of the last row
        self._opened = False

    @property
    def name(self) -> str:
        """Empty: the run folder is already the run's own."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as the name."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._folder / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds values to the row of a step and writes it."""
        self._open()
        number = str(int(self._last.get("step", -1)) + 1 if step is None else step)
        joined = self._last.get("step") == number
        row = {"step": number, **{name: _text(value) for name, value in metrics.items()}}
        self._last = {**self._last, **row} if joined else row
        if any(name not in self._columns for name in row) or not self.path.is_file():
            rows = self._read()
            self._write([*(rows[:-1] if joined else rows), self._last])
            return
        with self.path.open("r+", newline="") as file:
            file.seek(self._last_at if joined else self.path.stat().st_size)
            self._last_at = file.tell()
            file.truncate()
            csv.DictWriter(file, self._columns, restval="").writerow(self._last)

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Forgets rows from ``step`` on: an interrupted attempt wrote them after its checkpoint."""
        self._open()
        rows = self._read()
        kept = [row for row in rows if int(row["step"]) < step]
        if len(kept) < len(rows):
            self._write(kept)

    def _open(self) -> None:
        if not self._opened:
            self._opened = True
            rows = self._read()
            if rows:
                self._write(rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
        return [{name: value for name, value in row.items() if name and value} for row in rows]

    def _write(self, rows: list[dict[str, str]]) -> None:
        names = set(self._columns).union(*rows)
        self._columns = [name for name in _FIRST if name in names] + sorted(names.difference(_FIRST))

        def write(part: Path) -> None:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns, restval="")
                writer.writeheader()
                for row in rows:
                    file.flush()
                    self._last_at = file.tell()
                    writer.writerow(row)

        write_atomically(self.path, write)
        self._last = rows[-1] if rows else {}


def _text(value: Any) -> str:
    number = value.item() if hasattr(value, "item") else value
    return f"{number:.8g}" if isinstance(number, float) else str(number)
