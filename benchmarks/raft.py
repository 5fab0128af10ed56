"""RAFT in both directions: the package's estimate against torchvision's forward, once each way.

Both get the same random network and frames and must give the same flow. torchvision encodes every frame
twice, makes both correlation volumes by a product and upsamples every iterate; the package does each once.
Time is process CPU time; the ratio on a GPU may differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from poodle_lightning.flow.raft import RAFT


def both_ways(raft: RAFT, clean: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The two forms: flow ``(2, 2, H, W)`` px of one pair ``(1, 2, 3, H, W)`` in [0, 1]."""
    net, (first, second) = raft.net.module, (clean * 2 - 1).unbind(1)

    @torch.no_grad()
    def forwards() -> Tensor:
        return torch.cat([net(*pair, raft.iterations)[-1] for pair in ((first, second), (second, first))])

    return {"package": lambda: raft.estimate(clean).to_pixels(), "torchvision": forwards}


def multiply_adds(act: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops() // 2


def main(words: list[str] | None = None) -> dict[str, object]:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("--h", type=int, default=256, help="height of the frames, px; a multiple of 8")
    parser.add_argument("--w", type=int, default=512, help="width of the frames, px; a multiple of 8")
    parser.add_argument("--size", choices=("large", "small"), default="large", help="of the network")
    parser.add_argument("--iterations", type=int, default=24, help="updates")
    args = parser.parse_args(words)
    torch.manual_seed(0)
    forms = both_ways(RAFT(args.size, None, args.iterations), torch.rand(1, 2, 3, args.h, args.w))
    flows = {name: act() for name, act in forms.items()}
    counts = {name: multiply_adds(act) for name, act in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(args.rounds):
        for name, act in forms.items():
            began = time.process_time()
            act()
            seconds[name].append(time.process_time() - began)
    apart = (flows["package"] - flows["torchvision"]).abs().max().item()
    results: dict[str, object] = {
        "multiply_adds": counts,
        "share_of_multiply_adds": counts["package"] / counts["torchvision"],
        "mean_flow_px": flows["torchvision"].abs().mean().item(),
        "largest_difference_px": apart,
    }
    rows = [(f"GMAC, {name}", f"{count / 1e9:.1f}") for name, count in counts.items()]
    rows += [("largest difference, px", f"{apart:.1e}")]
    if args.rounds:
        results["seconds"] = {name: record.spread(values) for name, values in seconds.items()}
        results["times_faster"] = record.ratio(seconds["torchvision"], seconds["package"])
        rows += [(f"CPU s, {name}", record.shown(record.spread(values))) for name, values in seconds.items()]
        rows += [("times faster", record.shown(results["times_faster"]))]
    path = record.save("raft", args, results)
    print(record.table(("a pair, both ways", "value (min / median / max)"), rows))
    print(f"written to {path}")
    return results


if __name__ == "__main__":
    main()
