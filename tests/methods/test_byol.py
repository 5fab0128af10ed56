import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.methods.byol import BYOL


def tiny_byol(**kwargs) -> BYOL:
    torch.manual_seed(0)
    return BYOL(tiny_encoder(), hidden=16, out=8, crop=ResizedCrop((32, 32)), recipe=tiny_recipe(), **kwargs)


@pytest.mark.parametrize("frames", ["pair", "frame"])
def test_loss_equals_the_formula_in_float64(frames):
    """BYOL Eq. 2: ‖q̄(z_θ) − z̄'_ξ‖² for both orders, averaged over images, summed over orders."""
    method = tiny_byol(frames=frames).double().eval()
    clip = make_clip()
    a, b = method.views(clip)
    total, count = 0.0, 0
    for one, other in ((a, b), (b, a)):
        for i in range(len(one.image)):
            q = method.predictor(method.online.pooled(one.image[i : i + 1].double()))[0]
            t = method.target.module.pooled(other.image[i : i + 1].double())[0]
            total += float(((q / q.norm() - t / t.norm()) ** 2).sum())
            count += 1
    assert count == (4 if frames == "pair" else 8)
    assert abs(float(method.losses(clip)["pooled"]) - 2 * total / count) < 1e-9


def test_pair_views_come_from_the_two_frames_and_frame_views_from_one():
    clip = make_clip()
    clip.frames[:, 1] = 0  # a black second frame
    a, b = tiny_byol(frames="pair").views(clip)
    assert a.image.mean() > 0.1
    assert b.image.abs().max() < 1e-3  # black stays black under every operation of the recipe
    single_a, single_b = tiny_byol(frames="frame").views(clip)
    assert single_a.image[:2].mean() > 0.1
    assert single_b.image[:2].std() > 0.01  # first frames: textured in both views


def test_gradients_reach_everything_online_and_nothing_of_the_target():
    method = tiny_byol()
    method.losses(make_clip())["pooled"].backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None for p in method.target.parameters())


def test_residual_blocks_begin_as_their_shortcuts():
    """Haiku's ``BlockV1``: ``scale_init=jnp.zeros`` of a bottleneck's last BatchNorm."""
    encoder = BYOL().online.encoder
    blocks = [block for stage in range(1, 5) for block in getattr(encoder, f"layer{stage}")]
    assert len(blocks) == 16
    for block in blocks:
        assert not block.bn3.weight.any()
        assert block.bn2.weight.all()
