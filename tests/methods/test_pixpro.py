import copy

import pytest
import torch
from side_by_side import in_two
from tiny_models import make_clip, tiny_crops, tiny_encoder, tiny_recipe

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.methods.pixpro import PixPro, PyramidSizes
from poodle_lightning.types import UserError


def crops(size=(64, 64)):
    crop = ResizedCrop(size, (0.5, 1.0), fit="redraw")
    return MultiCrop(crop, locals=0, colours=(), clip_wide=False)


def tiny(levels=None, **kwargs):
    torch.manual_seed(0)
    decoder = PyramidSizes(8, levels) if levels else None
    sizes = {"hidden": 16, "out": 8, "crops": crops(), "recipe": tiny_recipe()}
    method = PixPro(tiny_encoder(), decoder, **{**sizes, **kwargs}).double().eval()
    with torch.no_grad():  # the copy is to be another network
        for parameter in method.target.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method


def one_direction(method, one, other, box_one, box_other):
    """Of one image: maps ``(D, h, w)``, and the corners of both crops in shares of the image."""
    (height, width), pairs = one.shape[1:], []
    smooth = method.propagation(one[None])[0]

    def sides(box):
        return torch.stack([(box[1] - box[0]).abs(), (box[3] - box[2]).abs()]) / torch.tensor([width, height])

    def centre(box, i, j):  # a flipped crop runs from the right to the left
        across, down = (j + 0.5) / width, (i + 0.5) / height
        return torch.stack([box[0] + across * (box[1] - box[0]), box[2] + down * (box[3] - box[2])])

    diagonal = max(float(sides(box).norm()) for box in (box_one, box_other))
    cells = [(i, j) for i in range(height) for j in range(width)]
    for i, j in cells:
        for k, m in cells:
            apart = (centre(box_one, i, j) - centre(box_other, k, m)).norm()
            if float(apart) / diagonal < method.threshold:
                y, t = smooth[:, i, j], other[:, k, m]
                pairs.append((y / y.norm()) @ (t / t.norm()))
    return -2 * torch.stack(pairs).mean() if pairs else smooth.sum() * 0


def by_loops(method, clip):
    """The published loss, image by image and pair by pair."""
    drawn = method.crops(clip)
    count = drawn.large.shape[1]
    matrices = drawn.large_to_clean.matrix.double()

    def box(view, n):  # shares of the image from the corners of the crop's extent, (-1, -1) and (1, 1)
        m = matrices[view * count + n]
        ends = [m @ torch.tensor([end, end, 1.0], dtype=torch.float64) for end in (-1.0, 1.0)]
        (x0, y0, _), (x1, y1, _) = ends
        return [(value + 1) / 2 for value in (x0, x1, y0, y1)]

    losses = []
    for n in range(count):
        a, b = (drawn.large[view, n][None].double() for view in (0, 1))
        maps = zip(method.online(a), method.online(b), method.target(a), method.target(b), strict=True)
        for x_a, x_b, t_a, t_b in maps:
            there = one_direction(method, x_a[0], t_b[0], box(0, n), box(1, n))
            losses.append(there + one_direction(method, x_b[0], t_a[0], box(1, n), box(0, n)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("levels", [None, ["layer3", "layer4"]])
def test_loss_and_gradients_equal_the_formula_pair_by_pair(levels):
    method = tiny(levels)
    twin, clip = copy.deepcopy(method), make_clip()
    loss = method.losses(clip)["pixel"]
    loss.backward()
    wanted = by_loops(twin, clip)
    wanted.backward()
    assert abs(float(wanted.detach())) > 1e-3
    torch.testing.assert_close(loss, wanted)
    for (name, one), other in zip(method.named_parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_gradients_reach_everything_online_and_nothing_of_the_target():
    method = tiny(["layer1", "layer2", "layer3", "layer4"])
    method.losses(make_clip())["pixel"].backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in method.target.parameters())


def test_a_clips_frames_are_images_of_their_own():
    method, clip = tiny(), make_clip(frames=3)
    assert method.crops(clip).large.shape == (2, 6, 3, 64, 64)
    assert method.look(clip).large.shape == (2, 2, 3, 64, 64)
    assert method.losses(clip)["pixel"].isfinite()


def test_the_exported_encoder_has_the_pyramid():
    both = tiny(["layer3", "layer4"]).backbone()
    assert both.strides["fpn"] == 16
    assert "fpn" not in tiny().backbone().channels


def test_the_defaults_are_the_papers():
    method = PixPro(tiny_encoder(), PyramidSizes())
    assert method.online.decoder.levels == ["layer1", "layer2", "layer3", "layer4"]
    assert method.online.projector[0].weight.shape == (4096, 256, 1, 1)
    assert (method.threshold, method.propagation.gamma) == (0.7, 2.0)
    assert (method.recipe.lr, method.recipe.min_lr, method.recipe.weight_decay) == (1.0, 1e-6, 1e-5)
    assert (method.recipe.ema_start, method.recipe.ema_end) == (0.99, 1.0)
    crop = method.crops.large
    assert (crop.size, crop.area, crop.flip) == ((224, 224), (0.08, 1.0), 0.5)


def test_two_processes_equal_one():
    """BatchNorm frozen."""
    clip, start = make_clip(batch=4), tiny()

    def run(part):
        method = copy.deepcopy(start)
        loss = method.losses(clip[part])["pixel"]
        loss.backward()
        gradients = [p.grad for p in method.parameters() if p.requires_grad]
        return {"loss": loss.detach(), "gradients": gradients}

    first, second = in_two(lambda rank: run(slice(2 * rank, 2 * rank + 2)))
    alone = run(slice(0, 4))
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, alone["loss"])
    for one, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"PixPro compares two crops .* crops\.locals=0, not 2 and 2"):
        tiny(crops=tiny_crops())
    with pytest.raises(UserError, match=r"levels=\['layer9'\] must be among"):
        tiny(["layer9"])
    with pytest.raises(UserError, match=r"threshold=0 leaves no positive pair"):
        tiny(threshold=0)
