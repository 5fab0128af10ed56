import math

import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.models.utils import select_most_similar
from tiny_models import make_clip, tiny_encoder, tiny_recipe, tiny_vit
from torch import nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.methods.densecl import DenseCL
from poodle_lightning.types import UserError

SIZE = (64, 64)


def crops():
    return MultiCrop(ResizedCrop(SIZE, (0.2, 1.0), fit="redraw"), locals=0, colours=(), clip_wide=False)


def tiny(encoder=None, **kwargs):
    """In float64, weights apart from their copies', BatchNorm with running statistics; queues take keys."""
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "queue": 10, "crops": crops(), "recipe": tiny_recipe()}
    method = DenseCL(encoder or tiny_encoder(), **{**sizes, **kwargs}).double()
    with torch.no_grad():
        for parameter in method.target.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for queue in (method.queue, method.dense_queue):
            queue.rows.copy_(nn.functional.normalize(queue.rows, dim=1))
    for module in method.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return method


def contrast(q, k, negatives, temperature):
    """−log of the positive's share, with a graph."""
    q, k = q / q.norm(), k / k.norm()
    scores = torch.stack([q @ k, *(q @ n for n in negatives)]) / temperature
    return scores.logsumexp(dim=0) - scores[0]


def by_loops(method, clip):
    """Eqs. 1 to 4, image by image and cell by cell; and the keys of both queues."""
    online, target = method.online, method.target.module
    terms, keys, dense_keys = {"global": [], "dense": []}, [], []
    for x_q, x_k in zip(*method.views(clip), strict=True):
        f1 = online.encoder(x_q[None]).maps["layer4"][0]
        with torch.no_grad():
            f2 = target.encoder(x_k[None]).maps["layer4"][0]
            theta2 = target.dense_projector(f2[None])[0].flatten(1).t()
            keys.append(target.projector(f2.mean(dim=(1, 2))))
            dense_keys.append(theta2.mean(dim=0))
        theta1 = online.dense_projector(f1[None])[0].flatten(1).t()
        q = online.projector(f1.mean(dim=(1, 2)))
        terms["global"].append(contrast(q, keys[-1], method.queue.rows, method.temperature))
        cells, others = f1.detach().flatten(1).t(), f2.flatten(1).t()
        for i, cell in enumerate(cells):
            cosines = [float(cell @ o) / math.sqrt(float(cell @ cell) * float(o @ o)) for o in others]
            c = cosines.index(max(cosines))
            terms["dense"].append(contrast(theta1[i], theta2[c], method.dense_queue.rows, method.temperature))
    weights = {"global": 1 - method.loss_weight, "dense": method.loss_weight}
    found = {name: weights[name] * torch.stack(values).mean() for name, values in terms.items()}
    return found, torch.stack(keys), torch.stack(dense_keys)


@pytest.mark.parametrize("weight", [0.5, 0.7])
def test_loss_gradients_and_queues_equal_loops(weight):
    method, twin = tiny(loss_weight=weight), tiny(loss_weight=weight)
    for seed in range(2):  # 4 keys a batch
        clip = make_clip(seed=seed)
        found, wanted = method.losses(clip), by_loops(twin, clip)
        torch.testing.assert_close(found, wanted[0])
        torch.stack(list(found.values())).sum().backward()
        torch.stack(list(wanted[0].values())).sum().backward()
        for name, rows in (("queue", wanted[1]), ("dense_queue", wanted[2])):
            places = slice(4 * seed, 4 * seed + 4)
            getattr(twin, name).rows[places] = nn.functional.normalize(rows, dim=1)
            torch.testing.assert_close(getattr(method, name).rows, getattr(twin, name).rows)
    for (name, one), other in zip(method.online.named_parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_both_losses_equal_lightlys():
    """Its matching and its loss with a memory bank, of the same projections."""
    method, clip = tiny(), make_clip()
    found = {name: float(term.detach()) for name, term in tiny().losses(clip).items()}
    with torch.no_grad():
        q, k = (
            net(x) for net, x in zip((method.online, method.target.module), method.views(clip), strict=True)
        )
    cells = [x.flatten(2).transpose(1, 2) for x in (q.features, k.features, q.grid, k.grid)]
    positives = select_most_similar(cells[0], cells[1], cells[3])
    pairs = {"global": (q.vector, k.vector), "dense": (cells[2].flatten(0, 1), positives.flatten(0, 1))}
    for (name, both), queue in zip(pairs.items(), (method.queue, method.dense_queue), strict=True):
        theirs = NTXentLoss(temperature=0.2, memory_bank_size=(10, 8))
        theirs.memory_bank.bank = queue.rows.clone()
        assert found[name] == pytest.approx(0.5 * float(theirs(*both)), rel=1e-9)


def test_gradients_reach_everything_online_and_nothing_else():
    method = tiny()
    torch.stack(list(method.losses(make_clip()).values())).sum().backward()
    assert [n for n, p in method.online.named_parameters() if not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in method.target.parameters())


def test_the_two_queues_begin_apart_and_are_kept():
    method = tiny()
    assert not torch.allclose(method.queue.rows, method.dense_queue.rows)
    assert {"queue.rows", "queue.place", "dense_queue.rows", "dense_queue.place"} <= set(method.state_dict())


def test_the_cells_of_a_vision_transformer_are_its_patches():
    method = tiny(tiny_vit())
    assert method.online(torch.rand(2, 3, 32, 32).double()).grid.shape == (2, 8, 16)
    assert all(float(value.detach()) > 0 for value in method.losses(make_clip()).values())


def test_other_crops_than_two_are_refused():
    with pytest.raises(UserError, match=r"DenseCL compares two crops .* not 2 and 8"):
        tiny(crops=MultiCrop())
