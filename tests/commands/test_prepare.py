"""``poodle-lightning prepare``: what it makes, keeps, makes again, leaves out and says."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from films import film

from poodle_lightning import cli
from poodle_lightning.commands import prepare as command
from poodle_lightning.data import prepare as making
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.index import build_index
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.prepared import FILE_NAME, load

FPS = 10


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "index"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two films of one name in different folders, 2.3 s each."""
    root = tmp_path_factory.mktemp("films")
    for number, name in enumerate(("one/a.mov", "two/a.mkv")):
        (root / name).parent.mkdir()
        write_video(root / name, film(24, seed=number), FPS, gop=100)
    return root


@pytest.fixture
def copy(films, tmp_path):
    return shutil.copytree(films, tmp_path / "films")


def run(root, out, *words):
    options = ["--root", root, "--out", out, "--gop", 4, "--workers", 1, "--measure", 0]
    return cli.main(["prepare", *map(str, (*options, *words))])


def numbers(text):
    """Videos made, there, left out."""
    found = re.search(r"(\d+) videos? made .* (\d+) were there, (\d+) left out", text)
    return tuple(int(number) for number in found.groups())


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_makes_the_same_folder_anew_and_says_what_it_gained(films, tmp_path, capsys):
    out = tmp_path / "out"
    before = contents(films)
    assert run(films, out, "--height", 24, "--measure", 2) == 0
    said = capsys.readouterr().out
    assert numbers(said) == (2, 0, 0)
    assert contents(films) == before
    assert sorted(contents(out)) == ["one/a.mp4", FILE_NAME, "two/a.mp4"]
    index = build_index(out)
    assert [(v.width, v.height, v.frames) for v in index.videos] == [(32, 24, 24)] * 2
    assert [v.gop for v in index.videos] == pytest.approx([4, 4])
    assert [v.duration for v in index.videos] == pytest.approx([2.3, 2.3])
    new = sum(len(data) for name, data in contents(out).items() if name.endswith(".mp4"))
    old = sum(map(len, before.values()))
    assert re.search(rf"size +{old / 1e6:.2f} MB +{new / 1e6:.2f} MB +{new / old:.2f} ×", said)
    assert re.search(r"frames between key frames +24 +4\b", said)
    rates = re.search(r"pairs per CPU-second +([\d.]+) +([\d.]+) +([\d.]+) ×", said)
    cores = re.search(r"cores for 20 pairs/s +([\d.]+) +([\d.]+)", said)
    for rate, number in zip(rates.groups()[:2], cores.groups(), strict=True):
        assert float(number) == pytest.approx(20 / float(rate), abs=0.06)
    assert "measured on 2 videos" in said


def test_goes_on_where_it_was(films, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run(films, out)
    first = contents(out)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(making, "remake", lambda *_: pytest.fail("made again"))
        assert run(films, out) == 0
    assert numbers(capsys.readouterr().out) == (0, 2, 0)
    assert contents(out) == first

    (out / "one" / "a.mp4").write_bytes(first["one/a.mp4"][:-50])  # torn
    (out / "two" / "a.mp4").unlink()
    assert run(films, out) == 0
    assert numbers(capsys.readouterr().out) == (2, 0, 0)
    assert contents(out)["one/a.mp4"] == first["one/a.mp4"]

    assert run(films, out, "--crf", 30) == 0  # other settings: nothing can stay
    assert numbers(capsys.readouterr().out) == (2, 0, 0)
    assert run(films, out, "--crf", 30, "--short-side", 24) == 0
    assert numbers(capsys.readouterr().out) == (2, 0, 0)
    assert probe(out / "one" / "a.mp4").height == 24


def test_a_changed_source_is_made_again(copy, tmp_path, capsys):
    out = tmp_path / "out"
    run(copy, out)
    write_video(copy / "one" / "a.mov", film(20, seed=9), FPS)
    write_video(copy / "three.mp4", film(12, seed=3), FPS)
    capsys.readouterr()
    assert run(copy, out) == 0
    assert numbers(capsys.readouterr().out) == (2, 1, 0)
    assert probe(out / "one" / "a.mp4").frames == 20


def test_videos_without_a_source_are_named(copy, tmp_path, capsys):
    out = tmp_path / "out"
    run(copy, out)
    (copy / "one" / "a.mov").unlink()
    assert run(copy, out) == 0
    assert "1 earlier video in " in capsys.readouterr().err
    assert (out / "one" / "a.mp4").is_file()


def test_damaged_sources_are_left_out_with_their_reasons(copy, tmp_path, capsys):
    (copy / "text.mp4").write_text("no film")
    (copy / "dead.mp4").symlink_to(copy / "nowhere.mp4")
    content = bytearray((copy / "one" / "a.mov").read_bytes())
    start = content.find(b"mdat") + 4
    size = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start + size // 3 : start + 2 * size // 3] = bytes(2 * size // 3 - size // 3)
    (copy / "one" / "bad.mov").write_bytes(bytes(content))
    assert run(copy, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert numbers(said.out) == (2, 0, 3)
    assert "1 not_a_video" in said.err
    assert "1 missing" in said.err
    assert "1 corrupt" in said.err
    assert f"{copy}/one/bad.mov: corrupt: " in said.err
    assert sorted(contents(tmp_path / "out")) == ["one/a.mp4", FILE_NAME, "two/a.mp4"]
    assert run(copy, tmp_path / "out") == 1  # still said the next time
    assert numbers(capsys.readouterr().out) == (0, 2, 3)


def test_nothing_usable_is_an_error(tmp_path, capsys):
    root = tmp_path / "films"
    root.mkdir()
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "set --root to a folder" in capsys.readouterr().err
    (root / "a.mp4").write_text("no film")
    assert run(root, tmp_path / "out") == 2
    assert "none of the 1 files" in capsys.readouterr().err


def test_every_video_failing_is_an_error(films, tmp_path, capsys, monkeypatch):
    def failing(job, tick):
        raise DecodeError("corrupt", "made so", 0.5)

    monkeypatch.setattr(making, "remake", failing)
    assert run(films, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "2 corrupt" in said
    assert "none of the 2 videos" in said


@pytest.mark.parametrize("place", [".", "inside", "one/deeper", ".."])
def test_folders_within_each_other_are_refused(copy, place, capsys):
    assert run(copy, copy / place) == 2
    assert "lie within each other" in capsys.readouterr().err


def test_a_link_into_the_root_is_seen(copy, tmp_path, capsys):
    (tmp_path / "link").symlink_to(copy / "one")
    assert run(copy, tmp_path / "link" / "out") == 2
    assert "lie within each other" in capsys.readouterr().err


def test_other_videos_are_never_overwritten(films, tmp_path, capsys):
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "a.mp4").write_bytes(b"mine")
    assert run(films, tmp_path / "out") == 2
    assert "not made here" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"one/a.mp4": b"mine"}


def test_a_place_that_cannot_be_written_is_one_line(films, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(films, tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    assert run(films, tmp_path / "file" / "out") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_full_disk_ends_it_and_the_rest_follows_later(films, tmp_path, capsys, monkeypatch):
    write = making.write_video
    calls = []

    def full(path, *args, **options):
        calls.append(path)
        if len(calls) == 3:  # the trial, the first video, the second
            raise OSError(28, "No space left on device")
        return write(path, *args, **options)

    monkeypatch.setattr(making, "write_video", full)
    assert run(films, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "cannot be written (No space left on device): make room" in said
    assert "Traceback" not in said
    assert run(films, tmp_path / "out") == 0
    assert numbers(capsys.readouterr().out) == (1, 1, 0)


def test_wrong_settings_are_refused_before_anything_is_read(tmp_path, capsys):
    for words, said in (
        (["--gop", 0], "--gop 0: give a number of frames, at least 1"),
        (["--every", 0], "--every 0: give a number of frames, at least 1"),
        (["--height", 127], "--height 127: give an even number of pixels, at least 2"),
        (["--short-side", 0], "--short-side 0: give an even number of pixels, at least 2"),
        (["--crf", 52], "--crf 52: give a number from 0 to 51 for libx264"),
        (
            ["--codec", "nonsense"],
            "--codec nonsense: FFmpeg has no video encoder of this name; choose libx264",
        ),
        (["--codec", "aac"], "--codec aac: FFmpeg has no video encoder of this name; choose libx264"),
        (["--codec", "mpeg4"], "--codec mpeg4: here it does not encode"),
        (["--preset", "fastt"], "--preset fastt: libx264 has none such; choose ultrafast, superfast, "),
        (["--pairs-per-s", 0], "above 0"),
    ):
        assert run(tmp_path / "nowhere", tmp_path / "out", *words) == 2
        found = capsys.readouterr().err.strip()
        assert said in found
        assert "\n" not in found
        assert "22" not in found
        assert sum(f"--{name} " in found for name in ("gop", "crf", "codec", "preset", "height")) <= 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [OSError, av.error.OSError])
def test_no_room_for_the_trial_is_not_blamed_on_the_codec(films, tmp_path, capsys, monkeypatch, kind):
    def full(*_, **__):
        raise kind(28, "No space left on device")

    monkeypatch.setattr(making, "write_video", full)
    assert run(films, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "temporary files cannot be written (No space left on device): make room, or set TMPDIR" in said
    assert "codec" not in said


def test_a_dry_run_writes_nothing(films, tmp_path, capsys):
    assert run(films, tmp_path / "out", "--dry-run", "--height", 24) == 0
    said = capsys.readouterr().out
    assert "2 videos to make, 0.00 h" in said
    assert "2 of 64x48 to 32x24" in said
    # one key frame and 24 frames of 10 per second: 12.5 and 7.5 less what is past the end; then 2.5 and 2.5
    assert re.search(r"decoded frames for a pair, 0.5 to 1 s apart: 1\d now, 5 then", said)
    assert not (tmp_path / "out").exists()
    run(films, tmp_path / "out", "--height", 24)
    run(films, tmp_path / "out", "--dry-run", "--height", 24)
    assert "0 videos to make" in capsys.readouterr().out


def corrupt(path):
    """Zeros in the middle third of a film's pixels."""
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    size = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start + size // 3 : start + 2 * size // 3] = bytes(2 * size // 3 - size // 3)
    path.write_bytes(bytes(content))


def test_a_forecast_passes_over_damaged_samples(tmp_path, capsys):
    root = tmp_path / "films"
    root.mkdir()
    for number, name in enumerate("abc"):  # the middle one of three is the sample
        write_video(root / f"{name}.mp4", film(24 - number, seed=number), FPS, gop=4)
    corrupt(root / "b.mp4")
    assert run(root, tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"cannot be re-encoded: {root / 'b.mp4'}: corrupt: " in said
    assert re.search(rf"from a sample of {root}/[ac]\.mp4", said)
    for name in "ac":
        corrupt(root / f"{name}.mp4")
    assert run(root, tmp_path / "out", "--dry-run") == 2
    assert (
        f"3 samples cannot be re-encoded, the first is {root / 'b.mp4'}: corrupt: " in capsys.readouterr().err
    )


def test_a_forecast_counts_no_more_workers_than_cores(films, tmp_path, capsys, monkeypatch):
    build_index(films)  # kept, so that no process is started for it
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert run(films, tmp_path / "out", "--dry-run", "--workers", 8) == 0
    assert "minutes with 1 worker\n" in capsys.readouterr().out


def test_the_gain_is_of_videos_that_both_sides_have(films, tmp_path, capsys, monkeypatch):
    from poodle_lightning.data import cost
    from poodle_lightning.types import Skip

    measure = cost.measure_each
    rates = {"one/a.mov": 1.0, "two/a.mkv": 2.0, "one/a.mp4": 8.0, "two/a.mp4": 64.0}

    def made_up(paths):
        found = [replace(one, pairs_per_cpu_s=rates["/".join(Path(one.info.path).parts[-2:])])
                 for one in measure(paths)]  # fmt: skip
        return [Skip(p, "corrupt", "made so") if p.endswith("two/a.mp4") else c
                for p, c in zip(paths, found, strict=True)]  # fmt: skip

    monkeypatch.setattr(cost, "measure_each", made_up)
    assert run(films, tmp_path / "out", "--measure", 2) == 1
    said = capsys.readouterr()
    assert re.search(r"pairs per CPU-second +1\.0 +8\.0 +8\.0 ×", said.out)
    assert "measured on 1 video," in said.out
    assert f"{tmp_path / 'out'}/two/a.mp4: corrupt: made so" in said.err


def test_damage_is_not_called_short(films, tmp_path, capsys):
    """What stands is not read again, but when the gain is measured."""
    run(films, tmp_path / "out")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoReader, "pieces", failing_pieces)
        assert run(films, tmp_path / "out", "--measure", 2) == 1
    said = capsys.readouterr()
    assert "too short" not in said.out
    assert f"{films}/one/a.mov: corrupt: made so" in said.err


def failing_pieces(reader, times, boxes, planes=False):
    raise DecodeError("corrupt", "made so", times[0])


def test_half_written_files_of_a_killed_run_are_removed(films, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run(films, out)
    own = [".a.ab12_xyz.mp4", ".a.abcdefgh.mp4"]
    others = [".b.abcdefgh.mp4", ".a.abcdefgh.mkv", ".a.abc.mp4", "..mp4", ".a.mp4"]
    for folder in ("one", "two"):
        for name in (*own, *others):
            (out / folder / name).write_bytes(b"half")
    (out / "one" / "a.mp4").unlink()
    assert run(films, out) == 0
    for folder in ("one", "two"):
        assert sorted(path.name for path in (out / folder).iterdir()) == sorted([*others, "a.mp4"])


def test_a_second_run_leaves_the_first_its_files(films, tmp_path):
    from poodle_lightning.data.prepared import working_in

    out = tmp_path / "out"
    run(films, out)
    part = out / "one" / ".a.abcdefgh.mp4"
    part.write_bytes(b"half")
    with working_in(out, []):
        assert run(films, out) == 0
        assert part.exists()
        with working_in(out, ["one/a.mp4"]):  # and a third, while two work
            assert part.exists()
    with working_in(out, ["two/a.mp4"]):
        assert part.exists()
    with working_in(out, ["one/a.mp4"]):
        assert not part.exists()


def test_a_killed_run_leaves_what_the_next_one_removes(films, tmp_path):
    """The real names, and the lock of a process that is gone."""
    out = tmp_path / "out"
    script = (
        "import os, signal\n"
        "from poodle_lightning import cli\n"
        "from poodle_lightning.data import prepare\n"
        "def dying(self, path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare._Frames.compare = dying\n"
        f"cli.main(['prepare', '--root', {str(films)!r}, '--out', {str(out)!r}, '--workers', '1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path for path in out.rglob("*") if path.is_file() and path.name != FILE_NAME]
    assert len(left) == 1
    assert run(films, out) == 0
    assert sorted(contents(out)) == ["one/a.mp4", FILE_NAME, "two/a.mp4"]


def test_several_processes_make_the_same(films, tmp_path, capsys):
    assert run(films, tmp_path / "one") == 0
    assert run(films, tmp_path / "two", "--workers", 2) == 0
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert {n: d for n, d in contents(tmp_path / "one").items() if n != FILE_NAME} == {
        n: d for n, d in contents(tmp_path / "two").items() if n != FILE_NAME
    }


def test_the_record_is_lines_of_json(films, tmp_path):
    run(films, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / FILE_NAME).read_text().splitlines()]
    assert sorted(line["source"] for line in lines) == ["one/a.mov", "two/a.mkv"]
    assert {line["settings"]["gop"] for line in lines} == {4}


def test_pairs_of_the_prepared_folder_are_those_of_the_source(films, tmp_path):
    """What training draws from both at one time is the same frame."""
    run(films, tmp_path / "out", "--crf", 10)
    times = list(np.random.default_rng(0).uniform(0, 2.3, 10))
    with VideoReader(films / "one" / "a.mov") as old, VideoReader(tmp_path / "out" / "one" / "a.mp4") as new:
        a, old_times = old.read(times)
        b, new_times = new.read(times)
    np.testing.assert_allclose(new_times, old_times, atol=1e-9)
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs((a.astype(float) - b) @ weights).mean() < 4


def test_training_takes_the_prepared_folder(films, tmp_path):
    from poodle_lightning.data.video import VideoDataModule

    run(films, tmp_path / "out")
    data = VideoDataModule(
        "folder", str(tmp_path / "out"), size=(16, 32), gap=(0.2, 0.4), area=(0.3, 0.6), batch_size=2,
        num_workers=0, val_fraction=0,
    )  # fmt: skip
    data.setup("fit")
    clip = next(iter(data.train_dataloader()))
    assert len(clip) == 2
    assert clip.skipped == ()


def test_the_name_and_help_are_found():
    from poodle_lightning import commands

    assert commands.names()["prepare"] == "prepare"
    assert commands.help_of("prepare") == command.HELP
