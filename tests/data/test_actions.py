"""UCF101 by its layout: which frames make a clip, what a network is shown, bad videos and bad lists."""

import numpy as np
import pytest
import torch
from action_trees import VIEW, module, ucf
from torchvision.transforms.functional import resize

from poodle_lightning.data import actions
from poodle_lightning.data.actions import ActionDataModule, ClipView
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ucf(tmp_path_factory.mktemp("ucf"))


def test_the_papers_clips():
    view = ClipView()
    assert view.times(0.0, 10.0) == [k / 16 for k in range(32)]
    starts = view.starts(10.0, 10)
    assert (starts[0], starts[-1]) == (0.0, 10 - 31 / 16)
    assert np.allclose(np.diff(starts), (10 - 31 / 16) / 9)
    drawn = [view.draw(10.0, key_of(0, number).reshape(1)) for number in range(300)]
    assert 0 <= min(drawn) < 0.3
    assert 7.8 < max(drawn) <= 10 - 31 / 16


@pytest.mark.parametrize("size", [(240, 320), (253, 300), (720, 478)])
def test_a_test_resizes_as_torchvision_does(monkeypatch, size):
    asked = []
    monkeypatch.setattr(actions, "_resized", lambda clip, size: asked.append(size) or clip)
    ClipView().test(np.zeros((1, *size, 3), np.uint8))
    assert asked == [tuple(resize(torch.zeros(3, *size), 256).shape[1:])]


def test_a_short_video_begins_again():
    view = ClipView(frames=7, fps=4.0)
    assert view.starts(0.5, 2) == [0.0, 0.0]
    assert view.times(0.0, 0.5) == [0.0, 0.25, 0.5, 0.0, 0.25, 0.5, 0.0]


def test_a_test_sees_every_video_once_in_even_clips(root):
    found = list(module(root).val_dataloader())
    assert [int(batch.labels) for batch in found] == [0, 1, 2]
    for label, batch in enumerate(found):
        assert batch.frames.shape == (1, 3, 4, 3, 16, 16)
        assert abs(float(batch.frames.float().mean()) - (60 + 60 * label)) < 4
        assert bool(batch.readable.all())


def test_an_epoch_has_some_clips_of_every_video(root):
    data = module(root, clips_per_video=2)
    one, two = list(data.train_dataloader()), list(module(root, clips_per_video=2).train_dataloader())
    assert sorted(int(i) for batch in one for i in batch.index) == sorted(2 * list(range(6)))
    for a, b in zip(one, two, strict=True):
        assert a.frames.shape == (3, 1, 4, 3, 16, 16)
        assert a.frames.equal(b.frames)
        assert all(data.videos("train")[i][1] == label for i, label in zip(a.index, a.labels, strict=True))


def test_all_frames_of_a_clip_are_changed_alike():
    draws = np.random.default_rng(0)
    frame = draws.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    for number in range(4):
        clip = VIEW.train(np.repeat(frame[None], 4, axis=0), key_of(1, number).reshape(1))
        assert clip.shape == (4, 16, 16, 3)
        assert all(np.array_equal(clip[0], other) for other in clip)
    plain = ClipView(frames=4, size=16, resize=16, jitter=(0.0, 0.0, 0.0, 0.0))
    assert not np.array_equal(clip[0], plain.train(frame[None], key_of(1, 3).reshape(1))[0])


def test_bad_videos_are_replaced_in_training_and_kept_in_the_test(tmp_path):
    root = ucf(tmp_path)
    (root / "UCF-101/Jump/v_Jump_g00_c01.avi").write_bytes(b"RIFF no video")
    (root / "UCF-101/Swim/v_Swim_g02_c01.avi").unlink()
    data = module(root, clips_per_video=1)
    trained = list(data.train_dataloader())
    assert sum(batch.replaced for batch in trained) == 1
    assert 2 not in [int(i) for batch in trained for i in batch.index]
    tested = list(data.val_dataloader())
    assert [bool(batch.readable) for batch in tested] == [True, True, False]
    assert int(tested[2].labels) == 2
    assert not tested[2].frames.any()
    for path in (root / "UCF-101").rglob("*.avi"):
        path.write_bytes(b"RIFF no video")
    with pytest.raises(UserError, match="64 videos in a row cannot be read, the first because"):
        next(iter(module(root).train_dataloader()))
    for path in (root / "UCF-101").rglob("*.avi"):
        path.unlink()
    with pytest.raises(UserError, match=r"none of the 6 videos of trainlist01\.txt is there"):
        module(root).setup("fit")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classInd.txt", "1 Dive\n3 Jump\n", r'classInd\.txt:2: "3 Jump", but "2 <new class>"'),
        ("classInd.txt", "\n", "the list is empty"),
        ("trainlist01.txt", "Run/a.avi 1\n", r"trainlist01\.txt:1: .* no <class>/<file> of classInd"),
        ("trainlist01.txt", "Jump/a.avi 1\n", "Jump is class 2 in classInd.txt, not 1"),
    ],
)
def test_bad_lists(tmp_path, file, text, message):
    root = ucf(tmp_path, train=1)
    (root / "ucfTrainTestlist" / file).write_text(text)
    with pytest.raises(UserError, match=message):
        module(root).setup("fit")


def test_settings(root):
    with pytest.raises(UserError, match=r"give --data\.root"):
        ActionDataModule()
    with pytest.raises(UserError, match=r"testlist07\.txt: cannot be read"):
        module(root, split=7).setup("validate")
    with pytest.raises(UserError, match="clip view: frames 0"):
        ClipView(frames=0)
    assert torch.equal(next(iter(module(root).val_dataloader())).to("cpu").labels, torch.tensor([0]))
