"""How often an image's pixels are interpolated on their way into the network."""

import pytest
import torch
from tiny_models import make_clip, tiny_encoder
from torch.utils._python_dispatch import TorchDispatchMode

from poodle_lightning.augment.geometric import AffineFlip, draw_views
from poodle_lightning.augment.photometric import Colour, recolour
from poodle_lightning.methods.byol import BYOL
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.ops.crops import SubcropRecipe
from poodle_lightning.ops.pairs import both_directions, direction_keys


class Samplings(TorchDispatchMode):
    """Counts samplings of images; fields of motion have two channels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(("grid_sampler", "upsample")) and args[0].shape[1] == 3:
            self.count += 1
        return func(*args, **(kwargs or {}))


def samplings(work) -> int:
    with Samplings() as counter:
        work()
    return counter.count


@pytest.fixture
def method():
    return PooDLe(
        tiny_encoder(), decoder=None, hidden=8, out=8, subcrops=SubcropRecipe(count=3, size=(16, 16))
    )


def test_every_step_of_poodles_preparation(method):
    clip = make_clip()
    clean, flow = clip.unit(), method.flow(clip, clip.unit())
    assert samplings(clip.unit) == 1  # crop and resize
    assert samplings(lambda: recolour(Colour(jitter=1.0, blur=1.0), clean, clip.key)) == 0
    u, v = both_directions(clean)
    assert samplings(lambda: draw_views(AffineFlip(), u, v, direction_keys(clip.key))) == 2  # one per view
    pairs = method.pairs(flow, clip.key)
    assert samplings(lambda: method.pairs(flow, clip.key)) == 0
    assert samplings(lambda: method.cut(u, v, pairs)) <= 3


def test_subcrops_are_cut_from_the_coloured_crop_and_not_from_the_views(method, monkeypatch):
    clip, seen = make_clip(), {}
    cut = method.cut
    monkeypatch.setattr(method, "cut", lambda u, v, pairs: seen.update(u=u, v=v) or cut(u, v, pairs))
    method.losses(clip)
    coloured = recolour(method.colour, clip.unit(), clip.key)
    assert torch.equal(seen["u"], torch.cat([coloured[:, 0], coloured[:, 1]]))
    assert torch.equal(seen["v"], torch.cat([coloured[:, 1], coloured[:, 0]]))


def test_a_whole_step_samples_no_image_more_often(method):
    assert samplings(lambda: method.losses(make_clip())) <= 6


def test_a_whole_step_of_byol():
    method = BYOL(tiny_encoder(), hidden=8, out=8)
    assert samplings(lambda: method.losses(make_clip())) == 3
