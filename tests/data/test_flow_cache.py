"""The flow cache: what it keeps and how exactly, and every way in which a file can be bad."""

import errno
import json
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest

from poodle_lightning.data import flow_cache
from poodle_lightning.data.flow_cache import FlowCache

VIDEO, EST = "0123abcd", "DIS medium"


def affine(height, width, seed=0):
    """There and back, affine in the pixel's place, up to about ±20 px."""
    ys, xs = np.mgrid[:height, :width].astype(float)
    c = np.random.default_rng(seed).uniform(-0.1, 0.1, (4, 3)) * [1, 1, 60]
    return np.stack([a * xs + b * ys + d for a, b, d in c]).reshape(2, 2, height, width).astype(np.float32)


def rough(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 30, (2, 2, height, width)).astype(np.float32)


def test_full_resolution_is_within_a_sixteenth_of_a_pixel(tmp_path):
    cache = FlowCache(tmp_path, EST, full_resolution=True)
    flow = rough(33, 47)
    assert cache.put(VIDEO, 1.5, 2.25, flow)
    back = cache.get(VIDEO, 1.5, 2.25)
    assert back.dtype == np.float32
    assert np.abs(back - flow).max() <= 1 / 16 + 1e-5
    np.testing.assert_array_equal(back * 8, np.rint(back * 8))


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (20, 31)])
def test_half_resolution_keeps_affine_flow_inside(tmp_path, size):
    """Means of 2x2 pixels, bilinear between them: exact for affine flow, but for the rounding."""
    cache = FlowCache(tmp_path, EST)
    flow = affine(*size)
    cache.put(VIDEO, 0.0, 0.5, flow)
    back = cache.get(VIDEO, 0.0, 0.5)
    assert back.shape == flow.shape
    assert np.abs(back - flow)[..., 1:-2, 1:-2].max() <= 1 / 16 + 1e-4
    assert np.abs(back - flow).max() <= 0.5  # at the border the last value is repeated


def read_between(small):
    """Bilinear at 2 times the size, one pixel at a time; value i stands at 2i + 1/2."""
    height, width = small.shape[-2:]
    fine = np.zeros((*small.shape[:-2], 2 * height, 2 * width))
    for y in range(2 * height):
        for x in range(2 * width):
            v, u = np.clip((y - 0.5) / 2, 0, height - 1), np.clip((x - 0.5) / 2, 0, width - 1)
            j, i = min(int(v), height - 2), min(int(u), width - 2)
            b, a = v - j, u - i
            fine[..., y, x] = (1 - b) * ((1 - a) * small[..., j, i] + a * small[..., j, i + 1]) + b * (
                (1 - a) * small[..., j + 1, i] + a * small[..., j + 1, i + 1]
            )
    return fine


def means(flow):
    """Of every 2x2 pixels."""
    height, width = flow.shape[-2] // 2, flow.shape[-1] // 2
    return flow.reshape(*flow.shape[:-2], height, 2, width, 2).mean(axis=(-3, -1))


def test_half_resolution_equals_a_float64_loop(tmp_path):
    cache, flow = FlowCache(tmp_path, EST), rough(6, 10)
    cache.put(VIDEO, 0.0, 0.5, flow)
    small = means(flow.astype(float))
    for _ in range(2):
        small = small + means(flow - read_between(small))
    expected = read_between(np.rint(small * 8) / 8)
    np.testing.assert_allclose(cache.get(VIDEO, 0.0, 0.5), expected, atol=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_a_box_is_the_same_part_of_the_whole(tmp_path, full):
    cache = FlowCache(tmp_path, EST, full)
    cache.put(VIDEO, 0.0, 0.5, rough(21, 34))
    whole = cache.get(VIDEO, 0.0, 0.5)
    rng = np.random.default_rng(0)
    boxes = [(0, 0, 34, 21), (33, 20, 34, 21), (0, 0, 1, 1), (5, 3, 6, 20)]
    for _ in range(40):
        x, y = np.sort(rng.choice(35, 2, replace=False)), np.sort(rng.choice(22, 2, replace=False))
        boxes.append((x[0], y[0], x[1], y[1]))
    for x0, y0, x1, y1 in boxes:
        part = cache.get(VIDEO, 0.0, 0.5, box=(x0, y0, x1, y1))
        np.testing.assert_array_equal(part, whole[..., y0:y1, x0:x1])
    assert cache.get(VIDEO, 0.0, 0.5, box=(0, 0, 35, 21)) is None


def test_rounded_is_what_comes_back(tmp_path):
    cache, flow = FlowCache(tmp_path, EST), rough(20, 30)
    cache.put(VIDEO, 0.0, 0.5, flow)
    np.testing.assert_array_equal(cache.rounded(flow), cache.get(VIDEO, 0.0, 0.5))
    box = (3, 4, 20, 17)
    np.testing.assert_array_equal(cache.rounded(flow, box), cache.get(VIDEO, 0.0, 0.5, box=box))


def test_the_largest_flow_survives_and_differences_wrap(tmp_path):
    cache = FlowCache(tmp_path, EST, full_resolution=True)
    flow = np.full((2, 2, 4, 6), 4094.0, np.float32)
    flow[..., ::2] *= -1
    cache.put(VIDEO, 0.0, 0.5, flow)
    np.testing.assert_array_equal(cache.get(VIDEO, 0.0, 0.5), flow)


def test_smooth_flow_is_small_on_disk(tmp_path):
    cache = FlowCache(tmp_path, EST)
    cache.put(VIDEO, 0.0, 0.5, affine(256, 512))
    assert cache.path(VIDEO).stat().st_size < 2 * 2 * 256 * 512 * 4 / 20


def test_pairs_of_a_video_share_a_file_and_moments_tell_them_apart(tmp_path):
    cache = FlowCache(tmp_path, EST, full_resolution=True)
    flows = {(0.1, 0.6): rough(8, 9, 1), (0.1, 0.7): rough(8, 9, 2), (5.0, 5.5): rough(8, 9, 3)}
    assert cache.put_all(VIDEO, [(*moments, flow) for moments, flow in flows.items()])[0] == 3
    assert len(list(tmp_path.rglob("*.flow"))) == 1
    for moments, flow in flows.items():
        assert np.abs(cache.get(VIDEO, *moments) - flow).max() < 0.07
    # seconds that went through a computation come back as the same microsecond
    assert cache.get(VIDEO, 0.3 - 0.2, 0.1 * 3 + 0.3) is not None
    assert cache.get(VIDEO, 0.6, 0.1) is None
    assert cache.get("another video", 0.1, 0.6) is None


def test_a_long_video_has_a_file_per_minute(tmp_path):
    cache = FlowCache(tmp_path, EST)
    for second in (1.0, 59.0, 61.0, 3000.0):
        cache.put(VIDEO, second, second + 2, affine(8, 8))
    assert len(list(tmp_path.rglob("*.flow"))) == 3
    wanted = [(3000.0, 3002.0), (1.0, 3.0), (7.0, 8.0), (59.0, 61.0)]
    assert cache.lacking(VIDEO, wanted) == [(7.0, 8.0)]


def test_putting_again_replaces_and_keeps_the_others(tmp_path):
    cache = FlowCache(tmp_path, EST, full_resolution=True)
    for seed, start in ((0, 0.0), (1, 1.0), (2, 0.0)):
        cache.put(VIDEO, start, start + 0.5, rough(8, 9, seed))
    assert np.abs(cache.get(VIDEO, 0.0, 0.5) - rough(8, 9, 2)).max() < 0.07
    assert np.abs(cache.get(VIDEO, 1.0, 1.5) - rough(8, 9, 1)).max() < 0.07


# ---- stale
def test_another_estimator_video_size_or_version_is_missing(tmp_path, monkeypatch):
    cache = FlowCache(tmp_path, EST)
    cache.put(VIDEO, 0.0, 0.5, affine(16, 20))
    other = FlowCache(tmp_path, "RAFT large")
    assert other.get(VIDEO, 0.0, 0.5) is None
    assert other.lacking(VIDEO, [(0.0, 0.5)]) == [(0.0, 0.5)]
    assert FlowCache(tmp_path).get(VIDEO, 0.0, 0.5) is not None  # any estimator
    assert cache.get(VIDEO, 0.0, 0.5, size=(16, 20)) is not None
    assert cache.get(VIDEO, 0.0, 0.5, size=(16, 22)) is None
    os.makedirs(cache.path("b").parent, exist_ok=True)
    os.replace(cache.path(VIDEO), cache.path("b"))  # a file in another's place
    assert cache.get("b", 0.0, 0.5) is None
    os.replace(cache.path("b"), cache.path(VIDEO))
    monkeypatch.setattr(flow_cache, "VERSION", 2)
    assert cache.get(VIDEO, 0.0, 0.5) is None


def test_a_stale_file_is_replaced_not_mixed(tmp_path):
    FlowCache(tmp_path, "old").put(VIDEO, 0.0, 0.5, affine(16, 20))
    cache = FlowCache(tmp_path, EST)
    assert cache.put(VIDEO, 1.0, 1.5, affine(16, 20, 1))
    assert cache.get(VIDEO, 0.0, 0.5) is None
    assert cache.get(VIDEO, 1.0, 1.5) is not None


def test_half_resolution_is_not_good_enough_for_full(tmp_path):
    half, full = FlowCache(tmp_path, EST), FlowCache(tmp_path, EST, full_resolution=True)
    half.put(VIDEO, 0.0, 0.5, affine(16, 20))
    assert full.get(VIDEO, 0.0, 0.5) is None
    assert full.lacking(VIDEO, [(0.0, 0.5)]) == [(0.0, 0.5)]
    full.put(VIDEO, 0.0, 0.5, affine(16, 20))
    assert half.get(VIDEO, 0.0, 0.5) is not None


# ---- torn
@pytest.fixture
def stored(tmp_path):
    cache = FlowCache(tmp_path, EST)
    flows = {(float(k), k + 0.5): affine(16, 20, k) for k in range(3)}
    cache.put_all(VIDEO, [(*moments, flow) for moments, flow in flows.items()])
    return cache, {moments: cache.get(VIDEO, *moments) for moments in flows}


def whole_or_missing(cache, expected):
    found = 0
    for moments, flow in expected.items():
        back = cache.get(VIDEO, *moments)
        if back is not None:
            np.testing.assert_array_equal(back, flow)
            found += 1
    return found


def test_cut_at_any_byte_gives_a_whole_flow_or_none(stored):
    cache, expected = stored
    path = cache.path(VIDEO)
    content = path.read_bytes()
    cuts = {0, 1, 19, 20, 21, len(content) - 1} | {
        int(n) for n in np.random.default_rng(0).integers(0, len(content), 150)
    }
    for cut in cuts:
        path.write_bytes(content[:cut])
        assert whole_or_missing(cache, expected) < 3
        assert cache.lacking(VIDEO, expected)
    path.write_bytes(content)
    assert whole_or_missing(cache, expected) == 3


def test_a_flipped_bit_anywhere_gives_a_whole_flow_or_none(stored):
    cache, expected = stored
    path = cache.path(VIDEO)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    for place in [*range(24), *(int(n) for n in rng.integers(0, len(content), 150))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert whole_or_missing(cache, expected) < 3


def test_a_torn_file_is_repaired_by_the_next_put(stored):
    cache, expected = stored
    path = cache.path(VIDEO)
    path.write_bytes(path.read_bytes()[:-3])  # the last pair's block
    assert cache.lacking(VIDEO, expected) == [(2.0, 2.5)]
    assert cache.put(VIDEO, 2.0, 2.5, affine(16, 20, 2))
    assert whole_or_missing(cache, expected) == 3


def forged(entries, blocks=b""):
    text = json.dumps({"video": VIDEO, "estimator": EST, "entries": entries}).encode()
    return struct.pack("<8sIII", b"PLFLOW\r\n", 1, len(text), zlib.crc32(text)) + text + blocks


def entry(data, **changes):
    block = {"a": 0, "b": 500000, "height": 8, "width": 8, "step": 1, "place": 0}
    return block | {"length": len(data), "crc": zlib.crc32(data)} | changes


def test_a_header_that_lies_is_missing_not_an_error(tmp_path):
    """Checksums right, content wrong: as another program might write it."""
    cache = FlowCache(tmp_path, EST, full_resolution=True)
    cache.path(VIDEO).parent.mkdir(parents=True)
    right, short = zlib.compress(bytes(4 * 8 * 8 * 2)), zlib.compress(bytes(100))
    bomb, junk = zlib.compress(bytes(50_000_000)), b"no zlib"
    cache.path(VIDEO).write_bytes(forged([entry(right)], right))
    assert cache.get(VIDEO, 0.0, 0.5).shape == (2, 2, 8, 8)
    for bad in (
        forged([entry(short)], short),
        forged([entry(junk)], junk),
        forged([entry(bomb, height=1 << 15, width=1 << 15)], bomb),
        forged([entry(right, height=1 << 40)], right),
        forged([entry(right, step=0)], right),
        forged([entry(right, height=8.0)], right),
        forged([entry(right, place=-4)], right),
        forged([entry(right, place=1 << 40)], right),
        forged([entry(right, length=1 << 50)], right),
        forged([entry(right, surplus=1)], right),
        forged([entry(right, form="jpeg")], right),
        forged([entry(right, form="png")], right),
        forged([entry(right, form=1)], right),
        forged([entry(right, form=["delta"])], right),
        forged([{"a": 1}]),
        forged({"a": 1}),
        forged(None),
        struct.pack("<8sIII", b"PLFLOW\r\n", 1, 1 << 31, 0),
        b"PLFLOW\r\n",
        b"<html>not found</html>" * 10,
    ):
        cache.path(VIDEO).write_bytes(bad)
        assert cache.get(VIDEO, 0.0, 0.5) is None
        # a list of pairs must not be trusted more than the pairs
    cache.path(VIDEO).write_bytes(b"")
    assert cache.put(VIDEO, 0.0, 0.5, rough(8, 8))


# ---- writing
def test_flow_that_is_not_finite_is_left_out_with_one_warning(tmp_path):
    cache = FlowCache(tmp_path, EST)
    flow = affine(8, 8)
    broken = np.stack([flow] * 4)
    broken[:, 1, 0, 3, 3] = [np.inf, -np.inf, 5000.0, np.nan]
    with pytest.warns(RuntimeWarning, match="not finite") as caught:
        assert [cache.put(VIDEO, 0.0, 0.5, bad) for bad in broken] == [False] * 4
    assert len(caught) == 1
    assert cache.get(VIDEO, 0.0, 0.5) is None
    assert np.isnan(cache.rounded(broken[3], (2, 2, 5, 5))).sum() == 1
    assert cache.put(VIDEO, 0.0, 0.5, flow)


def test_other_shapes_and_a_cache_without_estimator_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there and back"):
        FlowCache(tmp_path, EST).put(VIDEO, 0.0, 0.5, np.zeros((2, 8, 8), np.float32))
    with pytest.raises(ValueError, match="name the estimator"):
        FlowCache(tmp_path).put(VIDEO, 0.0, 0.5, affine(8, 8))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_warns_once_and_nothing_is_left(tmp_path, monkeypatch, code):
    cache = FlowCache(tmp_path, EST)
    cache.put(VIDEO, 0.0, 0.5, affine(8, 8))
    before = cache.path(VIDEO).read_bytes()

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
        assert [cache.put(VIDEO, t, t + 0.5, affine(8, 8)) for t in (1.0, 2.0)] == [False] * 2
    assert len(caught) == 1
    assert not cache.writable
    assert cache.path(VIDEO).read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [cache.path(VIDEO).name]
    assert cache.get(VIDEO, 0.0, 0.5) is not None


def test_a_folder_that_cannot_be_made_warns_once(tmp_path):
    """Also holds for root, whom permissions do not stop: a file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    cache = FlowCache(tmp_path / "file" / "cache", EST)
    with pytest.warns(RuntimeWarning, match="cannot be") as caught:
        tries = [(cache.get(VIDEO, 0.0, 0.5), cache.put(VIDEO, 0.0, 0.5, affine(8, 8))) for _ in range(3)]
    assert tries == [(None, False)] * 3
    assert sorted({str(w.message).split("(")[0].split()[-1] for w in caught}) == ["read", "written"]
    assert len(caught) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop root")
def test_a_read_only_folder_is_read_and_warns_once(tmp_path):
    FlowCache(tmp_path, EST).put(VIDEO, 0.0, 0.5, affine(8, 8))
    cache = FlowCache(tmp_path, EST)
    folder = cache.path(VIDEO).parent
    folder.chmod(0o555)
    try:
        assert cache.get(VIDEO, 0.0, 0.5) is not None
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            assert not cache.put(VIDEO, 1.0, 1.5, affine(8, 8))
    finally:
        folder.chmod(0o755)


def test_a_missing_folder_is_empty_and_the_cache_travels_to_workers(tmp_path):
    cache = pickle.loads(pickle.dumps(FlowCache(tmp_path / "later", EST)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(VIDEO, 0.0, 0.5) is None
        assert cache.put(VIDEO, 0.0, 0.5, affine(8, 8))
