import pytest
import torch
from device_reads import DeviceReads
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from poodle_lightning.nn.dino_head import DINOHead, NormedLinear
from poodle_lightning.types import UserError

SIZES = {"hidden": 10, "bottleneck": 5, "out": 12}


class Published(nn.Module):
    """The head from its description, with torch's own weight normalisation, and a given head's weights."""

    def __init__(self, head, batch_norm=False):
        super().__init__()
        self.mlp = nn.Sequential()
        widths = [layer.weight.shape for layer in head.mlp if isinstance(layer, nn.Linear)]
        for place, (out, dims) in enumerate(widths):
            self.mlp.append(nn.Linear(dims, out))
            if place + 1 < len(widths):
                if batch_norm:
                    self.mlp.append(nn.BatchNorm1d(out))
                self.mlp.append(nn.GELU())
        self.mlp.load_state_dict(head.mlp.state_dict())
        out, dims = head.last_layer.weight_v.shape
        self.last = weight_norm(nn.Linear(dims, out, bias=False))
        with torch.no_grad():
            self.last.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
            self.last.parametrizations.weight.original1.copy_(head.last_layer.weight_v)

    def forward(self, x):
        z = self.mlp(x)
        return self.last(z / z.square().sum(dim=-1, keepdim=True).sqrt())


@pytest.mark.parametrize("norm_last", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_torchs_weight_normalisation(norm_last, batch_norm, layers):
    torch.manual_seed(0)
    head = DINOHead(7, **SIZES, norm_last=norm_last, batch_norm=batch_norm, layers=layers).double()
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.rand(12, 1) + 0.5)  # as read from a checkpoint
    reference = Published(head, batch_norm).double()
    x = torch.randn(6, 7, dtype=torch.float64)
    found, wanted = head(x), reference(x)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(6, 12, dtype=torch.float64)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    gain, direction = (getattr(reference.last.parametrizations.weight, f"original{i}") for i in (0, 1))
    torch.testing.assert_close(head.last_layer.weight_v.grad, direction.grad)
    for mine, other in zip(head.mlp.parameters(), reference.mlp.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    if norm_last:
        assert head.last_layer.weight_g.grad is None
    else:
        torch.testing.assert_close(head.last_layer.weight_g.grad, gain.grad)


def test_rows_of_any_shape_and_their_two_halves():
    torch.manual_seed(0)
    head = DINOHead(7, **SIZES, batch_norm=True)
    x = torch.randn(2, 3, 4, 7)
    z = head.project(x)
    assert z.shape == (2, 3, 4, 5)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2, 3, 4))
    assert head.logits(z).shape == (2, 3, 4, 12)
    torch.testing.assert_close(head(x), head.logits(z))
    torch.testing.assert_close(head(x).flatten(0, 2), head(x.flatten(0, 2)))
    # the centre of many patches costs one row of the last layer
    torch.testing.assert_close(head.logits(z.mean(dim=(0, 1, 2))), head.logits(z).mean(dim=(0, 1, 2)))


def test_names_are_those_of_published_checkpoints():
    """As in DINO's ``DINOHead``: the MLP's three linear layers, and weight_norm's old names behind them."""
    mlp = [f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")]
    head = DINOHead(7, **SIZES)
    assert sorted(head.state_dict()) == sorted([*mlp, "last_layer.weight_g", "last_layer.weight_v"])
    old = {"mlp." + key: value for key, value in head.mlp.state_dict().items()}
    old |= {"last_layer.weight_g": torch.full((12, 1), 2.0), "last_layer.weight_v": torch.randn(12, 5)}
    head.load_state_dict(old)
    torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.full((12,), 2.0))
    with_norm = DINOHead(7, **SIZES, batch_norm=True)
    assert [type(layer).__name__ for layer in with_norm.mlp] == [
        *("Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"),
    ]
    frozen = [name for name, p in DINOHead(7, **SIZES).named_parameters() if not p.requires_grad]
    assert frozen == ["last_layer.weight_g"]
    assert all(p.requires_grad for p in DINOHead(7, **SIZES, norm_last=False).parameters())


def test_sizes_of_the_paper():
    """ViT-S: 384-2048-2048-256, then 65,536 rows."""
    with torch.device("meta"):
        head = DINOHead(384)
    mlp = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert sum(p.numel() for p in head.parameters()) == mlp + 65536 * 256 + 65536


def test_initial_weights():
    torch.manual_seed(0)
    head = DINOHead(200, hidden=300, bottleneck=64, out=400)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert abs(float(layer.weight.detach().std()) - 0.02) < 1e-3
            assert not layer.bias.any()
    bound = 64**-0.5  # of nn.Linear: uniform in ±1/√in
    directions = head.last_layer.weight_v.detach()
    assert 0.98 * bound < float(directions.abs().max()) <= bound
    assert abs(float(directions.std()) - bound / 3**0.5) < 0.01 * bound
    assert (head.last_layer.weight_g == 1).all()


def test_unit_rows_are_float32_under_autocast():
    torch.manual_seed(0)
    head = DINOHead(7, **SIZES)
    with torch.no_grad():
        head.mlp[-1].weight.mul_(1e4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head.project(torch.randn(6, 7))
        logits = head.logits(z)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(logits.float(), head.logits(z), rtol=2e-2, atol=2e-2)


def test_a_head_without_layers_is_named():
    with pytest.raises(UserError, match="layers=0 has no output: set layers to 1 or more"):
        DINOHead(7, layers=0)


def test_reads_nothing_back():
    torch.manual_seed(0)
    head, x = DINOHead(7, **SIZES, norm_last=False), torch.randn(3, 4, 7)
    with DeviceReads([*head.parameters(), x]) as reads:
        head(x).sum().backward()
    assert reads.found == []
    assert NormedLinear(3, 4).extra_repr() == "3, 4, norm_last=True"
