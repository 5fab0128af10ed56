"""Binary files of one kind: a JSON header with a checksum in front of the body, written whole or not at all.

::

    magic, version, length and CRC-32 of the header        little endian, 20 bytes
    header: JSON
    body

A file is written beside its place, flushed to disk and renamed: a reader sees the old one or the new one.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

_HEAD = struct.Struct("<8sIII")


class Damaged(Exception):
    """A file, or part of one, that must not be used."""


def packed(magic: bytes, version: int, content: Mapping[str, Any], multiple: int = 1) -> bytes:
    """A header.

    Args:
        magic: 8 bytes that name the kind of file.
        version: of its layout.
        content: plain data.
        multiple: the header is filled with spaces until the body starts at a multiple of so many bytes.
    """
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(_HEAD.size + len(text)) % multiple)
    return _HEAD.pack(magic, version, len(text), zlib.crc32(text)) + text


def read(file: IO[bytes], magic: bytes, version: int, largest: int) -> tuple[int, dict[str, Any]]:
    """Where the body starts, and what the header says.

    Args:
        file: at its start.
        magic: that is expected.
        version: that is expected.
        largest: bytes; a bound on what a damaged length makes us read.

    Raises:
        Damaged: it is torn, or of another kind or version.
        OSError: it cannot be read.
    """
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise Damaged
    found, its_version, length, crc = _HEAD.unpack(head)
    if found != magic or its_version != version or length > largest:
        raise Damaged
    text = file.read(length)
    if len(text) < length or zlib.crc32(text) != crc:
        raise Damaged
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Damaged from error
    if not isinstance(content, dict):
        raise Damaged
    return _HEAD.size + length, content


def write(path: Path, parts: Iterable[bytes]) -> None:
    """Put a file into its place, whole; its folder is made.

    Raises:
        OSError: the disk refuses; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private; these are shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
