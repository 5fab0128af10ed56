import math

import pytest
import torch
from device_reads import DeviceReads

from poodle_lightning.nn.mae_decoder import MAEDecoder, sincos_positions
from poodle_lightning.ops.masking import random_keep
from poodle_lightning.types import UserError


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_positions_equal_the_formula(grid, class_token):
    found = sincos_positions(12, grid, class_token)
    assert found.dtype == torch.float32
    rows = found[0].tolist()
    if class_token:
        assert not any(rows.pop(0))
    assert len(rows) == grid[0] * grid[1]
    for place, row in enumerate(rows):
        y, x = divmod(place, grid[1])
        wanted = []
        for number in (x, y):  # columns first
            angles = [number / 10000 ** (i / 3) for i in range(3)]
            wanted += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row == pytest.approx(wanted, abs=1e-6)


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="multiple of 4, not 18"):
        sincos_positions(18, (2, 2), class_token=True)
    with pytest.raises(UserError, match="dim=20 cannot have 3 heads"):
        MAEDecoder(8, 4, (2, 2), dim=20, heads=3)


def make(grid=(2, 3), **kwargs):
    torch.manual_seed(0)
    return MAEDecoder(8, 4, grid, **{"dim": 16, "depth": 2, "heads": 4, **kwargs})


def by_loops(decoder, tokens, keep):
    """One image and one patch at a time: a token where the encoder saw the patch, else the mask token."""
    out = []
    for token, kept in zip(tokens, keep.tolist(), strict=True):
        seen = decoder.embed(token)
        mask = decoder.mask_token[0, 0]
        rows = [seen[0], *(seen[1 + kept.index(n)] if n in kept else mask for n in range(6))]
        x = torch.stack([row + decoder.positions[0, i] for i, row in enumerate(rows)])[None]
        for block in decoder.blocks:
            x = block(x)
        out.append(torch.stack([decoder.predict(decoder.norm(row)) for row in x[0, 1:]]))
    return torch.stack(out)


def test_equals_a_loop_over_patches():
    decoder, keep = make(), torch.tensor([[4, 0], [1, 5], [3, 2]])
    tokens = torch.randn(3, 3, 8)
    found = decoder(tokens, keep)
    assert found.shape == (3, 6, 48)
    torch.testing.assert_close(found, by_loops(decoder, tokens, keep), rtol=1e-5, atol=1e-6)


def test_the_order_of_the_kept_patches_does_not_matter():
    decoder, keep = make(), random_keep(torch.arange(2), 6, 0.5)
    tokens = torch.randn(2, 4, 8)
    turned = torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(decoder(tokens, keep), decoder(turned, keep.flip(1)))
    assert not torch.allclose(decoder(tokens, keep), decoder(turned, keep))


def test_gradients_reach_the_mask_token_and_every_kept_token():
    decoder = make()
    tokens = torch.randn(2, 3, 8, requires_grad=True)
    decoder(tokens, torch.tensor([[0, 1], [5, 2]])).square().sum().backward()
    assert (tokens.grad.abs().sum(dim=2) > 0).all()
    assert all(p.grad.abs().sum() > 0 for name, p in decoder.named_parameters() if "qkv.bias" not in name)


def test_initial_weights_and_what_is_saved():
    decoder = make(dim=64, depth=1)
    assert abs(float(decoder.mask_token.detach().std()) - 0.02) < 0.005
    weight = decoder.predict.weight.detach()
    bound = math.sqrt(6 / (64 + 48))  # Xavier's uniform
    assert 0.98 * bound < float(weight.abs().max()) <= bound
    assert not decoder.embed.bias.any()
    assert decoder.norm.eps == decoder.blocks[0].norm1.eps == 1e-6
    assert not any("positions" in name for name in decoder.state_dict())
    assert not any("positions" in name for name, _ in decoder.named_parameters())


def test_sizes_of_the_paper():
    """Behind ViT-S: 512 channels, 8 blocks, 16 heads."""
    with torch.device("meta"):
        decoder = MAEDecoder(384, 16, (14, 14))
    block = 2 * 2 * 512 + (512 + 1) * 3 * 512 + (512 + 1) * 512 + (512 + 1) * 2048 + (2048 + 1) * 512
    rest = (384 + 1) * 512 + 512 + 2 * 512 + (512 + 1) * 768
    assert sum(p.numel() for p in decoder.parameters()) == 8 * block + rest
    assert decoder.blocks[0].attn.num_heads == 16


def test_half_precision_tokens():
    decoder, keep = make(), torch.tensor([[4, 0]])
    tokens = torch.randn(1, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(tokens, keep)
    torch.testing.assert_close(found.float(), decoder(tokens, keep), rtol=0.1, atol=0.05)


def test_reads_nothing_back():
    decoder, keep = make(), random_keep(torch.arange(2), 6, 0.5)
    tokens = torch.randn(2, 4, 8, requires_grad=True)
    with DeviceReads([*decoder.parameters(), *decoder.buffers(), tokens]) as reads:
        decoder(tokens, keep).sum().backward()
    assert reads.found == []
