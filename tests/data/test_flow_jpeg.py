"""Flow as JPEG: the bounds that rounding sets, and bytes that are not such a flow."""

import struct

import cv2
import numpy as np
import pytest

from poodle_lightning.data.flow_jpeg import decode, encode

SIZE = (48, 80)


def smooth(seed=0, scale=30.0, size=SIZE):
    knots = np.random.default_rng(seed).normal(0, scale, (4, 5, 6)).astype(np.float32)
    planes = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_CUBIC) for plane in knots]
    return np.stack(planes).reshape(2, 2, *size)


def ranges(flow):
    """Maximum minus minimum of each field and component, ``(2, 2, 1, 1)``."""
    return flow.max(axis=(2, 3), keepdims=True) - flow.min(axis=(2, 3), keepdims=True)


def test_at_quality_100_only_rounding_is_lost():
    """In steps of range / 255: to bytes and back from them 1/2 each; 64 coefficients of a block by 1/2 each,
    which is at most 4 in one pixel and 1/2 in the mean square, for the transform keeps lengths."""
    for seed in range(3):
        flow = smooth(seed)
        off = np.abs(decode(encode(flow, 100), SIZE) - flow) / (ranges(flow) / 255)
        assert off.max() <= 5.1
        assert np.sqrt((off**2).mean()) <= 1.5


def test_the_picture_spans_its_range_and_is_within_half_a_step(monkeypatch):
    """What is compressed: minimum at 0, maximum at 255, and range / 510 off at most."""
    flow, pictures, imencode = smooth(), [], cv2.imencode
    monkeypatch.setattr(
        cv2, "imencode", lambda kind, grey, flags: pictures.append(grey) or imencode(kind, grey, flags)
    )
    encode(flow)
    grey = np.stack(pictures).reshape(2, 2, *SIZE)
    assert (grey.min(axis=(2, 3)) == 0).all()
    assert (grey.max(axis=(2, 3)) == 255).all()
    back = flow.min(axis=(2, 3), keepdims=True) + grey * (ranges(flow) / 255.0)
    assert (np.abs(back - flow) <= ranges(flow) / 510 + 1e-4).all()


def test_higher_quality_is_nearer_and_larger():
    flow = smooth()
    packed = [encode(flow, quality) for quality in (10, 50, 75, 95, 100)]
    errors = [np.abs(decode(data, SIZE) - flow).mean() for data in packed]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 5
    lengths = [len(data) for data in packed]
    assert lengths == sorted(lengths)


def test_each_component_has_its_own_range():
    flow = smooth() * np.array([1000.0, 1e-3, 1.0, 1e-2], np.float32).reshape(2, 2, 1, 1)
    off = np.abs(decode(encode(flow, 100), SIZE) - flow)
    assert (off.max(axis=(2, 3), keepdims=True) <= 5.1 * ranges(flow) / 255 + 1e-6).all()


def test_constant_flow_is_exact():
    flow = np.empty((2, 2, *SIZE), np.float32)
    flow[0, 0], flow[0, 1], flow[1, 0], flow[1, 1] = 12.34, 0.0, -3.3, 4000.0
    for step in (1, 2):
        np.testing.assert_allclose(decode(encode(flow, 75, step), SIZE, step), flow, rtol=1e-6)


def test_the_smallest_ranges_are_taken_as_constant():
    """255 / range would be infinite as float32, and 0 times it NaN."""
    for span in (1e-45, 1e-38, 1e-31):
        flow = np.zeros((2, 2, *SIZE), np.float32)
        flow[..., ::2] = span
        with np.errstate(all="raise", under="ignore"):
            back = decode(encode(flow), SIZE)
        assert np.abs(back).max() <= 1.01 * np.float32(span)


def test_a_jpeg_that_asks_to_be_turned_is_not():
    """An Exif block that says orientation 6, a quarter turn, changes no pixel."""
    size = (48, 48)
    data = encode(smooth(size=size))
    tiff = b"MM\x00*\x00\x00\x00\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    exif = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(tiff)) + b"Exif\x00\x00" + tiff
    turned, place = b"", 0
    for _ in range(4):
        low, high, length = struct.unpack_from("<ffI", data, place)
        image = data[place + 12 : place + 12 + length]
        turned += struct.pack("<ffI", low, high, length + len(exif)) + image[:2] + exif + image[2:]
        place += 12 + length
    image = cv2.imdecode(np.frombuffer(turned[12:], np.uint8), cv2.IMREAD_GRAYSCALE)
    plain = cv2.imdecode(np.frombuffer(data[12:], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert (image != plain).any()  # who does not refuse it, turns
    np.testing.assert_array_equal(decode(turned, size), decode(data, size))


@pytest.mark.parametrize("size", [(48, 80), (33, 47)])
def test_half_resolution_reads_between_its_values(size):
    flow = smooth(size=size, scale=10.0)
    back = decode(encode(flow, 100, 2), size, 2)
    assert back.shape == flow.shape
    assert back.dtype == np.float32
    assert np.abs(back - flow).mean() < 0.5
    part = decode(encode(flow, 100, 2), size, 2, (3, 5, 30, 22))
    np.testing.assert_array_equal(part, back[..., 5:22, 3:30])


def test_bytes_that_are_no_such_flow_are_refused():
    flow = smooth()
    data = encode(flow, 90)
    other = encode(smooth(size=(48, 88)), 90)
    huge = bytearray(data)
    at = data.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # a frame header that asks for 4 GB
    for bad in (b"", data[:8], data[:40], data[: len(data) // 2], other, bytes(huge), b"\x00" * len(data)):
        with pytest.raises(ValueError, match=r"JPEG|early"):
            decode(bad, SIZE)
    junk = b"".join(
        struct.pack("<ffI", 0.0, 1.0, 30) + b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x30\x00\x50" + bytes(19)
        for _ in range(4)
    )
    with pytest.raises(ValueError, match="JPEG"):
        decode(junk, SIZE)
    with pytest.raises(ValueError, match="not inside"):
        decode(data, SIZE, 1, (0, 0, 81, 48))


def test_settings_out_of_range_are_refused():
    for quality in (0, 101):
        with pytest.raises(ValueError, match="quality"):
            encode(smooth(), quality)
    with pytest.raises(ValueError, match="65500"):
        encode(np.zeros((2, 2, 1, 65501), np.float32))
