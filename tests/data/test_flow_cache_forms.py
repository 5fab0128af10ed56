"""The two forms in which a flow cache stores a pair: one file, one call to read both, and their limits."""

import numpy as np
import pytest

from poodle_lightning.data.flow_cache import FlowCache
from poodle_lightning.types import UserError

VIDEO, EST = "0123abcd", "DIS medium"


def affine(height, width):
    """There and back, affine in the pixel's place."""
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    there = np.stack([0.1 * xs - 0.05 * ys + 3, 0.02 * xs + 0.07 * ys - 5])
    return np.stack([there, -there])


def smooth(height, width, seed=0):
    ys, xs = np.mgrid[:height, :width].astype(float)
    c = np.random.default_rng(seed).uniform(2, 9, (4, 2))
    return np.stack([20 * np.sin(xs / a) * np.cos(ys / b) for a, b in c]).reshape(2, 2, height, width)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("form", ["delta", "jpeg"])
def test_both_forms_are_read_by_the_same_call_as_they_were_promised(tmp_path, form, full):
    writer, flow = FlowCache(tmp_path, EST, full, form, 80), smooth(33, 47).astype(np.float32)
    assert writer.put(VIDEO, 0.0, 0.5, flow)
    box = (3, 4, 20, 17)
    for reader in (writer, FlowCache(tmp_path, EST, full), FlowCache(tmp_path, None, full, "jpeg")):
        back = reader.get(VIDEO, 0.0, 0.5, size=(33, 47))
        np.testing.assert_array_equal(back, writer.rounded(flow))
        part = reader.get(VIDEO, 0.0, 0.5, box=box)
        np.testing.assert_array_equal(part, back[..., 4:17, 3:20])
        np.testing.assert_array_equal(part, writer.rounded(flow, box))
        assert reader.lacking(VIDEO, [(0.0, 0.5)]) == []
    assert 1e-3 < np.abs(back - flow).mean() < 3


def test_forms_and_qualities_share_a_file_and_quality_is_bought_by_bytes(tmp_path):
    flow, sizes, errors = smooth(64, 96).astype(np.float32), [], []
    for second, (form, quality) in enumerate([("jpeg", 30), ("jpeg", 95), ("delta", 95)]):
        cache = FlowCache(tmp_path, EST, True, form, quality)
        sizes.append(cache.put_all(VIDEO, [(float(second), second + 0.5, flow)])[1])
        errors.append(np.abs(cache.get(VIDEO, float(second), second + 0.5) - flow).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert len(list(tmp_path.rglob("*.flow"))) == 1
    assert [FlowCache(tmp_path).get(VIDEO, float(k), k + 0.5) is None for k in range(3)] == [False] * 3


def test_only_other_forms_are_named_in_the_header(tmp_path):
    """Files of before had no forms: theirs is delta, and they are read. (Their half-resolution values are
    plain means, for which nothing in a file stands: they mix with corrected ones.)"""
    cache = FlowCache(tmp_path, EST)
    cache.put(VIDEO, 0.0, 0.5, affine(16, 20))
    assert b"form" not in cache.path(VIDEO).read_bytes()
    before = cache.get(VIDEO, 0.0, 0.5)
    jpeg = FlowCache(tmp_path, EST, form="jpeg")
    jpeg.put(VIDEO, 1.0, 1.5, affine(16, 20))
    assert jpeg.path(VIDEO).read_bytes().count(b'"form":"jpeg"') == 1
    np.testing.assert_array_equal(cache.get(VIDEO, 0.0, 0.5), before)


def test_flow_that_cannot_be_stored_is_promised_as_it_is(tmp_path):
    flow = affine(8, 8)
    flow[0, 0, 0, 0] = np.nan
    cache = FlowCache(tmp_path, EST, form="jpeg")
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert not cache.put(VIDEO, 0.0, 0.5, flow)
    np.testing.assert_array_equal(cache.rounded(flow), flow)


def test_unknown_forms_and_qualities_are_refused(tmp_path):
    with pytest.raises(UserError, match="'png': choose one of delta, jpeg"):
        FlowCache(tmp_path, EST, form="png")
    for quality in (0, 101):
        with pytest.raises(UserError, match="1 to 100"):
            FlowCache(tmp_path, EST, form="jpeg", quality=quality)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("size", [(1, 4000), (2, 4000), (4000, 1)])
def test_a_jpeg_of_noise_in_one_row_is_not_taken_for_damaged(tmp_path, size, full):
    """A JPEG stores blocks of 8x8, so a row has the bytes of eight."""
    flow = np.random.default_rng(0).uniform(-9, 9, (2, 2, *size)).astype(np.float32)
    cache = FlowCache(tmp_path, EST, full, "jpeg", 100)
    assert cache.put(VIDEO, 0.0, 0.5, flow)
    np.testing.assert_array_equal(cache.get(VIDEO, 0.0, 0.5), cache.rounded(flow))


@pytest.mark.parametrize("form", ["delta", "jpeg"])
def test_the_largest_flow_with_an_edge_stays_near_at_half_resolution(tmp_path, form):
    """The values overshoot at an edge, by less than its height."""
    cache, flow = FlowCache(tmp_path, EST, form=form), np.full((2, 2, 16, 24), -4094.0, np.float32)
    flow[..., 11:] = 4094.0
    assert cache.put(VIDEO, 0.0, 0.5, flow)
    off = np.abs(cache.get(VIDEO, 0.0, 0.5) - flow)
    assert off.max() <= 4094 * 1.1
    assert off[..., :6].max() < 100
    assert off[..., 16:].max() < 100
