"""What is left of images where only whole patches count."""

import pytest
import torch
from tiny_models import tiny_encoder, tiny_sdm, tiny_vit

from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.patches import multiple_of, whole_patches, whole_size
from poodle_lightning.nn.timm_encoder import TimmEncoder
from poodle_lightning.types import UserError


def encoders():
    """Encoders with the multiple that they need."""
    small = tiny_encoder()
    timms = TimmEncoder("vit_tiny_patch16_224")
    return [(small, 1), (DecodedEncoder(small, tiny_sdm(small)), 1), (tiny_vit(), 8), (timms, 16)]


def test_a_transformer_takes_what_is_left_and_others_take_all():
    images = torch.rand(2, 3, 52, 39)
    for encoder, multiple in encoders():
        assert multiple_of(encoder) == (multiple, multiple)
        found = whole_patches(images, encoder)
        height, width = found.shape[-2:]
        assert (height % multiple, width % multiple) == (0, 0)
        assert 52 - height < multiple
        assert 39 - width < multiple
        assert torch.equal(found, images[..., :height, :width])
        assert whole_size((52, 39), encoder) == (height, width)
        with torch.no_grad():
            assert encoder.eval()(found).vector.isfinite().all()


def test_images_that_fit_and_labels_stay_as_they_are():
    labels = torch.zeros(2, 16, 24, dtype=torch.uint8)
    assert torch.equal(whole_patches(labels, tiny_vit()), labels)
    assert whole_patches(labels[:, :15], tiny_vit()).shape == (2, 8, 24)


@pytest.mark.parametrize("size", [(7, 32), (32, 7)])
def test_no_room_for_a_patch_is_said_in_one_line(size):
    with pytest.raises(UserError, match=rf"ViT with patches of 8x8 pixels cannot take {size[0]}x{size[1]}"):
        whole_patches(torch.rand(1, 3, *size), tiny_vit())
