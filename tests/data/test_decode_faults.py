"""Bad files: each is refused with its reason, and damaged frames are never handed out."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from films import FPS, H, N, W, film, remux, sequential

from poodle_lightning.data.decode import DecodeError, VideoReader, probe
from poodle_lightning.data.decoding import Decoding
from poodle_lightning.data.encode import write_video


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_video(path, film(), FPS, gop=12)
    return path


def _audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame) + stream.encode())


def _picture(path):
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = W, H, "rgb24", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(film(1)[0], "rgb24")
    path.write_bytes(b"".join(bytes(p) for p in encoder.encode(frame) + encoder.encode()))


def _playlist(path, good):
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{good}\n#EXT-X-ENDLIST\n")


def _cut(source, target, share):
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])


BAD = {
    "zero length": ("empty", lambda p, good: p.write_bytes(b"")),
    "text": ("not_a_video", lambda p, good: p.write_text("hello\n" * 100)),
    "web page": ("not_a_video", lambda p, good: p.write_text("<!DOCTYPE html><html><body>404</body></html>")),
    "random bytes": ("not_a_video", lambda p, good: p.write_bytes(np.random.default_rng(0).bytes(4000))),
    "picture": ("not_a_video", lambda p, good: _picture(p)),
    "play list": ("not_a_video", _playlist),
    "concat list": ("not_a_video", lambda p, good: p.write_text(f"ffconcat version 1.0\nfile '{good}'\n")),
    "first 100 bytes": ("truncated", lambda p, good: p.write_bytes(good.read_bytes()[:100])),
    "truncated, index last": ("truncated", lambda p, good: _cut(good, p, 0.7)),
    "truncated, index first": (
        "truncated",
        lambda p, good: _cut(remux(good, p.with_name("fast.mp4"), movflags="faststart"), p, 0.7),
    ),
    "audio only": ("no_video_stream", lambda p, good: _audio(p)),
    "folder": ("not_a_file", lambda p, good: p.mkdir()),
    "pipe": ("not_a_file", lambda p, good: os.mkfifo(p)),
    "dangling link": ("missing", lambda p, good: p.symlink_to(p.with_name("nowhere.mp4"))),
    "nothing": ("missing", lambda p, good: None),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.timeout(30)
def test_bad_files_are_refused_with_their_reason(tmp_path, good, name):
    reason, make = BAD[name]
    make(tmp_path / "bad.mp4", good)
    with pytest.raises(DecodeError) as caught:
        probe(tmp_path / "bad.mp4")
    assert caught.value.reason == reason
    assert caught.value.detail
    assert "\n" not in str(caught.value)


def test_a_missing_last_frame_is_a_truncation(tmp_path, good):
    """Cut exactly between two frames, nothing that is left is damaged."""
    fast = remux(good, tmp_path / "fast.mp4", movflags="faststart")
    with av.open(str(fast)) as container:
        last = max(entry.pos for entry in container.streams.video[0].index_entries)
    (tmp_path / "cut.mp4").write_bytes(fast.read_bytes()[:last])
    with pytest.raises(DecodeError, match="truncated"):
        probe(tmp_path / "cut.mp4")


def test_guessed_timestamps_are_never_taken_for_true_ones(tmp_path):
    """AVI stores no presentation times: those of B-frames come out in disorder."""
    path = tmp_path / "guess.avi"
    write_video(path, film(), FPS, gop=60, b_frames=3)
    with av.open(str(path)) as container:
        stamps = sorted(float(p.pts * p.time_base) for p in container.demux(video=0) if p.pts is not None)
    refused = 0
    with VideoReader(path) as reader:
        for stamp in stamps[1:-1]:
            try:
                _, actual = reader.read([stamp])
            except DecodeError as error:
                refused += error.reason in ("corrupt", "bad_timestamps")
            else:
                assert actual[0] == pytest.approx(stamp)
    assert refused > 0


def test_unreadable_file(tmp_path, good, monkeypatch):
    path = tmp_path / "locked.mp4"
    path.write_bytes(good.read_bytes())
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DecodeError) as caught:
        VideoReader(path)
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    "name", ["two words", "ünïcode 名", "new\nline", "x" * 251, "%d", "http:x", ":y", "-z", "bad\udcff"]
)
def test_odd_names_are_only_names(tmp_path, good, name):
    path = tmp_path / f"{name}.mp4"
    path.write_bytes(good.read_bytes())
    with VideoReader(path) as a, VideoReader(good) as b:
        np.testing.assert_array_equal(a.read([0.5])[0], b.read([0.5])[0])


def test_names_that_look_like_options_need_no_folder(tmp_path, good, monkeypatch):
    (tmp_path / "http:x.mp4").write_bytes(good.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert probe("http:x.mp4").frames == N


def _media(path):
    """Offset and length of the coded pictures in an MP4 file."""
    content = path.read_bytes()
    at = content.find(b"mdat")
    return at + 4, int.from_bytes(content[at - 4 : at], "big") - 8


def _read_all(path, times, frames, way="read"):
    """How many frames came back equal, refused, and different though nothing was said."""
    height, width = frames[0].shape[:2]
    equal = refused = silent = 0
    with VideoReader(path) as reader:
        for time, frame in zip(times, frames, strict=True):
            try:
                if way == "read":
                    pixels = reader.read([time])[0][0]
                else:
                    pixels = reader.pieces([time], [(0, 0, width, height)])[0].pixels
            except DecodeError as error:
                refused += error.reason == "corrupt"
                continue
            same = np.array_equal(pixels, frame)
            equal, silent = equal + same, silent + (not same)
    assert equal + refused + silent == len(times)
    return equal, refused, silent


@pytest.mark.parametrize("way", ["read", "pieces"])
def test_zeroed_third_is_refused_and_the_rest_still_read(tmp_path, good, way):
    times, frames, _ = sequential(good)
    start, size = _media(good)
    content = bytearray(good.read_bytes())
    third = size // 3
    content[start + third : start + 2 * third] = bytes(third)
    (tmp_path / "zeroed.mp4").write_bytes(content)
    equal, refused, silent = _read_all(tmp_path / "zeroed.mp4", times, frames, way)
    assert silent == 0
    assert refused >= N // 4
    assert equal >= N // 4


@pytest.mark.parametrize("way", ["read", "pieces"])
@pytest.mark.parametrize("flips", [3, 40])
def test_bit_flips_are_refused(tmp_path, good, flips, way):
    """FFmpeg returns patched frames and flags some of them; none of those may come out.

    A flip that leaves the stream decodable is seen by no decoder: of frames this small up to a fifth.
    """
    times, frames, _ = sequential(good)
    start, size = _media(good)
    path = tmp_path / "flipped.mp4"
    total, flagged = np.zeros(3, int), 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        content = bytearray(good.read_bytes())
        for at in rng.integers(start, start + size, flips):
            content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        total += _read_all(path, times, frames, way)
        marked = _flagged(path)
        flagged += len(marked)
        with VideoReader(path) as reader:
            for time in marked:
                with pytest.raises(DecodeError, match="corrupt"):
                    reader.read([time])
    assert flagged > 0
    assert total[1] >= flagged
    assert total[2] <= 0.2 * total.sum()


def _flagged(path):
    """Seconds of the frames that FFmpeg itself marks as damaged."""
    marked = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            try:
                marked += [
                    f.time - stream.start_time * stream.time_base for f in packet.decode() if f.is_corrupt
                ]
            except av.error.InvalidDataError:
                continue
    return [float(time) for time in marked]


class Flagged:
    """A decoded frame that says it is damaged."""

    is_corrupt = True

    def __init__(self, frame):
        self._frame = frame

    def __getattr__(self, name):
        return getattr(self._frame, name)


def _flag(monkeypatch, pts):
    """Let decoders flag the frame with this timestamp."""

    def flagging(act):
        def flagged(run):
            more = act(run)
            frames = [Flagged(f) if f.pts == pts and not isinstance(f, Flagged) else f for f in run.ready]
            run.ready.clear()
            run.ready.extend(frames)
            return more

        return flagged

    for name in ("send", "empty"):
        monkeypatch.setattr(Decoding, name, flagging(getattr(Decoding, name)))


def _is_refused(reader, time, way="read"):
    try:
        reader.pieces([time], [(0, 0, 2, 2)]) if way == "pieces" else reader.read([time])
    except DecodeError as error:
        return error.reason == "corrupt"
    return False


@pytest.mark.parametrize("way", ["read", "pieces"])
def test_frames_built_on_a_damaged_one_are_refused(tmp_path, monkeypatch, way):
    """The decoder flags the patched frame only; what refers to it is no better, up to the next key frame."""
    path = tmp_path / "p.mp4"
    write_video(path, film(), FPS, gop=12, b_frames=0)
    with VideoReader(path) as reader:
        _flag(monkeypatch, reader._origin + round(14 / FPS / reader._clock))
        refused = [k for k in range(N) if _is_refused(reader, k / FPS, way)]
    assert refused == list(range(14, 24))


@pytest.mark.parametrize(("way", "gop"), [("read", 60), ("pieces", 60), ("pieces", 5)])
def test_b_frames_are_refused_when_the_later_frame_they_refer_to_is_damaged(tmp_path, monkeypatch, way, gop):
    path = tmp_path / "b.mp4"
    write_video(path, film(), FPS, gop=gop, b_frames=3)
    with av.open(str(path)) as container:
        stamps = [p.pts for p in container.demux(video=0) if p.size]
    # a packet that is followed by one shown earlier, in the middle of the film
    k = next(k for k in range(15, N - 1) if stamps[k + 1] < stamps[k])
    shown = sorted(stamps)
    between = [j for j in range(N) if max(stamps[:k]) < shown[j] < stamps[k]]
    assert between
    with VideoReader(path) as reader:
        _flag(monkeypatch, stamps[k])
        assert not _is_refused(reader, (between[0] - 1) / FPS, way)
        assert all(_is_refused(reader, j / FPS, way) for j in [*between, between[-1] + 1])


def test_after_an_error_the_reader_goes_on(good):
    with VideoReader(good) as reader:
        with pytest.raises(DecodeError, match="past_end"):
            reader.read([0.1, 99.0])
        assert reader.read([0.1])[1][0] == pytest.approx(0.1)
