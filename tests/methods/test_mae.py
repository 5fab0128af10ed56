import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe, tiny_vit

from poodle_lightning import MAE
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


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"crop\.size=\[48, 32\], encoder\.image_size=\[32, 32\]"):
        MAE(tiny_vit(), ResizedCrop((48, 32)))
    with pytest.raises(UserError, match="needs a ViT"):
        MAE(tiny_encoder())
