"""Headers of binary files: what comes back, what is damage, and that a file is whole or not there."""

import io
import os

import pytest

from poodle_lightning.data import headers

MAGIC, CONTENT = b"PLTEST\r\n", {"name": "x", "sizes": [1, 2]}


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_header_comes_back_and_the_body_is_aligned(multiple):
    packed = headers.packed(MAGIC, 3, CONTENT, multiple)
    assert len(packed) % multiple == 0
    file = io.BytesIO(packed + b"body")
    assert headers.read(file, MAGIC, 3, 1000) == (len(packed), CONTENT)
    assert file.read() == b"body"


def test_every_flipped_bit_of_a_header_is_noticed():
    packed = headers.packed(MAGIC, 3, CONTENT)
    for place in range(8 * len(packed)):
        torn = bytearray(packed)
        torn[place // 8] ^= 1 << place % 8
        with pytest.raises(headers.Damaged):
            headers.read(io.BytesIO(torn), MAGIC, 3, 1000)
    for length in range(len(packed)):
        with pytest.raises(headers.Damaged):
            headers.read(io.BytesIO(packed[:length]), MAGIC, 3, 1000)


def test_another_kind_version_or_length_is_damage():
    packed = headers.packed(MAGIC, 3, CONTENT)
    for magic, version, largest in ((b"PLOTHER\n", 3, 1000), (MAGIC, 4, 1000), (MAGIC, 3, 10)):
        with pytest.raises(headers.Damaged):
            headers.read(io.BytesIO(packed), magic, version, largest)
    with pytest.raises(headers.Damaged):
        headers.read(io.BytesIO(headers.packed(MAGIC, 3, [1, 2])), MAGIC, 3, 1000)


def test_a_file_is_put_whole_into_its_place_or_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.bin"
    headers.write(path, (b"ab", b"c"))
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o644

    def parts():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        headers.write(path, parts())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        headers.write(path, (b"other",))
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]
    assert path.read_bytes() == b"abc"
