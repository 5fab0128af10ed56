import math

import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe, tiny_vit

from poodle_lightning import MAE, from_pretrained, save_pretrained
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.methods.mae import DecoderSizes
from poodle_lightning.types import UserError


def tiny(**kwargs) -> MAE:
    torch.manual_seed(0)
    crop = ResizedCrop((32, 32), (0.2, 1.0))
    encoder = tiny_vit(positions="sincos")
    return MAE(encoder, crop, decoder=DecoderSizes(16, 1, 2), recipe=tiny_recipe(), **kwargs).double()


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_equals_the_formula_in_loops(normalise):
    """facebookresearch/mae forward_loss: image by image, patch by patch; each channel by its mean first."""
    method, clip = tiny(normalise=normalise), make_clip(frames=3)
    images, (keep, hidden) = method.images(clip), method.draw(clip)
    assert len(images) == 6
    total, count = 0.0, 0
    for i, image in enumerate(images):
        tokens = method.online.encoder.tokens(image[None], keep[i : i + 1])
        predicted = method.decoder(tokens, keep[i : i + 1])[0]
        seen = (image.double() - method.online.encoder.mean) / method.online.encoder.std
        for n in set(range(16)) - set(keep[i].tolist()):
            assert hidden[i, n]
            y, x = 8 * (n // 4), 8 * (n % 4)
            patch = seen[:, y : y + 8, x : x + 8]
            if normalise:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            for colour in range(3):
                told = predicted[n].reshape(8, 8, 3)[..., colour]
                total = total + ((told - patch[colour]) ** 2).sum()
            count += 1
    assert count == 6 * 12  # three of four
    loss = method.losses(clip)["pixels"]
    expected = total / (count * 8 * 8 * 3)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    parameters = [p for p in method.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    for found, gradient in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert (found - gradient).norm() <= 1e-8 * gradient.norm() + 1e-14


def test_crops_and_masks_belong_to_the_frame_not_to_the_batch():
    method, clip = tiny(), make_clip(batch=4, frames=2)
    images, (keep, _) = method.images(clip), method.draw(clip)
    assert torch.equal(images[4:], method.images(clip[2:]))
    assert torch.equal(keep[4:], method.draw(clip[2:])[0])
    assert len({tuple(row) for row in keep.tolist()}) == 8


@pytest.mark.parametrize("normalise", [True, False])
def test_pictures_keep_what_was_seen_and_show_what_is_told(normalise):
    method, clip = tiny(normalise=normalise), make_clip(batch=3)
    look = method.look(clip)
    masks = look.hidden.double().repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)[:, :, None]
    assert torch.allclose(look.restored * (1 - masks), look.large * (1 - masks), atol=1e-6)
    assert (look.restored - look.large).abs().mean() > 0.01
    # told without an error, the image is there again
    perfect = method.target_patches(method.images(clip))
    if normalise:
        perfect = (perfect - perfect.mean(-1, True)) / (perfect.var(-1, keepdim=True) + 1e-6).sqrt()
    method.decoder.forward = lambda tokens, keep: perfect
    assert torch.allclose(method.look(clip).restored, look.large.double(), atol=1e-6)


def test_there_is_no_target_and_positions_stay():
    method = tiny()
    assert method.target is None
    assert "online.encoder.pos_embed" not in dict(method.named_parameters())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_an_untrained_encoder_starts_as_the_original(form):
    """facebookresearch/mae initialize_weights: Glorot's uniform, the patch embedding as if it were linear."""
    torch.manual_seed(0)
    made = tiny_vit(positions="sincos", dim=192, depth=1).to(memory_format=form)
    bias = made.patch_embed.proj.bias.clone()
    positions = made.pos_embed.clone()
    encoder = MAE(made, ResizedCrop((32, 32)), decoder=DecoderSizes(16, 1, 2)).encoder
    block = encoder.blocks[0]
    layers = {
        (3 * 8 * 8, 192): encoder.patch_embed.proj,
        (192, 3 * 192): block.attn.qkv,
        (192, 192): block.attn.proj,
        (192, 4 * 192): block.mlp.fc1,
        (4 * 192, 192): block.mlp.fc2,
    }
    for (inputs, outputs), layer in layers.items():
        assert layer.weight.flatten(1).shape == (outputs, inputs)
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.995 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        if layer is not encoder.patch_embed.proj:
            assert layer.bias.abs().max() == 0
    # 192 numbers: the deviation of their deviation is 5 %
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(encoder.patch_embed.proj.bias, bias)
    assert torch.equal(encoder.pos_embed, positions)


def test_weights_that_came_with_the_encoder_stay(tmp_path):
    torch.manual_seed(0)
    trained = tiny_vit(positions="sincos")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    save_pretrained(trained, tmp_path / "folder")
    for encoder in (
        tiny_vit(positions="sincos", weights=str(tmp_path / "weights.pth")),
        from_pretrained(tmp_path / "folder"),
    ):
        method = MAE(encoder, ResizedCrop((32, 32)), decoder=DecoderSizes(16, 1, 2))
        for name, parameter in method.encoder.state_dict().items():
            assert torch.equal(parameter, trained.state_dict()[name]), name


def test_a_mask_token_that_nothing_uses_is_not_trained():
    """DDP would wait for its gradient."""
    encoder = tiny_vit(positions="sincos", mask_token=True)
    method = MAE(encoder, ResizedCrop((32, 32)), decoder=DecoderSizes(16, 1, 2))
    sum(method.losses(make_clip()).values()).backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert not encoder.mask_token.requires_grad


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.99])
def test_a_ratio_that_leaves_nothing_to_see_or_to_tell_is_named(ratio):
    with pytest.raises(UserError, match=rf"MAE: ratio={ratio} of 16 patches .* between 0 and 1"):
        tiny(ratio=ratio)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"crop\.size=\[48, 32\], encoder\.image_size=\[32, 32\]"):
        MAE(tiny_vit(), ResizedCrop((48, 32)))
    with pytest.raises(UserError, match="needs a ViT"):
        MAE(tiny_encoder())
