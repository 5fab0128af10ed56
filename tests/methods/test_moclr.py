import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from side_by_side import in_two
from tiny_models import make_clip, tiny_encoder, tiny_recipe, tiny_vit

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.methods.moclr import MoCLR
from poodle_lightning.ops.random import fold
from poodle_lightning.types import UserError

PLAIN = Colour(0.0, 0.0, 0.0, 0.0, jitter=0.0, gray=0.0, blur=0.0)


def tiny(encoder=None, **kwargs):
    """In float64 and evaluation mode, the target apart from the online network."""
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "crop": ResizedCrop((32, 32), (0.4, 1.0)), "recipe": tiny_recipe()}
    method = MoCLR(encoder or tiny_encoder(), **{**sizes, **kwargs}).double().eval()
    for parameter in method.target.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter) * parameter.abs().mean())
    return method


def by_loops(z, t, temperature, negatives):
    """Eq. 1 for every clip and every ordered pair of views."""
    total, clips = 0.0, len(z[0])
    z, t = ([[row / row.norm() for row in view] for view in rows] for rows in (z, t))
    for b in range(clips):
        for i in range(len(z)):
            for j in set(range(len(z))) - {i}:
                among = range(len(t)) if negatives == "all" else [j]
                scores = [z[i][b] @ t[j][b] / temperature]
                scores += [z[i][b] @ t[k][n] / temperature for n in range(clips) for k in among if n != b]
                total = total + torch.stack(scores).logsumexp(dim=0) - scores[0]
    return total / clips


@pytest.mark.parametrize("negatives", ["all", "partner"])
@pytest.mark.parametrize(("views", "frames"), [(2, 2), (3, 3), (3, 1)])
def test_loss_and_gradients_equal_the_formula_image_by_image(views, frames, negatives):
    method = tiny(views=views, negatives=negatives, temperature=0.2)
    twin, clip = copy.deepcopy(method), make_clip(batch=3, frames=frames)
    loss = method.losses(clip)["contrast"]
    loss.backward()
    images = twin.views(clip)
    assert images.shape == (views, 3, 3, 32, 32)
    z, t = (
        [[network.pooled(image[None])[0] for image in view] for view in images]
        for network in (twin.online, twin.target.module)
    )
    wanted = by_loops(z, t, 0.2, negatives)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(method.online.parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_reach_everything_online_and_nothing_of_the_target():
    method = tiny()
    method.losses(make_clip())["contrast"].backward()
    assert [n for n, p in method.online.named_parameters() if not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in method.target.parameters())


def test_every_frame_becomes_one_view_and_any_of_them():
    """Frames of one grey each: every view shows its own, and no view always the same."""
    clip = make_clip(batch=40, frames=3)
    greys = torch.tensor([50, 100, 150], dtype=torch.uint8).reshape(1, 3, 1, 1, 1)
    clip = replace(clip, frames=greys.expand_as(clip.frames).contiguous())
    views = tiny(views=3, colour_a=PLAIN, colour_b=PLAIN).views(clip)
    shown = (views.mean(dim=(2, 3, 4)) * 255).round().long()  # (V, B)
    assert torch.equal(shown.sort(dim=0).values, torch.tensor([50, 100, 150])[:, None].expand(3, 40))
    assert len({tuple(order) for order in shown.t().tolist()}) == 6


def test_views_are_cut_by_their_own_draws():
    """Against crops drawn one by one: each view's key, whichever frame it is of."""
    method, clip = tiny(views=3, colour_a=PLAIN, colour_b=PLAIN), make_clip(frames=3)
    views, clean = method.views(clip), clip.unit()
    for v in range(3):
        for b in range(2):
            key = fold(fold(clip.key[b : b + 1], "view", v), "crop")
            cut = [method.crop(clean[b, t][None], key).image[0] for t in range(3)]
            assert min(float((views[v, b] - image).abs().max()) for image in cut) < 1e-5


def test_the_third_view_is_coloured_as_the_first():
    black = Colour(0.0, 0.0, 0.0, 0.0, jitter=0.0, gray=1.0, blur=0.0)
    views = tiny(views=3, colour_a=black, colour_b=PLAIN).views(make_clip(frames=1))
    grey = [(view[:, 0] - view[:, 2]).abs().max() < 1e-6 for view in views]
    assert grey == [True, False, True]


def test_the_views_of_a_clip_do_not_depend_on_the_batch():
    method, clip = tiny(views=3), make_clip(batch=4, frames=3)
    torch.testing.assert_close(method.views(clip)[:, 2:], method.views(clip[2:4]), rtol=0, atol=1e-6)


def test_published_numbers():
    method = MoCLR(tiny_encoder())
    assert (method.online.projector[0].out_features, method.online.projector[3].out_features) == (4096, 256)
    assert (method.crop.size, method.crop.area, method.crop.flip) == ((224, 224), (0.4, 1.0), 0.5)
    for colour, blur, solarize in ((method.colour_a, 1.0, 0.0), (method.colour_b, 0.1, 0.2)):
        assert colour.factors == (0.4, 0.4, 0.2, 0.1)
        assert (colour.jitter, colour.gray, colour.blur, colour.solarize) == (0.8, 0.2, blur, solarize)
    assert (method.recipe.optimizer, method.recipe.scaled_lr(4096)) == ("lars", pytest.approx(4.8))


def test_crops_of_wide_frames_are_cut_to_them():
    """The law of BYOL's code (``_decode_and_random_crop``): area and ratio once, sides cut to the frame's."""
    crop, count, (height, width) = MoCLR(tiny_encoder()).crop, 4000, (900, 1600)
    keys = fold(torch.arange(count), "crop")
    boxes = crop.draw(keys, (32, 42), torch.full((count,), width / height)).matrix.numpy()
    draws = np.random.default_rng(0)
    area = draws.uniform(0.4, 1.0, count) * height * width
    ratio = np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3), count))
    w, h = np.minimum(np.sqrt(area * ratio), width), np.minimum(np.sqrt(area / ratio), height)
    left = draws.uniform(0.0, 1.0, count) * (width - w)
    found = np.abs(boxes[:, 0, 0]), boxes[:, 1, 1], (boxes[:, 0, 2] - np.abs(boxes[:, 0, 0]) + 1) / 2
    for ours, theirs in zip(found, (w / width, h / height, left / width), strict=True):
        assert ks_2samp(ours, theirs).pvalue > 1e-3


def test_two_processes_equal_one():
    """BatchNorm frozen: negatives of both."""
    clip, start = make_clip(batch=4), tiny()

    def run(part):
        method = copy.deepcopy(start)
        loss = method.losses(clip[part])["contrast"]
        loss.backward()
        return {"loss": loss.detach(), "gradients": [p.grad for p in method.online.parameters()]}

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
        found.append(float(method.training_step(clip, 0).detach()))
    assert found[0] == found[1]


def test_look_shows_the_views():
    method, clip = tiny(), make_clip()
    assert torch.equal(method.look(clip).large, method.views(clip).transpose(0, 1))


def test_frames_and_views_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"MoCLR makes 2 views of clips of 1 or 2 frames, not 3: .*views=3"):
        tiny().losses(make_clip(frames=3))
    with pytest.raises(UserError, match=r"set model\.views=2 or 3, not 1"):
        tiny(views=1)


def test_a_batch_of_one_clip_is_refused_in_training_only():
    """A held-out batch may be the rest of others."""
    method, clip = tiny(), make_clip(batch=1)
    assert method.losses(clip)["contrast"] == 0
    with pytest.raises(UserError, match=r"the others of its batch: set data\.batch_size to 2 or more$"):
        method.train().losses(clip)
