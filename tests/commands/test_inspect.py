import numpy as np

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
    assert "2.00  64x48  10.00     0.50 s" in said
    assert "1 videos" in said
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
