import re

import numpy as np
from films import film

from poodle_lightning import cli
from poodle_lightning.data.encode import write_video


def test_videos_are_measured_and_bad_files_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    videos = tmp_path / "videos"
    videos.mkdir()
    frames = [np.full((48, 64, 3), 10 * t, dtype=np.uint8) for t in range(21)]
    write_video(videos / "good.mp4", frames, 10.0, gop=5)
    assert cli.main(["inspect", str(videos)]) == 0
    said = capsys.readouterr().out
    # 21 frames at 10 per second: the last is shown at 2 s
    assert "2.00  64x48  10.00     0.50 s    5" in said
    assert "h264 yuv420p" in said
    assert f"{(videos / 'good.mp4').stat().st_size / 1e6:.2f}" in said
    assert "1 video, " in said
    (videos / "bad.mp4").write_text("hello")
    assert cli.main(["inspect", str(videos / "good.mp4"), str(videos / "bad.mp4")]) == 1
    assert "bad.mp4: not_a_video" in capsys.readouterr().out


def test_what_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["inspect", str(tmp_path / "empty")]) == 2
    assert "no video found" in capsys.readouterr().err


def price(capsys):
    """Decoded frames per pair, pairs per CPU-second, cores, and all that was said."""
    said = capsys.readouterr().out
    frames = re.search(r"frames/CPU-s.*\n *\d+ +([\d.]+) ", said)
    cores = re.search(r"= ([\d.]+) ÷ ([\d.]+) = ([\d.]+) cores", said)
    return (float(frames[1]), *map(float, cores.groups()), said)


def test_price_of_a_pair_and_cores_for_one_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    write_video(tmp_path / "far.mp4", film(90), 30, gop=60)
    write_video(tmp_path / "near.mp4", film(90), 30, gop=10)
    assert cli.main(["inspect", str(tmp_path / "near.mp4"), "--pairs-per-s", "1000"]) == 0
    frames, speed, rate, cores, said = price(capsys)
    assert frames == 11.0  # gaps of 15 to 30 frames always pass a key frame: half the way, twice
    assert speed == 1000
    assert cores == round(1000 / rate, 1) or abs(cores - 1000 / rate) < 0.1
    assert "far apart" not in said
    assert cli.main(["inspect", str(tmp_path / "far.mp4")]) == 0
    frames, speed, _, _, said = price(capsys)
    assert 45 < frames < 53  # 30.5 to the first, 22.5 on, less where a key frame lies between
    assert speed == 20
    assert "poodle-lightning prepare" in said


def damage(path):
    """Zeros in the middle third of a film's pixels: its first frame and its timestamps stay."""
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    third = (int.from_bytes(content[start - 8 : start - 4], "big") - 8) // 3
    content[start + third : start + 2 * third] = bytes(third)
    path.write_bytes(bytes(content))


def test_damage_that_only_measuring_sees_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    write_video(tmp_path / "bad.mp4", film(90), 30, gop=10)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    damage(tmp_path / "bad.mp4")
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{tmp_path / 'bad.mp4'}: corrupt: " in said
    assert "that long" not in said
    write_video(tmp_path / "good.mp4", film(90), 30, gop=10)
    assert cli.main(["inspect", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{tmp_path / 'bad.mp4'}: corrupt: " in said
    assert "measured on 1 video)" in said


def test_price_is_optional_and_needs_long_videos(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    write_video(tmp_path / "short.mp4", film(5), 10)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "was not measured" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path), "--measure", "0"]) == 0
    assert "measured" not in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path), "--measure", "-1"]) == 2
    assert "--measure" in capsys.readouterr().err
