import copy
import math

import pytest
import torch
from lightly.loss import NTXentLoss
from side_by_side import in_two
from tiny_models import make_clip, tiny_crops, tiny_encoder, tiny_recipe, tiny_vit
from torch import nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.methods.simclr import SimCLR
from poodle_lightning.types import UserError


def crops(size=(32, 32)):
    return MultiCrop(ResizedCrop(size, (0.2, 1.0), fit="redraw"), locals=0, colours=(), clip_wide=False)


def tiny(encoder=None, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "crops": crops(), "recipe": tiny_recipe()}
    return SimCLR(encoder or tiny_encoder(), **{**sizes, **kwargs}).double().eval()


def nt_xent_by_loops(rows, temperature):
    """Eq. 1 over 2·N rows, of which n and n + N are partners."""
    unit = [row / row.norm() for row in rows]
    half, losses = len(rows) // 2, []
    for i, one in enumerate(unit):
        scores = {j: one @ other / temperature for j, other in enumerate(unit) if j != i}
        partner = (i + half) % len(rows)
        losses.append(torch.stack(list(scores.values())).logsumexp(dim=0) - scores[partner])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("last_norm", [True, False])
def test_loss_and_gradients_equal_the_formula_image_by_image(last_norm):
    method = tiny(last_norm=last_norm)
    twin, clip = copy.deepcopy(method), make_clip(batch=3)
    loss = method.losses(clip)["contrast"]
    loss.backward()
    views = twin.crops(clip).large
    assert views.shape == (2, 6, 3, 32, 32)
    rows = torch.cat([twin.online.pooled(view[None]) for view in views.flatten(0, 1)])
    wanted = nt_xent_by_loops(rows, 0.1)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(method.online.parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    theirs = NTXentLoss(temperature=0.1)(*rows.chunk(2))
    torch.testing.assert_close(loss, theirs)


def test_both_views_are_one_batch_to_batch_norm():
    method, clip = tiny().train(), make_clip()
    x = copy.deepcopy(method)
    rows = x.online.pooled(x.crops(clip).large.flatten(0, 1))
    torch.testing.assert_close(method.losses(clip)["contrast"], nt_xent_by_loops(rows, 0.1))


def test_gradients_reach_everything():
    method = tiny(temperature=0.5)
    method.losses(make_clip())["contrast"].backward()
    assert [n for n, p in method.named_parameters() if not p.grad.abs().sum() > 0] == []
    assert method.target is None


def test_the_projector_is_as_published():
    """linear, BatchNorm, ReLU, linear, BatchNorm: 2048 → 2048 → 128."""
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    projector = SimCLR(crops=crops()).online.projector
    assert [type(layer) for layer in projector] == kinds
    assert [projector[i].weight.shape for i in (0, 3)] == [(2048, 2048), (128, 2048)]
    assert projector[0].bias is projector[3].bias is None
    assert [type(layer) for layer in tiny(last_norm=False).online.projector] == kinds[:4]
    assert tiny(last_norm=False).online.projector[3].bias is not None


def test_the_views_are_drawn_as_published():
    crops = SimCLR(tiny_encoder(), hidden=8, out=4).crops
    assert (crops.large.size, crops.large.area, crops.large.flip) == ((224, 224), (0.08, 1.0), 0.5)
    assert (crops.views, crops.locals, crops.clip_wide) == (2, 0, False)
    for colour in crops.colours:
        assert colour.factors == (0.8, 0.8, 0.8, 0.2)
        assert (colour.jitter, colour.gray, colour.blur, colour.solarize) == (0.8, 0.2, 0.5, 0.0)


def test_two_processes_equal_one():
    """BatchNorm frozen: negatives of both, and the gradient that reaches them."""
    clip, start = make_clip(batch=4), tiny()

    def run(part):
        method = copy.deepcopy(start)
        loss = method.losses(clip[part])["contrast"]
        loss.backward()
        return {"loss": loss.detach(), "gradients": [p.grad for p in method.parameters()]}

    first, second = in_two(lambda rank: run(slice(2 * rank, 2 * rank + 2)))
    alone = run(slice(0, 4))
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, alone["loss"])
    for one, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


def test_stochastic_depth_follows_from_the_clips():
    method, clip = tiny(tiny_vit(drop_path=0.5)).train(), make_clip(batch=4)
    method.log_dict = lambda *args, **kwargs: None
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(math.exp(float(method.training_step(clip, 0).detach())))
    assert found[0] == found[1]
    other = float(method.training_step(make_clip(batch=4, seed=1), 0).detach())
    assert math.exp(other) != found[0]


def test_look_shows_both_views_of_the_first_frames():
    method, clip = tiny(), make_clip(frames=3)
    large = method.look(clip).large
    assert large.shape == (2, 2, 3, 32, 32)
    assert torch.equal(large[1, 0], method.crops(clip).large[0, 3])


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"SimCLR compares two crops .* crops\.locals=0, not 2 and 2"):
        tiny(crops=tiny_crops())
    with pytest.raises(UserError, match=r"crops\.large\.size=\[30, 30\] does not divide"):
        tiny(tiny_vit(), crops=crops((30, 30)))
