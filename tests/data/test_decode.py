"""Frames against a sequential decode of the whole file, and what reading them costs."""

import os
import struct
import subprocess
import sys
import textwrap
from fractions import Fraction

import av
import numpy as np
import pytest
from films import FPS, H, N, W, film, remux, sequential

from poodle_lightning.data.decode import DecodeError, VideoReader, probe
from poodle_lightning.data.decoding import Decoding
from poodle_lightning.data.encode import write_video


def assert_frames_equal(path, reads=25, seed=0):
    """Random reads of one to three frames with random boxes are the frames of the sequential decode."""
    times, frames, clock = sequential(path)
    rng = np.random.default_rng(seed)
    height, width = frames[0].shape[:2]
    with VideoReader(path) as reader:
        for _ in range(reads):
            asked = rng.uniform(0, times[-1], rng.integers(1, 4))
            x0, y0 = rng.integers(0, width), rng.integers(0, height)
            x1, y1 = rng.integers(x0 + 1, width + 1), rng.integers(y0 + 1, height + 1)
            pixels, actual = reader.read(list(asked), (int(x0), int(y0), int(x1), int(y1)))
            for image, time, wanted in zip(pixels, actual, asked, strict=True):
                k = int(np.searchsorted(times, np.round(wanted / clock) * clock - clock / 4))
                assert time == pytest.approx(times[k], abs=1e-9)
                np.testing.assert_array_equal(image, frames[k][y0:y1, x0:x1])
    return times


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_video(path, film(), FPS, gop=12)
    return path


CODINGS = {
    "all intra": ("a.mp4", {"gop": 1}),
    "gop 12 without B-frames": ("a.mp4", {"gop": 12, "b_frames": 0}),
    "gop 12 with B-frames": ("a.mp4", {"gop": 12, "b_frames": 3}),
    "one key frame": ("a.mp4", {"gop": 600}),
    "matroska": ("a.mkv", {"gop": 12}),
    "transport stream": ("a.ts", {"gop": 12}),
    "transport stream, one key frame": ("a.ts", {"gop": 600}),
    "program stream": ("a.mpg", {"codec": "mpeg2video", "gop": 15}),  # of 12, FFmpeg guesses a time twice
    "avi": ("a.avi", {"codec": "mpeg4"}),
    "hevc": ("a.mp4", {"codec": "libx265", "gop": 20}),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "gop": 20}),
    "rotated 90": ("a.mp4", {"rotation": 90, "gop": 12}),
    "rotated 180": ("a.mp4", {"rotation": 180, "gop": 12}),
    "rotated 270": ("a.mov", {"rotation": 270, "gop": 12}),
    "10 bit": ("a.mp4", {"pix_fmt": "yuv420p10le"}),
    "4:4:4": ("a.mp4", {"pix_fmt": "yuv444p"}),
    "4:2:2": ("a.mp4", {"pix_fmt": "yuv422p"}),
}


@pytest.mark.parametrize("name", CODINGS)
def test_frames_are_those_of_a_sequential_decode(tmp_path, name):
    file, options = CODINGS[name]
    write_video(tmp_path / file, film(), FPS, **options)
    times = assert_frames_equal(tmp_path / file)
    assert len(times) == N


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_variable_frame_rate(tmp_path, suffix):
    steps = np.random.default_rng(1).choice([0.001, 0.02, 0.033, 0.2, 1.1], N - 1)
    times = np.concatenate([[0.0], np.cumsum(steps)])
    path = tmp_path / f"v.{suffix}"
    write_video(path, film(), FPS, times=list(times), gop=20)
    np.testing.assert_allclose(assert_frames_equal(path), times, atol=1e-3)
    assert probe(path).duration == pytest.approx(times[-1], abs=1e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_time_counts_from_the_start_of_the_stream(tmp_path, good, suffix):
    with av.open(str(good)) as container:
        ticks = 3 * container.streams.video[0].time_base.denominator
    moved = remux(good, tmp_path / f"late.{suffix}", shift=ticks)
    info = probe(moved)
    assert info.start >= 2.99
    assert info.duration == pytest.approx((N - 1) / FPS, abs=1e-3)
    with VideoReader(good) as a, VideoReader(moved) as b:
        np.testing.assert_array_equal(a.read([0.0, 0.7, 1.4])[0], b.read([0.0, 0.7, 1.4])[0])


def test_kth_frame_is_at_k_over_fps_whatever_the_clock(tmp_path, good):
    for path in (good, remux(good, tmp_path / "ms.mkv")):  # matroska rounds to milliseconds
        _, frames, _ = sequential(path)
        with VideoReader(path) as reader:
            pixels, _ = reader.read([k / FPS for k in range(N)])
        np.testing.assert_array_equal(pixels, np.stack(frames))


def test_between_two_frames_the_later_is_read(good):
    with VideoReader(good) as reader:
        _, actual = reader.read([10.4 / FPS, 10.0 / FPS, 10.6 / FPS])
    np.testing.assert_allclose(actual, [11 / FPS, 10 / FPS, 11 / FPS], atol=1e-9)


def test_rotation_turns_as_a_display_matrix_says(tmp_path):
    """A display matrix maps the stored (x, y) to (a·x + c·y, b·x + d·y): a coloured corner shows where."""
    image = np.full((H, W, 3), 40, np.uint8)
    image[:16, :16] = (220, 30, 30)  # stored at the top left
    one = 1 << 16
    # 90° clockwise, as a phone held upright writes it: (x, y) → (−y, x); the corner comes to the top right
    matrix = [0, one, 0, -one, 0, 0, 0, 0, 1 << 30]
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.set_display_matrix(matrix)
        for k in range(5):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with VideoReader(path) as reader:
        assert (reader.info.width, reader.info.height, reader.info.rotation) == (H, W, 270)
        shown = reader.read([0.0])[0][0]
    assert shown.shape == (W, H, 3)
    assert shown[4, H - 4, 0] > 180
    assert shown[4, 4, 0] < 80


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63), (3, 5)])
def test_odd_sizes(tmp_path, height, width):
    """Crops against the whole, brightness against the stored plane: FFmpeg stretches the chroma here."""
    path = tmp_path / "odd.webm"
    write_video(path, film(4, height, width), FPS, codec="libvpx-vp9")
    with av.open(str(path)) as container:
        planes = [f.to_ndarray(format="gray") for f in container.decode(video=0)]
    rng = np.random.default_rng(0)
    with VideoReader(path) as reader:
        whole, _ = reader.read([k / FPS for k in range(4)])
        assert whole.shape == (4, height, width, 3)
        brightness = whole @ np.array([0.299, 0.587, 0.114])
        in_range = ((whole > 0) & (whole < 255)).all(-1)
        assert np.abs(brightness - np.stack(planes))[in_range].max() < 3
        for _ in range(20):
            x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
            x1, y1 = int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))
            part, _ = reader.read([2 / FPS], (x0, y0, x1, y1))
            np.testing.assert_array_equal(part[0], whole[2, y0:y1, x0:x1])


def test_one_frame_file(tmp_path):
    path = tmp_path / "one.mp4"
    write_video(path, film(1), FPS)
    info = probe(path)
    assert (info.frames, info.duration, info.keyframe_interval) == (1, 0.0, 0.0)
    with VideoReader(path) as reader:
        assert reader.read([0.0, 0.0])[0].shape == (2, H, W, 3)
        with pytest.raises(DecodeError) as caught:
            reader.read([0.5])
    assert caught.value.reason == "past_end"


def test_measurements(good):
    info = probe(good)
    assert (info.width, info.height, info.frames, info.rotation) == (W, H, N, 0)
    assert info.duration == pytest.approx((N - 1) / FPS)
    assert info.fps == pytest.approx(FPS)
    assert info.keyframe_interval == pytest.approx(12 / FPS)


def test_two_video_streams_the_larger_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for height, width in ((H, W), (2 * H, 2 * W)):
            stream = container.add_stream("libx264", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            streams.append(stream)
        for stream in streams:
            for k, image in enumerate(film(10, stream.height, stream.width)):
                frame = av.VideoFrame.from_ndarray(image, "rgb24")
                frame.pts = k
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with av.open(str(path)) as container:
        expected = [f.to_ndarray(format="rgb24") for f in container.decode(video=1)]
    with VideoReader(path) as reader:
        np.testing.assert_array_equal(reader.read([0.2])[0][0], expected[6])


@pytest.mark.parametrize("said", [(64, 48), (1920, 1080), (8192, 8192), (0, 0)])
@pytest.mark.parametrize("first", ["info", "read", "pieces"])
def test_a_header_of_another_size_than_the_frames(tmp_path, said, first):
    """The frames count, as for every player; the header's size is in the sample description of the MP4."""
    write_video(tmp_path / "a.mp4", film(30, 96, 128), FPS, gop=12, b_frames=2)
    _, frames, _ = sequential(tmp_path / "a.mp4")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    place = content.find(b"avc1", content.find(b"stsd")) + 4 + 24  # ISO/IEC 14496-12, VisualSampleEntry
    assert content[place : place + 4] == struct.pack(">HH", 128, 96)
    content[place : place + 4] = struct.pack(">HH", *said)
    (tmp_path / "a.mp4").write_bytes(bytes(content))
    with VideoReader(tmp_path / "a.mp4") as reader:
        if first == "read":
            np.testing.assert_array_equal(reader.read([20 / FPS])[0][0], frames[20])
        if first == "pieces":
            whole = (0, 0, 128, 96)
            found = reader.pieces([5 / FPS, 20 / FPS], [whole, whole])
            np.testing.assert_array_equal([piece.pixels for piece in found], [frames[5], frames[20]])
        assert (reader.info.width, reader.info.height) == (128, 96)
        np.testing.assert_array_equal(reader.read([3 / FPS, 17 / FPS])[0], [frames[3], frames[17]])


def test_size_change_within_the_stream_is_refused(tmp_path):
    path = tmp_path / "size.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for part, scale in enumerate((1, 2)):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = W * scale, H * scale, "yuv420p"
            encoder.time_base, encoder.options = Fraction(1, FPS), {"bf": "0"}
            packets = []
            for k, image in enumerate(film(20, H * scale, W * scale)):
                frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = k + 20 * part, Fraction(1, FPS)
                packets += encoder.encode(frame)
            for packet in packets + encoder.encode():
                packet.stream, packet.time_base = stream, Fraction(1, FPS)
                container.mux(packet)
    with VideoReader(path) as reader:
        assert reader.read([0.3])[0].shape == (1, H, W, 3)
        with pytest.raises(DecodeError) as caught:
            reader.read([1.0])
    assert caught.value.reason == "size_changed"


# -- economy


def test_bomb_is_refused_before_decoding(tmp_path):
    """200 KB of file that would become 201 MB per frame."""
    path = tmp_path / "bomb.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "crf": "40"})
        stream.width = stream.height = 8192
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((8192 * 3 // 2, 8192), np.uint8), "yuv420p")
        for k in range(3):
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    script = f"""
        import resource
        from poodle_lightning.data.decode import DecodeError, VideoReader
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        try:
            VideoReader({str(path)!r})
        except DecodeError as error:
            print(error.reason, (peak() - before) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    reason, grown = done.stdout.split()
    assert reason == "too_many_pixels"
    assert int(grown) < 60


def test_max_pixels_is_the_last_size_allowed(good):
    assert probe(good, max_pixels=H * W).width == W
    with pytest.raises(DecodeError, match="too_many_pixels"):
        probe(good, max_pixels=H * W - 1)


def _count_seeks(reader, monkeypatch):
    seeks = []
    seek = reader._seek
    monkeypatch.setattr(reader, "_seek", lambda tick: (seeks.append(tick), seek(tick))[1])
    return seeks


@pytest.mark.parametrize(
    ("pair", "expected"), [((13, 20), 1), ((13, 23), 1), ((13, 40), 2), ((0, 11), 1), ((5, 12), 2)]
)
def test_second_frame_needs_a_jump_only_past_a_key_frame(good, monkeypatch, pair, expected):
    with VideoReader(good) as reader:
        seeks = _count_seeks(reader, monkeypatch)
        reader.read([k / FPS for k in pair])
    assert len(seeks) == expected


def test_frames_that_nothing_refers_to_are_skipped_before_the_wanted_one(tmp_path, monkeypatch):
    path = tmp_path / "b.mp4"
    write_video(path, film(), FPS, gop=60, b_frames=3)
    with VideoReader(path) as reader:
        shown = []
        accept = Decoding.accept
        monkeypatch.setattr(
            Decoding, "accept", lambda run, f, tick: (shown.append(f.pts), accept(run, f, tick))[1]
        )
        reader.read([50 / FPS])
    assert len(shown) < 40  # of 51


def test_order_and_repeats_of_times_are_kept(good):
    asked = [1.5, 0.2, 1.5, 0.0, 0.2]
    with VideoReader(good) as reader:
        pixels, actual = reader.read(asked)
        for image, time, wanted in zip(pixels, actual, asked, strict=True):
            alone, when = reader.read([wanted])
            assert time == when[0]
            np.testing.assert_array_equal(image, alone[0])


def test_one_box_per_time(good):
    boxes = [(0, 0, 20, 10), (7, 3, 27, 13)]
    with VideoReader(good) as reader:
        pixels, _ = reader.read([0.5, 1.0], boxes)
        whole, _ = reader.read([0.5, 1.0])
    for image, full, (x0, y0, x1, y1) in zip(pixels, whole, boxes, strict=True):
        np.testing.assert_array_equal(image, full[y0:y1, x0:x1])


@pytest.mark.parametrize(
    ("times", "box", "words"),
    [
        ([], None, "at least one"),
        ([-0.1], None, "≥ 0"),
        ([float("nan")], None, "finite"),
        ([0.0], (0, 0, W + 1, H), "not inside"),
        ([0.0], (5, 5, 5, 9), "not inside"),
        ([0.0, 0.1], [(0, 0, 4, 4)], "1 boxes for 2"),
        ([0.0, 0.1], [(0, 0, 4, 4), (0, 0, 5, 4)], "one size"),
    ],
)
def test_wrong_arguments(good, times, box, words):
    with VideoReader(good) as reader, pytest.raises(ValueError, match=words):
        reader.read(times, box)


def test_closed_reader_says_so(good):
    reader = VideoReader(good)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read([0.0])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_no_file_stays_open(tmp_path, good):
    (tmp_path / "bad.mp4").write_text("no video")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        probe(good)
        with pytest.raises(DecodeError):
            VideoReader(tmp_path / "bad.mp4")
        with pytest.raises(DecodeError):
            VideoReader(good, max_pixels=10)
    assert len(os.listdir("/proc/self/fd")) == before
