import pytest
import torch

from poodle_lightning.nn.heads import MLP, ConvMLP


def formula(x, head, eps=1e-5):
    """Rows through linear, batch normalisation, ReLU, linear, in float64."""
    first, norm, _, last = (m.double() for m in head)
    h = x.double() @ first.weight.flatten(1).T
    if first.bias is not None:
        h = h + first.bias
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + eps).sqrt() * norm.weight + norm.bias
    return h.clamp(min=0) @ last.weight.flatten(1).T + last.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [ConvMLP, MLP])
def test_head_equals_formula(kind, bias):
    torch.manual_seed(0)
    head = kind(6, 10, 4, bias=bias)
    x = torch.randn(8, 6, 3, 5) if kind is ConvMLP else torch.randn(8, 6)
    found = head(x)
    assert found.shape == (8, 4, *x.shape[2:])
    rows = (lambda t: t.movedim(1, -1).flatten(0, -2)) if kind is ConvMLP else (lambda t: t)
    torch.testing.assert_close(rows(found).double(), formula(rows(x), head), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "norm"), [(ConvMLP, torch.nn.BatchNorm2d), (MLP, torch.nn.BatchNorm1d)])
def test_sizes_of_the_paper(kind, norm):
    with torch.device("meta"):
        projector, predictor = kind(2048, 4096, 256), kind(256, 4096, 256)
    count = sum(p.numel() for p in [*projector.parameters(), *predictor.parameters()])
    assert count / 1e6 == pytest.approx(11.56, abs=0.005)
    assert isinstance(projector[1], norm)


def test_recomputed_head_equals_the_plain_one():
    torch.manual_seed(0)
    heads = [ConvMLP(6, 10, 4, recompute=recompute).double() for recompute in (False, True)]
    heads[1].load_state_dict(heads[0].state_dict())
    results = []
    for head in heads:
        x = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        result = head(x)
        result.square().sum().backward()
        results.append([result, x.grad, *(p.grad for p in head.parameters()), *head.buffers()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
