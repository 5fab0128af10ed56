"""Pieces of frames against a sequential decode, as RGB and as planes, and what they spare the decoder."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from films import FPS, H, N, W, film, remux, sequential

from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.decoding import Decoding
from poodle_lightning.data.encode import write_video
from poodle_lightning.ops.planes import planes_to_rgb

CODINGS = {
    "all intra": ("a.mp4", {"gop": 1}),
    "gop 5 without B-frames": ("a.mp4", {"gop": 5, "b_frames": 0}),
    "gop 5 with B-frames": ("a.mp4", {"gop": 5, "b_frames": 3}),
    "gop 12 with B-frames": ("a.mov", {"gop": 12, "b_frames": 3}),
    "one key frame": ("a.mp4", {"gop": 600}),
    "matroska": ("a.mkv", {"gop": 5}),
    "transport stream": ("a.ts", {"gop": 5}),
    "avi": ("a.avi", {"codec": "mpeg4"}),
    "hevc": ("a.mp4", {"codec": "libx265", "gop": 5}),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "gop": 5}),
    "av1": ("a.mp4", {"codec": "libsvtav1", "gop": 12}),
    "rotated 90": ("a.mp4", {"rotation": 90, "gop": 5}),
    "10 bit": ("a.mp4", {"pix_fmt": "yuv420p10le", "gop": 5}),
    "4:4:4": ("a.mp4", {"pix_fmt": "yuv444p", "gop": 5}),
}


def random_box(rng, width, height):
    x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
    return x0, y0, int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))


def as_rgb(piece, box):
    """A piece's box as ``(h, w, 3)`` RGB, as ``Clip.unit`` makes it of planes."""
    if piece.matrix is None:
        assert piece.box == box
        return piece.pixels
    rgb = planes_to_rgb(torch.from_numpy(piece.pixels)[None, None], torch.from_numpy(piece.matrix)[None])
    assert all(side % 2 == 0 for side in piece.box)
    (left, top, *_), (x0, y0, x1, y1) = piece.box, box
    return rgb[0, 0].permute(1, 2, 0).numpy().astype(np.uint8)[y0 - top : y1 - top, x0 - left : x1 - left]


def assert_pieces_equal(path, calls=40, seed=0):
    """Random pieces, several per call, mixed with plain reads on the same reader."""
    times, frames, clock = sequential(path)
    rng = np.random.default_rng(seed)
    height, width = frames[0].shape[:2]
    with VideoReader(path) as reader:
        for _ in range(calls):
            # near each other, so that frames left out by one request are asked for by the next
            start = rng.uniform(0, times[-1])
            asked = [
                float(t) for t in np.clip(start + rng.uniform(-0.3, 0.3, rng.integers(1, 5)), 0, times[-1])
            ]
            boxes = [random_box(rng, width, height) for _ in asked]
            expected = [
                frames[int(np.searchsorted(times, np.round(t / clock) * clock - clock / 4))] for t in asked
            ]
            if rng.uniform() < 0.3:
                np.testing.assert_array_equal(
                    reader.read(asked[:1], boxes[0])[0][0], _cut(expected[0], boxes[0])
                )
            found = reader.pieces(asked, boxes)
            for piece, box, frame in zip(found, boxes, expected, strict=True):
                assert times[np.abs(times - piece.time).argmin()] == pytest.approx(piece.time, abs=1e-9)
                np.testing.assert_array_equal(piece.pixels, _cut(frame, box))


def _cut(frame, box):
    x0, y0, x1, y1 = box
    return frame[y0:y1, x0:x1]


@pytest.mark.parametrize("name", CODINGS)
def test_pieces_are_those_of_a_sequential_decode(tmp_path, name):
    file, options = CODINGS[name]
    write_video(tmp_path / file, film(), FPS, **options)
    assert_pieces_equal(tmp_path / file)


@pytest.mark.parametrize("name", CODINGS)
def test_a_reader_that_was_just_opened_gives_every_frame(tmp_path, name):
    """Its decoder's first packet need not be shown; that of AV1 would remember it for good."""
    file, options = CODINGS[name]
    write_video(tmp_path / file, film(30), FPS, **options)
    times, frames, _ = sequential(tmp_path / file)
    for number in range(1, 30, 3):
        with VideoReader(tmp_path / file) as reader:
            found = reader.pieces([times[number]], [(0, 0, *frames[0].shape[1::-1])])[0]
            np.testing.assert_array_equal(found.pixels, frames[number])
        with VideoReader(tmp_path / file) as reader:
            np.testing.assert_array_equal(reader.read([times[number]])[0][0], frames[number])


def write_interlaced(path, count=40):
    """H.264 in fields, which the package does not write."""
    with av.open(str(path), "w") as container:
        options = {"flags": "+ildct+ilme", "g": "5", "bf": "2", "x264-params": "tff=1:scenecut=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for k, image in enumerate(film(count)):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_interlaced_frames_are_whole(tmp_path):
    """A decoder that is emptied early may hold one field of two: such films are read on instead."""
    write_interlaced(tmp_path / "i.mp4")
    with av.open(str(tmp_path / "i.mp4")) as container:
        frames = list(container.decode(video=0))
    assert frames[0].interlaced_frame
    rng = np.random.default_rng(0)
    with VideoReader(tmp_path / "i.mp4") as reader:
        for _ in range(40):
            numbers = rng.integers(0, len(frames), 3)
            found = reader.pieces([float(k) / FPS for k in numbers], [(0, 0, W, H)] * 3, planes=True)
            for k, piece in zip(numbers, found, strict=True):
                np.testing.assert_array_equal(piece.pixels, frames[k].to_ndarray())


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pieces_of_a_stream_that_starts_late(tmp_path, suffix):
    write_video(tmp_path / "a.mp4", film(), FPS, gop=5)
    assert_pieces_equal(remux(tmp_path / "a.mp4", tmp_path / f"late.{suffix}", shift=15_360))


@pytest.mark.parametrize("b_frames", [0, 2])
def test_pieces_of_a_fragmented_file(tmp_path, b_frames):
    """No index in front: what the header tells is less than of other MP4 files."""
    write_video(tmp_path / "a.mp4", film(), FPS, gop=5, b_frames=b_frames)
    parts = {"movflags": "frag_keyframe+empty_moov"}
    assert_pieces_equal(remux(tmp_path / "a.mp4", tmp_path / "parts.mp4", **parts))


# ---- planes
PLANES = {
    "untagged": (True, {}, {}),
    "bt709": (True, {}, {"colorspace": 1, "color_range": 1}),
    "full range": (True, {}, {"colorspace": 6, "color_range": 2}),
    "bt2020": (True, {}, {"colorspace": 9, "color_range": 1}),
    "rotated": (False, {"rotation": 90}, {}),
    "10 bit": (False, {"pix_fmt": "yuv420p10le"}, {}),
    "4:4:4": (False, {"pix_fmt": "yuv444p"}, {}),
    "4:2:2": (False, {"pix_fmt": "yuv422p"}, {}),
}


def write_tagged(path, tags):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for k, image in enumerate(film(20)):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", PLANES)
def test_planes_are_the_same_frames_within_a_level(tmp_path, name):
    has_planes, options, tags = PLANES[name]
    path = tmp_path / "a.mp4"
    if tags:
        write_tagged(path, tags)
    else:
        write_video(path, film(20), FPS, gop=5, **options)
    rng = np.random.default_rng(0)
    differences = []
    with VideoReader(path) as a, VideoReader(path) as b:
        for _ in range(20):
            asked = [float(t) for t in rng.uniform(0, 19 / FPS, 2)]
            boxes = [random_box(rng, a.info.width, a.info.height) for _ in asked]
            for planes, rgb, box in zip(
                a.pieces(asked, boxes, True), b.pieces(asked, boxes), boxes, strict=True
            ):
                assert (planes.matrix is not None) == has_planes
                assert planes.time == rgb.time
                differences.append(np.abs(as_rgb(planes, box).astype(int) - rgb.pixels).ravel())
    assert np.concatenate(differences).max() <= (1 if has_planes else 0)
    assert np.concatenate(differences).mean() < 0.35


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63)])
def test_planes_of_odd_frames(tmp_path, height, width):
    write_video(tmp_path / "odd.webm", film(4, height, width), FPS, codec="libvpx-vp9")
    rng = np.random.default_rng(0)
    with VideoReader(tmp_path / "odd.webm") as reader:
        for _ in range(20):
            box = random_box(rng, width, height)
            planes, rgb = (reader.pieces([2 / FPS], [box], kind)[0] for kind in (True, False))
            assert planes.matrix is not None
            assert np.abs(as_rgb(planes, box).astype(int) - rgb.pixels).max() <= 1


# ---- economy
def count_sent(monkeypatch):
    """Packets that decoders are sent, as a list that grows."""
    sent, send = [], Decoding.send
    monkeypatch.setattr(Decoding, "send", lambda run: (sent.append(1), send(run))[1])
    return sent


def test_nothing_is_sent_beyond_the_last_frame(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", film(150), FPS, gop=10, b_frames=3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stamps = [p.pts for p in container.demux(video=0) if p.size]
    places = {stamp: place for place, stamp in enumerate(stamps)}
    shown = sorted(stamps)
    sent = count_sent(monkeypatch)
    box = (0, 0, 2, 2)
    with VideoReader(tmp_path / "a.mp4") as reader:
        for first, second in ((31, 37), (32, 55), (40, 41), (99, 88)):
            sent.clear()
            reader.pieces([first / FPS, second / FPS], [box] * 2)
            a, b = sorted((first, second))
            places_a, places_b = places[shown[a]] % 10 + 1, places[shown[b]] % 10 + 1
            # from the key frame to the later sent of the two; or twice from a key frame
            expected = max(places_a, places_b) if a // 10 == b // 10 else places_a + places_b
            assert len(sent) <= expected + (a // 10 == b // 10)  # one more may be on its way out
        sent.clear()
        reader.read([31 / FPS])
        with_delay = len(sent)
        sent.clear()
        reader.pieces([31 / FPS], [box])
        assert len(sent) < with_delay


def test_a_film_of_few_key_frames_is_read_on(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", film(), FPS, gop=600)
    sent = count_sent(monkeypatch)
    with VideoReader(tmp_path / "a.mp4") as reader:
        for k in range(0, N, 4):
            reader.pieces([k / FPS], [(0, 0, 2, 2)])
    assert len(sent) <= N + 1


def test_opening_decodes_no_frame_where_the_header_tells_all(tmp_path, monkeypatch):
    """FFmpeg's own opening decodes one. Both know the same of the stream."""
    opened, open_file = [], av.open
    monkeypatch.setattr(
        av, "open", lambda *args, **kw: (opened.append(kw.get("options", {})), open_file(*args, **kw))[1]
    )
    for name, options, times in (
        ("b.mp4", {"gop": 5, "b_frames": 3}, 1),
        ("p.mov", {"gop": 5, "b_frames": 0}, 1),
        ("h.mp4", {"codec": "libx265"}, 2),
        ("m.mkv", {"gop": 5}, 1),
    ):
        write_video(tmp_path / name, film(20), FPS, **options)
        opened.clear()
        with VideoReader(tmp_path / name) as reader, open_file(str(tmp_path / name)) as container:
            context, own = reader._stream.codec_context, container.streams.video[0]
            assert len(opened) == times
            assert context.reorder_depth == own.codec_context.reorder_depth
            assert reader._stream.start_time == own.start_time
            assert (context.width, context.height) == (W, H)
        assert ("skip_frame" in opened[-1]) == (name in ("b.mp4", "p.mov"))


def test_after_wrong_arguments_the_reader_starts_again(tmp_path):
    """Frames between those asked for were left out: the position must not be trusted."""
    write_video(tmp_path / "a.mp4", film(), FPS, gop=600, b_frames=3)
    _, frames, _ = sequential(tmp_path / "a.mp4")
    with VideoReader(tmp_path / "a.mp4") as reader:
        for k in range(5, 40, 3):
            with pytest.raises(ValueError, match="not inside"):
                reader.pieces([k / FPS, (k + 15) / FPS], [(0, 0, W + 1, 1), (0, 0, 1, 1)])
            found = reader.pieces([(k + 1) / FPS], [(0, 0, W, H)])[0]
            np.testing.assert_array_equal(found.pixels, frames[k + 1])
    with pytest.raises(ValueError, match="at least one"):
        reader.pieces([], [])
