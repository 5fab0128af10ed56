"""A flow cache behind the data set: what is stored is what an estimator finds on whole frames."""

import numpy as np
import pytest
import torch

from poodle_lightning.data.cached_flow import CachedFlow, FixedPairs
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.flow.dis import DIS

SIZE = (64, 96)


@pytest.fixture
def films(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "films").mkdir()
    for number in range(2):
        texture = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        frames = [texture[2 * i : 2 * i + 64, 3 * i : 3 * i + 96] for i in range(12)]
        write_video(tmp_path / "films" / f"{number}.mp4", frames, fps=10.0)
    return tmp_path / "films"


def clips(films, flow, **kwargs):
    data = VideoDataModule(
        root=str(films), size=(32, 48), area=(0.3, 0.6), batch_size=2, num_workers=0, val_fraction=0.0,
        sampler=FixedPairs(gap=(0.2, 0.3), fixed=2), flow=flow, **kwargs,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return data, next(iter(data.train_dataloader()))


def test_cached_flow_is_the_films_motion_in_the_crop(films, tmp_path):
    """The texture moves by (−3, −2) px per frame; a crop shows it enlarged or shrunk by its window."""
    _, clip = clips(films, CachedFlow(str(tmp_path / "cache"), DIS(), full_resolution=True))
    flow, present = clip.given_flow()
    assert present.all()
    for row in range(2):
        frames = round(float(clip.times[row, 1] - clip.times[row, 0]) * 10)
        raw_per_crop = float(clip.window.matrix[row, 0, 0]) * clip.frames.shape[-1] / 48
        for found, sign in ((flow.to_pixels()[row], -1.0), (flow.to_pixels()[row + 2], 1.0)):
            middle = found.flatten(1).median(dim=1).values * raw_per_crop
            assert (middle - sign * frames * torch.tensor([3.0, 2.0])).abs().max() < 0.3


def test_second_pass_reads_the_same_values_without_an_estimator(films, tmp_path):
    _, first = clips(films, CachedFlow(str(tmp_path / "cache"), DIS()))
    _, again = clips(films, CachedFlow(str(tmp_path / "cache")))
    assert torch.equal(first.flow, again.flow)
    assert first.flow.isfinite().all()
