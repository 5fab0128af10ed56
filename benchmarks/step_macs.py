"""Multiply-adds of one training pair: the published order of the network against the package's.

Counted on the package's own modules with tensors that have shapes only, so nothing is computed and any size
takes seconds. Only products count (convolutions and matrix products). "x 3" takes the backward pass for twice
the forward pass, as is usual; "counted" runs both and counts what is asked for (no gradient to the images).
The product of two weights that the commuted projector needs costs the same for any number of images: it is
stated per step, beside the cost per pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.optical_flow import raft_large

from poodle_lightning.analysis.flops import counted
from poodle_lightning.flow.given import Given
from poodle_lightning.flow.raft import RAFT
from poodle_lightning.methods.flowe import FlowE
from poodle_lightning.methods.poodle import PooDLe

GIGA = 1e9
Size = tuple[int, int]


def images(count: int, size: Size) -> Tensor:
    return torch.empty(count, 3, *size, device="meta")


def forward(call: Callable[[], Any]) -> float:
    """GMAC of a call without gradients."""
    with torch.no_grad(), counted() as work:
        call()
    return work.total / GIGA


def both(call: Callable[[], Tensor]) -> float:
    """GMAC of a call and of the backward pass behind it."""
    with counted() as work:
        call().sum().backward()
    return work.total / GIGA


def per_image(count: Callable[[int], float]) -> tuple[float, float]:
    """What one more image costs, and what costs the same for any number of images."""
    two, three = count(2), count(3)  # one alone is no batch to a BatchNorm of vectors
    return three - two, 3 * two - 2 * three


def poodle(size: Size, subcrops: int, crop: int, *, commute: bool) -> dict[str, float]:
    """GMAC of PooDLe's network with ResNet-50: per image forward, and per pair."""
    with torch.device("meta"):
        method = PooDLe(flow=Given(), commute=commute)
    online, decoder, predictor = method.online, method.online.decoder, method.dense_predictor
    assert decoder is not None
    assert predictor is not None
    with torch.no_grad():
        features = online.encoder(images(1, size))
        projected = online.dense(images(1, size))
    encoder = forward(lambda: online.encoder(images(1, size)))
    plain_decoder = forward(lambda: decoder(features))
    projection, fixed = per_image(lambda n: forward(lambda: online.dense(images(n, size))))
    guess = forward(lambda: predictor(projected))
    q = method.pooled_predictor
    assert q is not None
    small = (crop, crop)
    pooled, _ = per_image(lambda n: forward(lambda: online.pooled(images(n, small))))
    guessed, _ = per_image(lambda n: forward(lambda: q(online.pooled(images(n, small)))))
    views, crops = 2, 2 * subcrops
    found = {
        "encoder": encoder,
        "decoder": plain_decoder,
        "decoder and projector": projection - encoder,
        "projector": projection - encoder - plain_decoder,
        "predictor": guess,
        "subcrop": pooled,
        "weight product per step": 4 * fixed,  # online forward and twice that backward, teacher forward
        "pair: online views": views * 3 * (projection + guess),
        "pair: teacher views": views * projection,
        "pair: subcrops": crops * (3 * guessed + pooled),
    }
    found["pair"] = sum(value for name, value in found.items() if name.startswith("pair: "))
    online_views, _ = per_image(lambda n: both(lambda: predictor(online.dense(images(n, size)))))
    online_crops, _ = per_image(lambda n: both(lambda: q(online.pooled(images(n, small)))))
    found["pair, counted"] = views * (online_views + projection) + crops * (online_crops + pooled)
    return found


def flowe(size: Size) -> dict[str, float]:
    """GMAC of FlowE's network with a dilated ResNet-50, per pair."""
    with torch.device("meta"):
        method = FlowE(flow=Given())
    target = forward(lambda: method.online.dense(images(1, size)))
    online = forward(lambda: method.predictor(method.online.dense(images(1, size))))
    work = both(lambda: method.predictor(method.online.dense(images(1, size))))
    return {"pair": 2 * (3 * online + target), "pair, counted": 2 * (work + target)}


def raft(size: Size, iterations: int) -> dict[str, float]:
    """GMAC of RAFT large for both directions of a pair: torchvision called twice, and the package."""
    stock, ours = raft_large(weights=None).eval(), RAFT(weights=None, iterations=iterations)
    # shapes only as well, but of a device whose autocast can be switched off
    with FakeTensorMode(allow_non_fake_inputs=True):
        pair = torch.empty(1, 2, 3, *size)
        a, b = pair.unbind(dim=1)
        return {
            "torchvision": 2 * forward(lambda: stock(a, b, num_flow_updates=iterations)),
            "package": forward(lambda: ours.estimate(pair)),
        }


def run(size: Size, subcrops: int, crop: int, iterations: int) -> dict[str, Any]:
    """All counts."""
    plain, commuted = (poodle(size, subcrops, crop, commute=order) for order in (False, True))
    return {
        "plain": plain,
        "commuted": commuted,
        "commuted / plain": commuted["pair"] / plain["pair"],
        "commuted / plain, counted": commuted["pair, counted"] / plain["pair, counted"],
        "flowe": flowe(size),
        "raft": raft(size, iterations),
    }


def report(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    plain, commuted = results["plain"], results["commuted"]
    parts = ["encoder", "decoder", "projector", "decoder and projector", "predictor", "subcrop"]
    pair = [name for name in plain if name.startswith("pair")]
    rows: list[tuple[object, ...]] = []
    for name in parts:
        split = name in ("decoder", "projector")  # one piece when commuted
        rows.append((f"image: {name}", f"{plain[name]:.2f}", "" if split else f"{commuted[name]:.2f}"))
    rows += [(name, f"{plain[name]:.1f}", f"{commuted[name]:.1f}") for name in pair]
    rows.append(("ratio, x 3", "1", f"{results['commuted / plain']:.4f}"))
    rows.append(("ratio, counted", "1", f"{results['commuted / plain, counted']:.4f}"))
    rows.append(("weight product per step", "0", f"{commuted['weight product per step']:.1f}"))
    flow, others = results["raft"], results["flowe"]
    rows.append(("FlowE: pair; counted", f"{others['pair']:.1f}; {others['pair, counted']:.1f}", ""))
    network = record.table(("GMAC; pairs: forward and backward", "published order", "commuted"), rows)
    stock, ours = flow["torchvision"], flow["package"]
    online_flow = record.table(
        ("RAFT large, both directions", "torchvision twice", "package", "ratio"),
        [("GMAC per pair", f"{stock:.1f}", f"{ours:.1f}", f"{ours / stock:.3f}")],
    )
    return f"{network}\n\n{online_flow}"


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=0)
    parser.add_argument("--h", type=int, default=512, help="height of the views, px")
    parser.add_argument("--w", type=int, default=1024, help="width of the views, px")
    parser.add_argument("--subcrops", type=int, default=6, help="pairs of subcrops per directed image")
    parser.add_argument("--crop", type=int, default=192, help="side of a subcrop, px")
    parser.add_argument("--iterations", type=int, default=24, help="of RAFT")
    args: argparse.Namespace = parser.parse_args(words)
    results = run((args.h, args.w), args.subcrops, args.crop, args.iterations)
    path = record.save("step_macs", args, results)
    print(report(results))
    print(f"written to {path}")
    return results


if __name__ == "__main__":
    main()
