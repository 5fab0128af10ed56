"""What GPUs can do at most, by their makers' data sheets: the measure of ``perf/mfu``."""

from __future__ import annotations

import re

# TFLOP/s of dense products (a multiply-add counts 2; figures "with sparsity" are twice as high and are not
# these): 16-bit tensor cores with float32 sums, and TF32 (float32 where a chip has none). The first
# whose words are in the device's name counts, so longer names come first.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 1125.0),
    ("H200 NVL", 835.0, 417.5),
    ("H200", 989.4, 494.7),
    ("H100 NVL", 835.0, 417.5),
    ("H100 PCIe", 756.0, 378.0),
    ("H100", 989.4, 494.7),
    ("A100", 312.0, 156.0),
    ("A30", 165.0, 82.0),
    ("A40", 149.7, 74.8),
    ("A6000", 154.8, 77.4),
    ("A10", 125.0, 62.5),
    ("L40S", 362.0, 183.0),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 60.0),
    ("RTX 6000 Ada", 364.2, 182.1),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
)
# Cards, and parts of cards, that share a name with a faster one.
_SLOWER = r"Laptop|Max-Q|Mobile|4090 D|5090 D|MIG"


def peak_flops(device: str, precision: str) -> float | None:
    """The most floating-point operations a second of a GPU, or None if it is not known.

    Args:
        device: its name, e.g. ``"NVIDIA H100 80GB HBM3"``.
        precision: Lightning's word; ``"bf16-…"`` and ``"16-…"`` are measured by the 16-bit tensor cores,
            ``"32-true"`` by TF32, which PyTorch's convolutions use unless it is forbidden. ``"64-true"`` has
            no figure.
    """
    if precision.startswith("64") or re.search(_SLOWER, device, re.IGNORECASE):
        return None
    for name, half, full in _PEAKS:
        if re.search(rf"(?<![a-z0-9])G?{name}(?![a-z0-9])", device, re.IGNORECASE):
            return 1e12 * (full if precision.startswith("32") else half)
    return None
