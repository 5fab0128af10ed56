"""What is gathered from a method and clips: shapes, rows that belong together, and nothing disturbed."""

import pytest
import torch

from poodle_lightning.evaluation.linear_readout import ReadoutRecipe
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import Affine, Flow
from poodle_lightning.report import gather
from poodle_lightning.report.material import first_pairs
from poodle_lightning.types import ClassSet, Clip, Look

SIZE = (32, 64)
CLASSES = ClassSet(("dark", "bright"))


class Plain(Method):
    def __init__(self):
        super().__init__()
        self.online = Online(ResNet(depth=10, width=8, stem_pool=False))


def clip(seed, labelled=True):
    """Four pairs of dark and bright halves; which half is bright is the label."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(0, 2, (4, 1, 1, 2), generator=generator).repeat_interleave(32, -1)
    bright = bright.expand(4, 2, 32, 64)
    frames = (bright[:, :, None] * 150 + 20).expand(4, 2, 3, 32, 64).to(torch.uint8)
    index = torch.arange(4)
    labels = bright.to(torch.uint8) if labelled else None
    times = torch.zeros(4, 2, dtype=torch.float64)
    return Clip(frames.contiguous(), Affine.identity(4), SIZE, times, index, index, labels=labels)


@pytest.fixture(scope="module")
def method():
    return Plain().train()


def test_everything_there_is(method):
    before = {name: value.clone() for name, value in method.state_dict().items()}
    found = gather(
        method,
        [clip(0), clip(1)],
        (clip(seed) for seed in range(2, 9)),
        step=7,
        pairs=3,
        labelled=24,
        classes=CLASSES,
        recipe=ReadoutRecipe(steps=60, images=8, pixels=512),
    )
    assert (found.method, found.step, found.held_out) == ("Plain", 7, True)
    assert found.look.frames.shape == (3, 2, 3, *SIZE)
    assert found.features.images.shape == (4, 3, *SIZE)
    assert found.features.trained.shape == found.features.untrained.shape == (4, 64, 2, 4)
    assert not torch.allclose(found.features.trained, found.features.untrained)
    assert found.readout.trained.confusion.images == 8
    # half an image is one class: the features say which, its position does not
    assert found.readout.trained.confusion.miou() > 0.8
    assert found.readout.prior.miou() < 0.8
    assert found.readout.predictions.shape == found.readout.labels.shape == (4, *SIZE)
    assert method.training
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_without_labels_training_clips_are_not_touched(method):
    def never():
        raise AssertionError("asked for")
        yield

    assert gather(method, [clip(0, labelled=False)], never()).readout is None


def test_without_training_clips_there_is_no_readout(method):
    assert gather(method, [clip(0)]).readout is None


def test_without_clips_there_is_nothing_to_see(method):
    found = gather(method, [])
    assert found.method == "Plain"
    assert found.look is None
    assert found.features is None


def test_fewer_pairs_keep_rows_together():
    """Row i of a direction carries the number i in every part."""
    total, crops = 5, 3
    numbers = torch.arange(2.0 * total)
    flow = Flow(numbers.reshape(-1, 1, 1, 1).expand(-1, 2, 4, 4).contiguous())
    per_crop = torch.arange(2.0 * total * crops)
    boxes = Affine(torch.eye(3).repeat(2 * total * crops, 1, 1) * per_crop.reshape(-1, 1, 1))
    images = per_crop.reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    look = Look(
        numbers[:total].reshape(-1, 1, 1, 1, 1).expand(-1, 2, 3, 4, 4),
        flow,
        numbers.reshape(-1, 1, 1).expand(-1, 4, 4) > 4,
        None,
        (boxes, boxes),
        (images, images),
    )
    few = first_pairs(look, 2)
    assert few.frames[:, 0, 0, 0, 0].tolist() == [0, 1]
    assert few.flow.displacement[:, 0, 0, 0].tolist() == [0, 1, 5, 6]
    assert few.visible[:, 0, 0].tolist() == [False, False, True, True]
    wanted = [0, 1, 2, 3, 4, 5, 15, 16, 17, 18, 19, 20]
    assert few.boxes[1].matrix[:, 0, 0].tolist() == wanted
    assert few.crops[0][:, 0, 0, 0].tolist() == wanted
    assert first_pairs(look, 99).flow.displacement[:, 0, 0, 0].tolist() == numbers.tolist()
