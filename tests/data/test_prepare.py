"""Re-encoding one video: frames and times against the source as PyAV alone decodes both."""

import json
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from films import FPS, H, N, W, film, sequential

from poodle_lightning.data import prepare as module
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import coding, write_video
from poodle_lightning.data.info import DecodeError, fingerprint
from poodle_lightning.data.prepare import (
    Job,
    Mismatch,
    attempt,
    estimate,
    in_order,
    psnr,
    remake,
    try_settings,
)
from poodle_lightning.data.prepared import Settings


def smooth(count=40, height=H, width=W):
    """A coloured wave that moves, without grain: what is left after encoding is nearly the same."""
    y, x = np.mgrid[0:height, 0:width]
    for k in range(count):
        waves = [np.sin((x * a + y * b) / 9 + k / 3) for a, b in ((1, 0), (0, 1), (0.5, 0.5))]
        yield (127 + 90 * np.stack(waves, -1)).astype(np.uint8)


def job(source, folder, settings=None, made="a.mp4"):
    return Job(str(source), source.name, str(folder), made, settings or Settings())


def decibels(first, second):
    weights = np.array([0.299, 0.587, 0.114])
    error = np.mean(((first.astype(float) - second) @ weights) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def assert_same_film(source, made, size):
    """Same times to the tick, and each frame is the source's, shrunk by averaging."""
    import cv2

    times, frames, _ = sequential(source)
    new_times, new_frames, _ = sequential(made)
    np.testing.assert_allclose(new_times, times, atol=1e-9)
    assert new_frames[0].shape == (*size, 3)
    for old, new in zip(frames, new_frames, strict=True):
        shrunk = cv2.resize(np.ascontiguousarray(old), size[::-1], interpolation=cv2.INTER_AREA)
        assert decibels(shrunk, new) > 32


def key_frames(path):
    with av.open(str(path)) as container:
        keys = {p.pts: p.is_keyframe for p in container.demux(video=0) if p.size}
    return [k for k, pts in enumerate(sorted(keys)) if keys[pts]]


@pytest.mark.parametrize(
    ("name", "options", "settings", "size"),
    [
        ("a.mp4", {"gop": 250}, {"height": 24}, (24, 32)),
        ("a.mkv", {}, {"short_side": 32, "crf": 12}, (32, 42)),
        ("a.mp4", {"rotation": 90}, {"height": 32}, (32, 24)),
        ("a.mp4", {"rotation": 270}, {"short_side": 24}, (32, 24)),
        ("a.ts", {}, {}, (H, W)),
        ("a.avi", {"codec": "mpeg4"}, {}, (H, W)),
        ("a.mpg", {"codec": "mpeg2video"}, {}, (H, W)),
        ("a.mp4", {"pix_fmt": "yuv420p10le"}, {}, (H, W)),
        ("a.mp4", {}, {"height": 4000}, (H, W)),  # never enlarged
        ("a.mp4", {"fps": Fraction(30000, 1001)}, {"height": 24}, (24, 32)),
    ],
)
def test_frames_and_times_are_the_sources(tmp_path, name, options, settings, size):
    write_video(tmp_path / name, smooth(), **{"fps": FPS, **options})
    made = remake(job(tmp_path / name, tmp_path / "out", Settings(gop=5, **settings)))
    new = tmp_path / "out" / "a.mp4"
    assert_same_film(tmp_path / name, new, size)
    assert key_frames(new) == list(range(0, 40, 5))
    assert probe(new).rotation == 0
    assert made.psnr > 32
    assert made.frames == 40
    assert made.gop[1] == pytest.approx(5, abs=0.01)
    assert made.bytes == ((tmp_path / name).stat().st_size, new.stat().st_size)
    assert (made.source_hash, made.made_hash) == (fingerprint(str(tmp_path / name)), fingerprint(str(new)))


def test_variable_rate_keeps_every_frames_own_time(tmp_path):
    steps = np.random.default_rng(1).choice([0.001, 0.02, 0.033, 0.2, 1.1], 39)
    times = [0.0, *np.cumsum(steps)]
    write_video(tmp_path / "a.mkv", smooth(), FPS, times=times)
    remake(job(tmp_path / "a.mkv", tmp_path / "out"))
    assert_same_film(tmp_path / "a.mkv", tmp_path / "out" / "a.mp4", (H, W))
    np.testing.assert_allclose(sequential(tmp_path / "out" / "a.mp4")[0], times, atol=1e-3)


@pytest.mark.parametrize(("height", "width", "size"), [(47, 63, (46, 62)), (33, 64, (32, 64))])
def test_odd_sides_become_even(tmp_path, height, width, size):
    write_video(tmp_path / "a.webm", smooth(8, height, width), FPS, codec="libvpx-vp9")
    remake(job(tmp_path / "a.webm", tmp_path / "out"))
    assert_same_film(tmp_path / "a.webm", tmp_path / "out" / "a.mp4", size)


def test_one_frame_of_so_many(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(41), FPS)
    remake(job(tmp_path / "a.mp4", tmp_path / "out", Settings(every=3, gop=4)))
    times, frames, _ = sequential(tmp_path / "a.mp4")
    new_times, new_frames, _ = sequential(tmp_path / "out" / "a.mp4")
    np.testing.assert_allclose(new_times, times[::3], atol=1e-9)
    assert min(decibels(a, b) for a, b in zip(frames[::3], new_frames, strict=True)) > 32
    assert key_frames(tmp_path / "out" / "a.mp4") == [0, 4, 8, 12]


def test_one_frame(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(1), FPS)
    assert remake(job(tmp_path / "a.mp4", tmp_path / "out")).frames == 1


def test_colours_stay_and_sound_goes(tmp_path):
    """A source of BT.709 colours, and a sound track."""
    colour = np.full((H, W, 3), (200, 40, 90), np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        sound = container.add_stream("aac", rate=8000, layout="mono")
        for k in range(4):
            frame = av.VideoFrame.from_ndarray(colour, "rgb24")
            frame.pts = k
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        noise.rate, noise.pts = 8000, 0
        container.mux([*stream.encode(), *sound.encode(noise), *sound.encode()])
    remake(job(tmp_path / "a.mp4", tmp_path / "out"))
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (6, 1)  # BT.601, limited
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - colour).max() <= 4


def test_all_frames_in_order_are_decoded_once(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", film(), FPS, gop=20, b_frames=3)
    times, frames, _ = sequential(tmp_path / "a.mp4")
    with VideoReader(tmp_path / "a.mp4") as reader:
        clock = coding(tmp_path / "a.mp4").clock
        found = list(in_order(reader, clock))
        np.testing.assert_allclose([time for time, _ in found], times, atol=1e-9)
        np.testing.assert_array_equal([pixels for _, pixels in found], frames)
        some = list(in_order(reader, clock, start=0.5, small=True))
        assert [pixels.shape for _, pixels in some] == [(1, 1, 3)] * (N - 15)
        seeks, seek = [], reader._seek
        monkeypatch.setattr(reader, "_seek", lambda tick: (seeks.append(tick), seek(tick))[1])
        list(in_order(reader, clock, small=True))
        assert len(seeks) <= 3  # at most one per key frame


def broken(tmp_path):
    """A film with a stretch of zeros in its middle."""
    path = tmp_path / "bad.mp4"
    write_video(path, film(), FPS, gop=12)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [p.pos for p in container.demux(video=0) if p.size]
    first, last = places[20], places[40]
    content[first:last] = bytes(last - first)
    path.write_bytes(bytes(content))
    return path


def test_a_damaged_source_leaves_nothing(tmp_path):
    outcome = attempt(job(broken(tmp_path), tmp_path / "out"))
    assert (outcome.made, outcome.reason, outcome.fatal) == (None, "corrupt", False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fewer", "39 frames were written of 40"),
        ("longer", "in place of"),
        ("shifted", "no frame at"),
        ("other", "differ from the source"),
        ("text", "cannot be read"),
    ],
)
def test_a_wrong_result_is_found_and_not_left(tmp_path, monkeypatch, fault, words):
    write_video(tmp_path / "a.mp4", smooth(), FPS)

    def wrong(path, frames, fps, *, times, check, **options):
        images = list(frames)
        times = list(times)
        if fault == "fewer":
            images, times = images[1:], times[1:]
        if fault == "longer":
            times[-1] += 0.01
        if fault == "shifted":
            times[20] += 0.01
        if fault == "other":
            images[-1] = 255 - images[-1]
        if fault == "text":
            path.write_text("no film")
            return check(path)
        return write_video(path, images, fps, times=times, check=check, **options)

    monkeypatch.setattr(module, "write_video", wrong)
    monkeypatch.setattr(module, "_COMPARED", 41)
    with pytest.raises(Mismatch, match=words):
        remake(job(tmp_path / "a.mp4", tmp_path / "out"))
    if fault != "text":
        assert list((tmp_path / "out").iterdir()) == []
    assert attempt(job(tmp_path / "a.mp4", tmp_path / "out")).reason == "mismatch"


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_what_was_written_is_read_as_in_training(tmp_path, monkeypatch, codec):
    """A decoder that was just opened: one that has given the first frame already may hide a fault."""
    write_video(tmp_path / "a.mp4", smooth(), FPS)
    read, info, measured = VideoReader.read, VideoReader.info, []

    def watched(reader, times, box=None):
        if "out" in reader.path:
            assert reader not in measured
        return read(reader, times, box)

    monkeypatch.setattr(VideoReader, "info", property(lambda one: (measured.append(one), info.fget(one))[1]))
    monkeypatch.setattr(VideoReader, "read", watched)
    assert remake(job(tmp_path / "a.mp4", tmp_path / "out", Settings(codec=codec))).psnr > 32


def test_what_was_there_stays_until_the_new_one_is_checked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_bytes(b"the old one")
    assert attempt(job(broken(tmp_path), tmp_path / "out")).reason == "corrupt"
    assert (tmp_path / "out" / "a.mp4").read_bytes() == b"the old one"


def test_a_folder_that_cannot_be_written_ends_everything(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(3), FPS)
    (tmp_path / "file").write_text("")
    outcome = attempt(job(tmp_path / "a.mp4", tmp_path / "file" / "out"))
    assert outcome.fatal
    assert "Not a directory" in outcome.detail


def test_stops_within_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(), FPS)
    ticks = []

    def tick():
        ticks.append(0)
        if len(ticks) == 10:
            raise module.Stopped

    with pytest.raises(module.Stopped):
        remake(job(tmp_path / "a.mp4", tmp_path / "out"), tick)
    assert list((tmp_path / "out").iterdir()) == []


def test_few_frames_are_held(tmp_path, monkeypatch):
    """Frames pass through one by one: besides the compared ones, only the current is kept."""
    write_video(tmp_path / "a.mp4", film(200, 16, 16), FPS)
    held = []
    made = module._Frames._made

    def watched(self):
        for pixels in made(self):
            held.append(len(self._samples))
            yield pixels

    monkeypatch.setattr(module._Frames, "_made", watched)
    remake(job(tmp_path / "a.mp4", tmp_path / "out"))
    assert len(held) == 200
    assert max(held) <= 5


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_encoders_that_obey_are_accepted(codec):
    try_settings(Settings(codec=codec, gop=6, preset="ultrafast"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "nonesuch"}, "nonesuch"),
        ({"preset": "nonesuch"}, "preset|Invalid argument"),
        ({"codec": "mjpeg"}, "key frame|mjpeg"),  # every frame is a key frame
    ],
)
def test_encoders_that_do_not_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        try_settings(Settings(**settings))


def test_estimate_is_of_the_kept_frames(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(200, 96, 128), FPS, gop=12, crf=8)
    for settings in (Settings(), Settings(every=2, height=48)):
        size, seconds = estimate(tmp_path / "a.mp4", settings)
        real = remake(job(tmp_path / "a.mp4", tmp_path / "out", settings))
        assert size == pytest.approx(real.bytes[1] / real.frames, rel=0.3)
        assert 0 < seconds < 1


def test_the_same_bytes_every_time(tmp_path):
    write_video(tmp_path / "a.mp4", film(24), FPS, gop=100)
    found = {remake(job(tmp_path / "a.mp4", tmp_path / "out")).made_hash for _ in range(12)}
    assert len(found) == 1


def test_a_low_psnr_is_not_blamed_on_the_crf_alone(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", smooth(3), FPS)
    monkeypatch.setattr(module, "psnr", lambda *_: 19.0)
    with pytest.raises(Mismatch, match=r"19\.0 dB.*other pictures, or crf 33 is too coarse"):
        remake(job(tmp_path / "a.mp4", tmp_path / "out", Settings(crf=33)))


def test_psnr():
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a) == float("inf")
    assert psnr(a, a + 255) == pytest.approx(0, abs=1e-3)
    with pytest.raises(Mismatch, match="4×4"):
        psnr(a, a[:2])


def test_made_is_plain_data(tmp_path):
    from dataclasses import asdict

    write_video(tmp_path / "a.mp4", [np.zeros((16, 16, 3), np.uint8)] * 4, FPS)
    made = remake(job(tmp_path / "a.mp4", tmp_path / "out"))
    assert "Infinity" not in json.dumps(asdict(replace(made)), allow_nan=False)


def test_no_video_is_a_reason(tmp_path):
    (tmp_path / "a.mp4").write_text("text")
    with pytest.raises(DecodeError):
        remake(job(tmp_path / "a.mp4", tmp_path / "out"))
    assert attempt(job(tmp_path / "a.mp4", tmp_path / "out")).reason == "not_a_video"
