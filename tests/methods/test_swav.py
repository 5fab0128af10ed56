import copy
from types import SimpleNamespace

import pytest
import torch
from lightly.loss import SwaVLoss
from side_by_side import in_two
from tiny_models import make_clip, tiny_crops, tiny_encoder, tiny_recipe, tiny_vit

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.methods.swav import SwAV
from poodle_lightning.types import UserError


def tiny(encoder=None, epoch=0, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "prototypes": 5, "queue": 8, "freeze_steps": 0}
    crops = tiny_crops(clip_wide=False)
    method = SwAV(encoder or tiny_encoder(), **{**sizes, "crops": crops, "recipe": tiny_recipe(), **kwargs})
    method._trainer = SimpleNamespace(current_epoch=epoch, global_step=0)
    return method.double().eval()


def embedded(method, clip):
    """Rows of each crop of each image, one by one."""
    crops = method.crops(clip)
    net = method.online
    views = [*crops.large, *crops.small]
    rows = [
        torch.stack([net.projector(net.encoder(image[None]).vector)[0] for image in view]) for view in views
    ]
    return [torch.stack([z / z.norm() for z in view]) for view in rows]


def assigned(scores, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp on exponentials (Eq. 3-5)."""
    q = (scores / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def swapped(views, c, earlier=None):
    """Eq. 1 over all crops: of each large one to every other crop."""
    losses = []
    for u in range(2):
        scores = views[u] @ c.t()
        together = scores if earlier is None else torch.cat([earlier[u] @ c.t(), scores])
        q = assigned(together.detach())[-len(scores) :]
        others = [view for v, view in enumerate(views) if v != u]
        losses += [-(q * (view @ c.t() / 0.1).log_softmax(dim=1)).sum(dim=1).mean() for view in others]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("epoch", [0, 15])
def test_loss_and_gradients_equal_the_formula_image_by_image(epoch):
    """Without the queue, and with it."""
    method = tiny(epoch=epoch)
    twin, clip = copy.deepcopy(method), make_clip(batch=3)
    loss = method.losses(clip)["swap"]
    loss.backward()
    views = embedded(twin, clip)
    assert [view.shape for view in views] == [(6, 8)] * 4
    earlier = None if epoch == 0 else [queue.rows for queue in twin.queues]
    wanted = swapped(views, twin.online.prototypes.weight, earlier)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(method.online.parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_queue_changes_the_assignments():
    clip = make_clip(batch=3)
    found = [float(tiny(epoch=epoch).losses(clip)["swap"].detach()) for epoch in (14, 15)]
    assert abs(found[0] - found[1]) > 1e-4


def test_loss_equals_lightlys():
    method, clip = tiny(queue=0), make_clip(batch=3)
    scores = [view @ method.online.prototypes.weight.t() for view in embedded(method, clip)]
    theirs = SwaVLoss()(scores[:2], scores[2:])
    torch.testing.assert_close(method.losses(clip)["swap"], theirs[0], rtol=1e-5, atol=1e-7)


def test_embeddings_join_the_queue_of_their_crop_from_the_epoch_before():
    clip = make_clip()
    early, late = tiny(epoch=13).train(), tiny(epoch=14).train()
    before = [queue.rows.clone() for queue in early.queues]
    z = copy.deepcopy(late).embeddings(late.crops(clip))
    early.losses(clip)
    late.losses(clip)
    assert not torch.equal(before[0], before[1])
    for number in range(2):
        assert torch.equal(early.queues[number].rows, before[number])
        torch.testing.assert_close(late.queues[number].rows[:4], z[number])
        assert torch.equal(late.queues[number].rows[4:], before[number][4:])


def test_prototypes_have_length_one_behind_each_step_and_are_frozen_at_first():
    method = tiny(freeze_steps=2)
    weight = method.online.prototypes.weight
    for step, frozen in enumerate((True, True, False)):
        method._trainer.global_step = step
        method.losses(make_clip())["swap"].backward()
        method.on_before_optimizer_step(None)
        assert (weight.grad is None) == frozen
    with torch.no_grad():
        weight.mul_(3.0)
    direction = weight / weight.norm(dim=1, keepdim=True)
    method.after_step()
    torch.testing.assert_close(weight, direction)


def test_gradients_reach_everything():
    method = tiny().train()
    method.losses(make_clip())["swap"].backward()
    assert [n for n, p in method.named_parameters() if p.grad is None] == []
    assert method.target is None


def test_the_crops_are_drawn_as_published():
    crops = SwAV(tiny_encoder(), hidden=8, out=4, prototypes=3, queue=0).crops
    assert (crops.large.size, crops.large.area) == ((224, 224), (0.14, 1.0))
    assert (crops.small.size, crops.small.area) == ((96, 96), (0.05, 0.14))
    assert (crops.views, crops.locals, crops.clip_wide) == (2, 6, False)
    for colour in (*crops.colours, crops.local_colour):
        assert colour.factors == (0.8, 0.8, 0.8, 0.2)
        assert (colour.jitter, colour.gray, colour.blur, colour.solarize) == (0.8, 0.2, 0.5, 0.0)


@pytest.mark.parametrize("epoch", [0, 15])
def test_two_processes_equal_one(epoch):
    """BatchNorm frozen: assignments are over the samples of both, and over the queue once."""
    clip, start = make_clip(batch=4), tiny(epoch=epoch)
    start.queues.train()

    def run(part):
        method = copy.deepcopy(start)
        loss = method.losses(clip[part])["swap"]
        loss.backward()
        rows = [queue.rows for queue in method.queues]
        return {"loss": loss.detach(), "gradients": [p.grad for p in method.parameters()], "rows": rows}

    first, second = in_two(lambda rank: run(slice(2 * rank, 2 * rank + 2)))
    alone = run(slice(0, 4))
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, alone["loss"])
    for one, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close((one + other) / 2, whole)
    for one, other, whole in zip(first["rows"], second["rows"], alone["rows"], strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, whole)


def test_look_shows_the_crops_of_the_first_frames():
    look = tiny().look(make_clip(frames=3))
    assert look.large.shape == (2, 2, 3, 32, 32)
    assert look.small.shape == (2, 2, 3, 16, 16)


def test_what_does_not_fit_is_refused():
    crop = ResizedCrop((30, 30), (0.4, 1.0), fit="redraw")
    with pytest.raises(UserError, match=r"crops\.large\.size=\[30, 30\] does not divide"):
        tiny(tiny_vit(), crops=MultiCrop(crop, locals=0))
    with pytest.raises(UserError, match=r"raise crops\.views"):
        tiny(crops=MultiCrop(crop, locals=0, views=1))
    with pytest.raises(UserError, match=r"model\.queue_epoch: set it to 1"):
        tiny(queue_epoch=0)
    for wrong in ("temperature", "epsilon", "prototypes", "iterations"):
        with pytest.raises(UserError, match=rf"SwAV: set .*{wrong}=0"):
            tiny(**{wrong: 0})
    with pytest.raises(UserError, match=r"queue=-1 to 0 or more"):
        tiny(queue=-1)
