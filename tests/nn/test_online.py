import torch
from tiny_models import tiny_encoder, tiny_sdm

from poodle_lightning.nn.online import Online


def test_backbone_shares_the_parts_and_adds_the_decoders_map():
    encoder = tiny_encoder()
    assert Online(encoder).backbone() is encoder
    whole = Online(encoder, tiny_sdm(encoder)).eval().backbone()
    assert whole.encoder is encoder
    images = torch.rand(1, 3, 32, 64)
    found = whole(images)
    assert next(reversed(found.maps)) == "sdm"
    assert torch.equal(found.maps["layer4"], encoder(images).maps["layer4"])
