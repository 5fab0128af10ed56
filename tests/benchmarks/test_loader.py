"""The loader's benchmark on a small film: its own arithmetic, and that it notices wrong frames."""

import json

import av
import pytest
import torch
from films import FPS, film

from benchmarks import loader
from benchmarks.published.loader import frames, pair
from poodle_lightning.data.encode import write_video


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "film.mp4"
    write_video(path, film(60), FPS, gop=12, b_frames=2)
    return path


def test_published_pair_is_two_coloured_and_two_clean_crops(path):
    torch.manual_seed(0)
    found, where = pair(path, [0.3, 0.9])
    assert where.top + 512 <= where.height
    assert where.left + 1024 <= where.width
    assert [tuple(part.shape) for part in found] == [(3, 512, 1024)] * 4
    assert sum(part.numel() * part.element_size() for part in found) == loader.PUBLISHED_BYTES
    assert 0 <= found[2].min() <= found[2].max() <= 1
    with av.open(str(path)) as container:
        expected = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    for image, k in zip(frames(path, [0.3, 0.9]), (9, 27), strict=True):
        assert (image == expected[k]).all()


def test_frames_needed():
    """Key frames at 0, 12, 24, …: by counting on the fingers."""
    packets = loader.Packets(list(range(60)), [0, 12, 24, 36, 48], list(range(60)), 1 / 30)
    assert packets.needed(14, 20) == 3 + 6
    assert packets.needed(14, 26) == 3 + 3
    assert packets.needed(12, 24) == 1 + 1
    assert packets.at(14 / 30 + 0.001) == 14
    assert [packets.key_of(stamp) for stamp in (0, 11, 12, 59)] == [0, 0, 12, 48]


def test_wrong_frames_are_noticed(path, monkeypatch, tmp_path):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path))
    for pixels in ("rgb", "yuv"):
        data = loader.dataset(path, pixels, 1, 8)
        clips = loader.by_package(data, 0, 4)
        assert (clips[0].yuv is None) == (pixels == "rgb")
        assert loader.is_identical(path, data, clips)
        clips[0].frames[0, 0, ..., 5, 5] ^= 1
        assert not loader.is_identical(path, data, clips)


def test_the_whole_benchmark_on_a_file(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.published.loader.pair", lambda path, seconds: frames(path, seconds))
    assert loader.main([str(path), "--rounds", "1", "--pairs", "4", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "loader.json").read_text())["results"]["film.mp4"]
    assert all(found["identical"].values())
    assert set(found["pairs_per_cpu_s"]) == {*loader.WAYS, "published", "decoding", "in sequence"}
    assert found["megabytes_per_pair"]["published"] == pytest.approx(25.17, abs=0.01)
    assert "film.mp4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        loader.main([str(path), "--pairs", "6"])
