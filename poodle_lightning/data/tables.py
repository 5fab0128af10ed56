"""Rows of tables that people write: CSV or TSV with a header, or JSON lines; each row with its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from poodle_lightning.types import UserError

Row = tuple[int, dict[str, Any]]


def rows_of(file: Path, columns: Sequence[str], said: str = "") -> Iterator[Row]:
    """Number of the line and what stands in it, row by row; other columns than those needed stay in it.

    Args:
        file: ``.jsonl``, ``.ndjson`` or ``.json`` hold JSON lines, ``.tsv`` is divided by tabs, all else by
            commas.
        columns: that must be there.
        said: before the file's name in messages, an option for instance.

    Raises:
        UserError: a column is missing, or the file cannot be read as such a table.
    """
    name = f"{said} {file}" if said else str(file)
    lines = _json if file.suffix.lower() in (".jsonl", ".ndjson", ".json") else _csv
    try:
        yield from lines(file, columns, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is no table of text ({error})") from error


def _csv(file: Path, columns: Sequence[str], name: str) -> Iterator[Row]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        # strict: else a quotation mark that is not closed swallows all lines up to the next one
        mark = "\t" if file.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(stream, delimiter=mark, strict=True)
        try:
            if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
                raise UserError(
                    f"{name}: the first line must name the columns {', '.join(columns)}; missing: "
                    f"{', '.join(missing)}"
                )
            for row in reader:
                if any(row.get(None) or ()):
                    raise UserError(
                        f"{name}, line {reader.line_num}: has more fields than columns: put text that holds "
                        "the delimiter in quotation marks"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(
                f"{name}, line {reader.line_num + 1}: is no row of a table ({error}): text that begins with "
                "a quotation mark ends with one, and those within it are doubled"
            ) from error


def _json(file: Path, columns: Sequence[str], name: str) -> Iterator[Row]:
    form = ", ".join(f'"{column}": …' for column in columns)
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{name}, line {number}: is no JSON ({error.msg}); one row a line") from error
            if not isinstance(row, dict) or not set(columns) <= row.keys():
                raise UserError(f"{name}, line {number}: must be {{{form}}}")
            yield number, row
