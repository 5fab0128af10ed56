import pytest
import torch
from lightly.loss import DINOLoss
from tiny_models import make_clip, stirred, tiny_crops, tiny_encoder, tiny_head, tiny_recipe, tiny_vit

from poodle_lightning import DINO


def tiny(encoder=None, **crops) -> DINO:
    torch.manual_seed(0)
    return stirred(DINO(encoder or tiny_vit(), tiny_head(), tiny_crops(**crops), recipe=tiny_recipe()))


def views(method, clip):
    """All crops one after the other, ``(N, 3, h, w)`` each."""
    crops = method.crops(clip)
    small = [] if crops.small is None else list(crops.small)
    return list(crops.large), small


def softmax(row):
    weights = (row - row.max()).exp()
    return weights / weights.sum()


@pytest.mark.parametrize("count", [{}, {"views": 3, "locals": 1}, {"locals": 0}])
@pytest.mark.parametrize("frames", [1, 3])
def test_loss_and_gradient_equal_the_formula_in_loops(frames, count):
    """DINO Eq. 3 with centring and sharpening: image by image, crop by crop, float64."""
    method, clip = tiny(**count), make_clip(frames=frames)
    large, small = views(method, clip)
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    total, terms = 0.0, 0
    for u, seen in enumerate(large):
        for v, shown in enumerate([*large, *small]):
            if u == v:
                continue
            terms += 1
            for image, other in zip(seen, shown, strict=True):
                with torch.no_grad():
                    teacher = method.teacher.head(method.teacher.encoder(image[None]).vector)[0]
                    p = softmax((teacher - method.centre.value) / 0.04)
                student = method.student.head(method.student.encoder(other[None]).vector)[0]
                total = total - (p * softmax(student / 0.1).log()).sum() / len(seen)
    expected = total / terms
    loss = method.losses(clip)["cls"]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    wanted = torch.autograd.grad(expected, parameters)
    for found, gradient in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        # positions are interpolated for the small crops in float32
        assert (found - gradient).norm() <= 1e-6 * gradient.norm() + 1e-14
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())


def test_loss_and_centre_are_lightlys():
    method, clip = tiny(), make_clip(batch=3)
    large, small = views(method, clip)
    reference = DINOLoss(64, teacher_temp=0.04, warmup_teacher_temp_epochs=0).double()
    reference.center.copy_(method.centre.value)
    with torch.no_grad():
        teacher = [method.teacher.logits(view) for view in large]
        student = [method.student.logits(view) for view in [*large, *small]]
        expected = reference(teacher, student)
    method.centre.train().float()
    # its temperature is rounded to float32
    assert float(method.losses(clip)["cls"].detach()) == pytest.approx(float(expected), rel=1e-6)
    method.after_step()
    assert torch.allclose(method.centre.value.double(), reference.center.flatten(), rtol=0, atol=1e-6)


def test_residual_networks_learn_too():
    torch.manual_seed(0)
    method = DINO(tiny_encoder(), tiny_head(batch_norm=True), tiny_crops(), recipe=tiny_recipe())
    method.losses(make_clip())["cls"].backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)


def test_pictures_show_the_crops_of_the_first_frames_as_training_draws_them():
    method, clip = tiny(), make_clip(batch=3, frames=2)
    look, crops = method.look(clip), method.crops(clip)
    assert look.large.shape == (3, 2, 3, 32, 32)
    assert torch.equal(look.large[2, 1], crops.large[1, 4])
    assert torch.equal(look.small[1, 0], crops.small[0, 2])
