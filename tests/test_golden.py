"""Twenty steps of every method in float64, against stored curves: an alarm for refactors.

The stored numbers were made by this package, so they say nothing about correctness. After a change that is
meant to alter them: ``python tests/test_golden.py`` writes them anew.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_clip
from two_processes import make

FILE = Path(__file__).parent / "golden" / "losses.json"
NAMES = ["PooDLe", "FlowE", "BYOL", "DINO", "DoRA", "MoCo", "SwAV", "PixPro", "VITO"]


def curve(name: str) -> list[float]:
    method = make(name).double()  # BatchNorm frozen: with it, rounding grows fivefold in every step
    optimizer = torch.optim.SGD((p for p in method.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for step in range(20):
        loss = torch.stack(list(method.losses(make_clip(seed=step)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if method.target is not None:
            method.target.update(method.online, 0.9)
        method.after_step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_curves_have_not_moved(name):
    # images are recoloured and sampled in float32, whose last digits may differ between processors
    assert curve(name) == pytest.approx(json.loads(FILE.read_text())[name], rel=2e-5)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: curve(name) for name in NAMES}, indent=1) + "\n")
