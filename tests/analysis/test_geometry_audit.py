import pytest
import torch

from poodle_lightning.analysis.geometry_audit import Motion, audit, upsampling_error
from poodle_lightning.augment.geometric import AffineFlip
from poodle_lightning.data.windows import WindowRule
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import View

RULES = {
    "paper": WindowRule((128, 256), scale=(0.75, 1.25), reference=(270, 480)),
    "area": WindowRule((96, 192), area=(0.2, 0.5)),
    "area, reduced pixels": WindowRule((48, 96), area=(0.2, 0.9), antialias=True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("view", [None, AffineFlip(), AffineFlip(30.0, (0.5, 2.0))])
def test_errors_are_below_a_hundredth_of_a_pixel(rule, view):
    result = audit(RULES[rule], view, frame=(270, 480), trials=4)
    assert result.passed, result
    assert result.covered > 0.2


def test_the_audit_sees_the_authors_order():
    result = audit(RULES["paper"], AffineFlip(), frame=(270, 480), trials=2, order="code")
    assert result.target > 0.5
    assert result.online < 0.01


def test_the_audit_sees_half_a_pixel():
    """A view whose map is half a pixel off, as a mixed-up align_corners would make it."""

    def crooked(images, keys):
        drawn = AffineFlip()(images, keys)
        shift = torch.eye(3)
        shift[0, 2] = 1.0 / images.shape[-1]
        return View(drawn.image, type(drawn.to_clean)(shift @ drawn.to_clean.matrix))

    assert audit(RULES["paper"], crooked, frame=(270, 480), trials=2).online > 0.3


def test_motion_goes_there_and_back():
    motion = Motion.draw(key_of(1), (100, 200))
    points = torch.rand(50, 2).double() * 100
    assert torch.allclose(motion.back(motion(points)), points, atol=1e-10)
    assert (motion(points) - points).norm(dim=1).max() > 1


def test_upsampling_is_exact_off_the_border():
    assert upsampling_error() < 1e-5
