import copy

import pytest
import torch
from lightly.loss import VICRegLoss
from side_by_side import in_two
from tiny_models import make_clip, tiny_crops, tiny_encoder, tiny_recipe
from torch import nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.methods.vicreg import VICReg
from poodle_lightning.types import UserError


def crops(size=(32, 32)):
    return MultiCrop(ResizedCrop(size, (0.2, 1.0), fit="redraw"), locals=0, colours=(), clip_wide=False)


def tiny(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "crops": crops(), "recipe": tiny_recipe()}
    return VICReg(tiny_encoder(), **{**sizes, **kwargs}).double().eval()


def by_loops(x, y):
    """The three terms, dimension by dimension."""
    rows, dims = x.shape
    invariance = sum((x[i, d] - y[i, d]) ** 2 for i in range(rows) for d in range(dims)) / (rows * dims)
    variance, covariance = 0.0, 0.0
    for z in (x, y):
        centred = [z[:, d] - z[:, d].sum() / rows for d in range(dims)]
        for i in range(dims):
            deviation = ((centred[i] ** 2).sum() / (rows - 1) + 1e-4).sqrt()
            variance = variance + torch.clamp(1 - deviation, min=0) / dims / 2
            for j in range(dims):
                if i != j:
                    covariance = covariance + ((centred[i] * centred[j]).sum() / (rows - 1)) ** 2 / dims
    return {"invariance": 25 * invariance, "variance": 25 * variance, "covariance": covariance}


def test_terms_and_gradients_equal_the_formulas():
    method = tiny()
    twin, clip = copy.deepcopy(method), make_clip(batch=3)
    terms = method.losses(clip)
    sum(terms.values()).backward()
    views = twin.crops(clip).large
    x, y = (torch.cat([twin.online.pooled(image[None]) for image in view]) for view in views)
    wanted = by_loops(x, y)
    sum(wanted.values()).backward()
    assert list(terms) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value)
    for one, other in zip(method.online.parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(sum(terms.values()), VICRegLoss()(x, y))


def test_each_view_is_a_batch_of_its_own_to_batch_norm():
    method, clip = tiny().train(), make_clip()
    twin = copy.deepcopy(method)
    x, y = (twin.online.pooled(view) for view in twin.crops(clip).large)
    torch.testing.assert_close(sum(method.losses(clip).values()), sum(by_loops(x, y).values()))


def test_the_weights_weigh():
    clip = make_clip()
    once = tiny().losses(clip)
    other = tiny(invariance=5.0, variance=50.0, covariance=3.0).losses(clip)
    for name, factor in {"invariance": 0.2, "variance": 2.0, "covariance": 3.0}.items():
        torch.testing.assert_close(other[name], factor * once[name])


def test_gradients_reach_everything():
    method = tiny().train()
    sum(method.losses(make_clip()).values()).backward()
    assert [n for n, p in method.named_parameters() if p.grad is None] == []
    assert method.target is None


def test_the_expander_and_the_views_are_as_published():
    method = VICReg(tiny_encoder())
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in method.online.projector] == kinds
    assert [method.online.projector[i].out_features for i in (0, 3, 6)] == [8192] * 3
    assert method.online.projector[6].bias is None
    crop = method.crops.large
    assert (crop.size, crop.area, crop.flip) == ((224, 224), (0.08, 1.0), 0.5)
    assert [(c.blur, c.solarize, c.factors) for c in method.crops.colours] == [
        (1.0, 0.0, (0.4, 0.4, 0.2, 0.1)),
        (0.1, 0.2, (0.4, 0.4, 0.2, 0.1)),
    ]


def test_two_processes_equal_one():
    """BatchNorm frozen: variances and covariances are those of both."""
    clip, start = make_clip(batch=4), tiny()

    def run(part):
        method = copy.deepcopy(start)
        loss = sum(method.losses(clip[part]).values())
        loss.backward()
        return {"loss": loss.detach(), "gradients": [p.grad for p in method.parameters()]}

    first, second = in_two(lambda rank: run(slice(2 * rank, 2 * rank + 2)))
    alone = run(slice(0, 4))
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, alone["loss"])
    for one, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


def test_look_shows_both_views_of_the_first_frames():
    method, clip = tiny(), make_clip(frames=3)
    large = method.look(clip).large
    assert large.shape == (2, 2, 3, 32, 32)
    assert torch.equal(large[1, 0], method.crops(clip).large[0, 3])


def test_an_image_left_over_alone_in_validation_is_not_counted():
    method, logged = tiny(), []
    method.log_dict = lambda logs, **kwargs: logged.append(logs)
    assert float(method.validation_step(make_clip(batch=1, frames=1), 0)) == 0.0
    assert logged == []
    method.validation_step(make_clip(batch=2, frames=1), 0)
    assert set(logged[0]) == {f"val/loss{term}" for term in ("", "_invariance", "_variance", "_covariance")}


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(UserError, match=r"VICReg needs two images or more .* data\.batch_size"):
        tiny().train().losses(make_clip(batch=1, frames=1))


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"VICReg compares two crops .* crops\.locals=0, not 2 and 2"):
        tiny(crops=tiny_crops())
