"""With BatchNorm frozen, several small batches are one big one: every loss is a mean over images."""

import lightning as L
import pytest
import torch
from tiny_models import make_clip
from torch.utils.data import DataLoader
from two_processes import make

# hard masks have a threshold of the whole batch, and each micro-batch draws its heads: here it draws them all
SETTINGS = {"DoRA": {"masks": "soft", "objects": 3}}
NAMES = ["PooDLe", "FlowE", "BYOL", "DINO", "IBOT", "AttMask", "DoRA", "MAE"]


def whole_clip():
    """Four pairs that differ in how much of them is visible."""
    clip = make_clip(batch=4, seed=5)
    noise = torch.randn(clip.flow.shape, generator=torch.Generator().manual_seed(0))
    clip.flow.add_(noise * torch.tensor([0.2, 0.6, 1.0, 1.5]).reshape(4, 1, 1, 1, 1))
    return clip


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_mean_of_small_batches_is_the_big_batch(name, parts):
    method = make(name, **SETTINGS.get(name, {})).double()
    clip = whole_clip()
    found, gradients = [], []
    for batches in ([clip], [clip[i : i + 4 // parts] for i in range(0, 4, 4 // parts)]):
        method.zero_grad()
        terms = {}
        for batch in batches:
            losses = method.losses(batch)
            (sum(losses.values()) / len(batches)).backward()
            for term, value in losses.items():
                terms[term] = terms.get(term, 0.0) + float(value.detach()) / len(batches)
        found.append(terms)
        gradients.append({n: p.grad for n, p in method.named_parameters() if p.grad is not None})
    big, small = found
    assert big.keys() == small.keys()
    assert small == pytest.approx(big, rel=1e-9)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert gradient.norm() > 0, name


def one_step(name, clips):
    """Parameters after one optimiser step that accumulates over all clips."""
    method = make(name, **SETTINGS.get(name, {})).double()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=len(clips), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, DataLoader(clips, batch_size=None, collate_fn=lambda clip: clip))
    assert trainer.global_step == 1
    return {n: p.detach().clone() for n, p in method.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_trainer_accumulates_to_the_big_batchs_step(name):
    clip = whole_clip()
    before = dict(make(name, **SETTINGS.get(name, {})).double().named_parameters())
    big, small = one_step(name, [clip]), one_step(name, [clip[:2], clip[2:]])
    for key, value in big.items():
        moved = (value - before[key]).norm()
        assert (small[key] - value).norm() <= 1e-6 * moved + 1e-15, key
    assert any((value - before[key]).norm() > 0 for key, value in big.items())
