"""Whole videos, frame by frame: their times, chunks, sizes; shares; what cannot be gone through."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from films import FPS, H, N, W, film, sequential

from poodle_lightning.data import footage as data_footage
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.footage import footage_loader, footage_of
from poodle_lightning.data.info import DecodeError, fingerprint
from poodle_lightning.data.sources import Entry, FilmSource, FolderSource
from poodle_lightning.data.split import segments
from poodle_lightning.data.streets import StreetSet, SyntheticSource
from poodle_lightning.data.synthetic import Street
from poodle_lightning.types import UserError


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "index"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A film of uneven times, with B-frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    times = [k / FPS + (0.01 if k % 3 == 1 else 0.0) for k in range(N)]
    write_video(path, film(), FPS, times=times, gop=12, b_frames=2)
    return path


def whole(source, root=None, **kwargs):
    (only,) = footage_of(source, source.entries, root, **kwargs)
    return only


def joined(stretch, **kwargs):
    """All frames once; consecutive chunks must share one."""
    chunks = list(stretch.chunks(**kwargs))
    for before, after in pairwise(chunks):
        np.testing.assert_array_equal(before[-1], after[0])
    return np.concatenate([chunks[0][:1], *(chunk[1:] for chunk in chunks)]), len(chunks)


@pytest.mark.parametrize("chunk", [3 * H * W, 7 * 3 * H * W, 1e9])
def test_every_frame_once_at_its_own_time(path, monkeypatch, chunk):
    monkeypatch.setattr(data_footage, "_CHUNK_BYTES", chunk)
    times, frames, _ = sequential(path)
    with whole(FilmSource(path), str(path)).opened() as stretch:
        found, count = joined(stretch)
    np.testing.assert_allclose(stretch.times, times, atol=1e-9)
    np.testing.assert_array_equal(found, frames)
    assert count == {3 * H * W: N - 1, 7 * 3 * H * W: 9}.get(chunk, 2)


def test_one_frame_of_so_many(path):
    times, frames, _ = sequential(path)
    with whole(FilmSource(path)).opened(every=7) as stretch:
        found, _ = joined(stretch)
    np.testing.assert_allclose(stretch.times, times[::7], atol=1e-9)
    np.testing.assert_array_equal(found, frames[::7])


def test_a_stretch_has_the_frames_within_it_at_times_of_the_video(path):
    source = FilmSource(path)
    times, frames, _ = sequential(path)
    for part in segments(source.entries, 0.5):
        (one,) = footage_of(source, [part], str(path))
        assert one.name == f"film.mp4#{round(part.start * 1e3)}-{round(part.stop * 1e3)}"
        with one.opened() as stretch:
            found, _ = joined(stretch)
        inside = (times >= part.start - 1e-6) & (times <= part.stop + 1e-6)
        np.testing.assert_allclose(stretch.times, times[inside], atol=1e-9)
        np.testing.assert_array_equal(found, np.stack(frames)[inside])


def test_larger_frames_are_reduced_to_the_short_side(path):
    with whole(FilmSource(path)).opened() as stretch:
        assert next(stretch.chunks(24)).shape[1:] == (24, 32, 3)
    with whole(FilmSource(path)).opened() as stretch:
        small, first = next(stretch.chunks(24))[0], next(stretch.chunks())[0].astype(float)
        means = first.reshape(24, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(small - means).max() <= 0.51
        assert next(stretch.chunks(48)).shape[1:] == (48, 64, 3)
        assert next(stretch.chunks(500)).shape[1:] == (48, 64, 3)  # never enlarged


def test_generated_streets_have_a_frame_rate_and_their_exact_flow():
    source = SyntheticSource(StreetSet(1, 0.4, (32, 64), seed=5))
    street = Street(5, (32, 64))
    with whole(source).opened() as stretch:
        np.testing.assert_allclose(stretch.times, [0, 0.1, 0.2, 0.3, 0.4])
        frames, _ = joined(stretch)
        flows = list(stretch.exact())
    np.testing.assert_array_equal(frames[3], street.read([stretch.times[3]])[0][0])
    assert len(flows) == 4
    np.testing.assert_array_equal(flows[2][0], street.flow(*stretch.times[2:4].tolist())[0])
    np.testing.assert_array_equal(flows[2][1], street.flow(*stretch.times[3:1:-1].tolist())[0])


def test_films_know_no_flow(path):
    with whole(FilmSource(path)).opened() as stretch, pytest.raises(UserError, match="take an estimator"):
        next(stretch.exact())


def test_what_has_one_frame_or_is_damaged_or_gone(path, tmp_path):
    write_video(tmp_path / "one.mp4", film(1), FPS)
    with pytest.raises(DecodeError, match="too_short"), whole(FilmSource(tmp_path / "one.mp4")).opened():
        pass
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(path.read_bytes())
    source = FilmSource(torn)
    content = bytearray(torn.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 400] = bytes(400)
    torn.write_bytes(content)
    with pytest.raises(DecodeError), whole(source).opened():
        pass
    torn.unlink()
    with pytest.raises(DecodeError, match="missing"), whole(source).opened():
        pass


@pytest.mark.parametrize("world", [1, 3, 8])
def test_every_stretch_is_in_one_share_of_about_equal_length(world):
    entries = [Entry(k, f"{k}.mp4", 0.0, 1.0 + k, 8, 8, 0.1) for k in range(7)]
    loaders = [footage_loader(None, entries, rank, world, 2, None) for rank in range(world)]
    given = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(share) for share in given]
    assert given.count([None]) == max(world - 7, 0)  # a process without a stretch still has a step
    shares = [[one for one in share if one is not None] for share in given]
    names = Counter(one.name for share in shares for one in share)
    assert len(names) == names.total() == 7
    assert {one.workers for share in shares for one in share} == {2}
    lengths = [sum(one.entry.duration for one in share) for share in shares]
    assert max(lengths) <= 1.34 * max(28 / world, 7.0)


def test_the_fingerprint_is_that_of_the_indexed_content(path, tmp_path):
    (tmp_path / "a.mp4").write_bytes(path.read_bytes())
    (tmp_path / "b.mp4").write_bytes(path.read_bytes())
    source = FolderSource(tmp_path)
    a, b = footage_of(source, source.entries, str(tmp_path))
    assert (a.name.partition("#")[0], b.name.partition("#")[0]) == ("a.mp4", "b.mp4")
    assert a.fingerprint() == b.fingerprint() == fingerprint(str(path))
