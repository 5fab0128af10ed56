"""The writer: what PyAV reads back, and what is refused."""

from fractions import Fraction

import av
import numpy as np
import pytest

from poodle_lightning.data.encode import Coding, coding, leftovers, write_video


def frames(count=10, height=32, width=48):
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    return [np.repeat(np.roll(ramp, 2 * k, 1), 3, 2).astype(np.uint8) for k in range(count)]


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        times = [float(f.pts * stream.time_base) for f in decoded]
        return times, np.stack([f.to_ndarray(format="rgb24") for f in decoded]), decoded


def test_round_trip(tmp_path):
    images = frames()
    write_video(tmp_path / "a.mp4", iter(images), 25, crf=10)
    times, pixels, _ = read(tmp_path / "a.mp4")
    np.testing.assert_allclose(times, np.arange(10) / 25, atol=1e-6)
    error = (pixels.astype(float) - np.stack(images)) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 35


def test_lossless_samples(tmp_path):
    images = frames()
    write_video(tmp_path / "a.mp4", images, 25, crf=0, pix_fmt="yuv444p")
    expected = [
        av.VideoFrame.from_ndarray(i, "rgb24").reformat(format="yuv444p").to_ndarray() for i in images
    ]
    with av.open(str(tmp_path / "a.mp4")) as container:
        np.testing.assert_array_equal([f.to_ndarray() for f in container.decode(video=0)], expected)


@pytest.mark.parametrize("gop", [1, 4])
def test_key_frames_are_gop_apart(tmp_path, gop):
    write_video(tmp_path / "a.mp4", frames(12), 25, gop=gop)
    with av.open(str(tmp_path / "a.mp4")) as container:
        keys = [
            round(float(p.pts * p.time_base) * 25)
            for p in container.demux(video=0)
            if p.size and p.is_keyframe
        ]
    assert keys == list(range(0, 12, gop))


def test_times_of_a_variable_rate(tmp_path):
    wanted = [0.0, 0.1, 0.101, 0.5, 2.0]
    write_video(tmp_path / "a.mp4", frames(5), 25, times=wanted)
    np.testing.assert_allclose(read(tmp_path / "a.mp4")[0], wanted, atol=1e-4)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_cut_adds_no_key_frame(tmp_path, codec):
    cut = frames(7, 64, 96) + [255 - image for image in frames(8, 64, 96)]
    write_video(tmp_path / "a.mp4", cut, 25, gop=5, codec=codec)
    with av.open(str(tmp_path / "a.mp4")) as container:
        keys = {p.pts: p.is_keyframe for p in container.demux(video=0) if p.size}
    assert [k for k, pts in enumerate(sorted(keys)) if keys[pts]] == [0, 5, 10]


def test_a_clock_of_ones_own_is_kept_to_the_tick(tmp_path):
    clock = Fraction(1, 12345)
    ticks = [0, 1, 2, 12346, 99999]
    write_video(tmp_path / "a.mp4", frames(5), 25, times=[float(k * clock) for k in ticks], clock=clock)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
        assert [f.pts * base / clock for f in container.decode(stream)] == ticks


def test_colours_are_tagged_as_what_they_are(tmp_path):
    write_video(tmp_path / "a.mp4", frames(2), 25)
    _, _, decoded = read(tmp_path / "a.mp4")
    assert (int(decoded[0].colorspace), int(decoded[0].color_range)) == (
        6,
        1,
    )  # H.273: BT.601; FFmpeg: limited


def test_the_check_comes_before_the_name(tmp_path):
    seen = []

    def look(path):
        seen.append((len(read(path)[0]), (tmp_path / "a.mp4").exists()))

    write_video(tmp_path / "a.mp4", frames(4), 25, check=look)
    assert seen == [(4, False)]

    def refuse(path):
        raise KeyError("not so")

    with pytest.raises(KeyError):
        write_video(tmp_path / "b.mp4", frames(4), 25, check=refuse)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_coding_is_read_from_the_header(tmp_path):
    write_video(tmp_path / "a.mkv", frames(2), 25, codec="libvpx-vp9", pix_fmt="yuv444p")
    assert coding(tmp_path / "a.mkv") == Coding("vp9", "yuv444p", Fraction(1, 1000))
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises((OSError, ValueError)):
        coding(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        noise.rate, noise.pts = 8000, 0
        container.mux([*stream.encode(noise), *stream.encode()])
    with pytest.raises(ValueError, match="no video stream"):
        coding(tmp_path / "sound.mp4")


def test_fractional_rate(tmp_path):
    write_video(tmp_path / "a.mp4", frames(10), 30000 / 1001)
    assert read(tmp_path / "a.mp4")[0][9] == pytest.approx(9 * 1001 / 30000, abs=1e-4)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_written(tmp_path, rotation):
    write_video(tmp_path / "a.mp4", frames(2), 25, rotation=rotation)
    assert read(tmp_path / "a.mp4")[2][0].rotation % 360 == rotation


def broken():
    yield from frames(3)
    raise RuntimeError("the source failed")


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda: [], {}, ValueError, "no frames"),
        (lambda: [np.zeros((8, 8), np.uint8)], {}, ValueError, "H, W, 3"),
        (lambda: [np.zeros((8, 8, 3), np.float32)], {}, ValueError, "uint8"),
        (lambda: frames(1) + frames(1, 16), {}, ValueError, "frame 1"),
        (lambda: frames(1, 31, 48), {}, ValueError, "yuv444p"),
        (lambda: frames(2), {"codec": "libx265"}, ValueError, "libx265 needs 56"),
        (lambda: frames(3), {"times": [0.0, 1.0]}, ValueError, "2 times"),
        (lambda: frames(2), {"times": [0.0, 0.0]}, ValueError, "increase"),
        (broken, {}, RuntimeError, "failed"),
    ],
)
def test_failures_leave_nothing_behind(tmp_path, make, options, error, words):
    (tmp_path / "a.mp4").write_bytes(b"the old one")
    with pytest.raises(error, match=words):
        write_video(tmp_path / "a.mp4", make(), 25, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"the old one"


def test_leftovers_are_what_writing_calls_them(tmp_path):
    names = ["a.mp4", "two words.b.mp4", "y" * 200 + ".mkv"]
    (tmp_path / "in").mkdir()
    targets = [tmp_path / names[0], tmp_path / names[1], tmp_path / "in" / names[2]]
    seen = []
    for path in targets:
        write_video(path, frames(2), 25, check=lambda part: seen.append(leftovers(targets)))
        assert seen.pop()[0].suffix == path.suffix  # while it is written
    assert leftovers(targets) == []
    ours = [".a.abc_1234.mp4", ".two words.b.01234567.mp4", "in/." + "y" * 40 + ".abcdefgh.mkv"]
    others = [".a.abc_1234.mkv", ".a.abc_12345.mp4", ".a..mp4", "a.abc_1234.mp4", "in/.a.abc_1234.mp4"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".a.afolder_.mp4").mkdir()
    assert leftovers(targets) == sorted(tmp_path / name for name in ours)
    assert leftovers([tmp_path / "nowhere" / "a.mp4"]) == []


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"the old one")
    with open(tmp_path / "a.mp4", "rb") as old:
        write_video(tmp_path / "a.mp4", frames(2), 25)
        assert old.read() == b"the old one"
    assert len(read(tmp_path / "a.mp4")[0]) == 2


def test_odd_names(tmp_path):
    for name in ("two words.mp4", "ünï 名.mp4", "http:x.mp4", "y" * 251 + ".mp4"):
        write_video(tmp_path / name, frames(2), 25)
        assert (tmp_path / name).stat().st_size > 500
