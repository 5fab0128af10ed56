"""Bytes kept for the backward pass per image: the published formulation against the package's.

A forward pass of the online side of the dense branch (ResNet-50, SDM, projector, predictor, dense loss) under
hooks that see every tensor which autograd keeps; each storage counts once, parameters and buffers not at all.
What one image keeps is the difference between two batches, so that what is kept once per step (the product of
two weights of the commuted projector) stands beside. Measured at a small size and scaled by the number of
pixels; float32. "recompute" is the package with activation checkpointing in encoder, decoder and heads.
"""

from __future__ import annotations

from typing import Any, Self

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.dense_loss import Problem, make_problem, package
from benchmarks.published.dense import published_loss
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM

PAPER = (512, 1024)
FORMS = ("published", "package", "recompute")


class Kept:
    """A context that adds up the storages that autograd keeps of what runs inside.

    Args:
        known: tensors and modules whose storages do not count.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, *known: Tensor | nn.Module) -> None:
        self.total = 0
        self._known: set[int] = set()
        for part in known:
            tensors = [part] if isinstance(part, Tensor) else [*part.parameters(), *part.buffers()]
            self._known |= {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._held: list[Tensor] = []  # so that no address is given out twice
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._held.append(tensor)
            self.total += storage.nbytes()
        # a node that gets its own result back as it came would hold itself, and the whole graph, for ever
        return tensor.detach()

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._held.clear()


def method(form: str, dims: int, hidden: int) -> PooDLe:
    """PooDLe with ResNet-50 in one of the forms."""
    torch.manual_seed(0)
    recompute = form == "recompute"
    encoder = ResNet(50, recompute=recompute)
    return PooDLe(
        encoder,
        SDM(encoder.channels, dims, recompute=recompute),
        Given(),
        pooled_weight=0.0,
        hidden=hidden,
        commute=form != "published",
        recompute=recompute,
    )


def loss(form: str, problem: Problem) -> Tensor:
    """The dense loss of a form."""
    if form == "published":
        return published_loss(**vars(problem))
    return package(problem, "auto")


def measure(form: str, made: PooDLe, size: tuple[int, int], batch: int) -> dict[str, int]:
    """Bytes kept by the network and by the loss, for a batch of images."""
    predictor = made.dense_predictor
    assert predictor is not None
    images = torch.rand(batch, 3, *size)
    problem = make_problem(*size, made.online.dense_projector[-1].out_channels, batch=batch)
    with Kept(made, images, problem.z, problem.a, problem.b, problem.flow, problem.visible) as kept:
        problem.p = predictor(made.online.dense(images))
        network = kept.total
        value = loss(form, problem)
        both = kept.total
    del value
    return {"network": network, "loss": both - network, "network and loss": both}


def run(size: tuple[int, int], dims: int = 2048, hidden: int = 4096) -> dict[str, Any]:
    """Per form: bytes per image of 512x1024, and bytes per step whatever the number of images."""
    scale = PAPER[0] * PAPER[1] / (size[0] * size[1])
    results: dict[str, Any] = {}
    for form in FORMS:
        made = method(form, dims, hidden)
        one, two = (measure(form, made, size, batch) for batch in (1, 2))
        results[form] = {
            "per_image": {name: (two[name] - one[name]) * scale for name in one},
            "per_step": {name: 2 * one[name] - two[name] for name in one},
        }
    whole = {form: results[form]["per_image"]["network and loss"] for form in FORMS}
    results["ratio"] = {form: whole[form] / whole["published"] for form in FORMS}
    return results


def report(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = []
    for form in FORMS:
        image, step = results[form]["per_image"], results[form]["per_step"]
        numbers = [f"{image[name] / 1e9:.3f}" for name in ("network", "loss", "network and loss")]
        once = f"{max(0, step['network and loss']) / 1e6:.1f}"
        rows.append((form, *numbers, f"{results['ratio'][form]:.3f}", once))
    head = ("form", "network, GB", "loss, GB", "both, GB per image", "ratio", "once per step, MB")
    return record.table(head, rows)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=0)
    parser.add_argument("--h", type=int, default=128, help="height at which it is measured, px")
    parser.add_argument("--w", type=int, default=256, help="width at which it is measured, px")
    args = parser.parse_args(words)
    results = run((args.h, args.w))
    path = record.save("saved_bytes", args, results)
    print(report(results))
    print(f"written to {path}")
    return results


if __name__ == "__main__":
    main()
