"""The usual measures of predicted depth (Eigen et al., NeurIPS 2014, section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poodle_lightning.evaluation.metrics import sum_over_processes

_NAMES = ("abs_rel", "sq_rel", "squares", "log_squares", "log10", "delta1", "delta2", "delta3")
# Rows and columns of a 480×640 image that Eigen et al. compare: 45 to 471 and 41 to 601, as in their code.
_EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
SMALLEST = 1e-3
"""Metres; a predicted depth below it is taken as this in all measures: a linear output may be negative."""


class DepthErrors:
    """Measures over all measured pixels of all images, and RMSE as a mean over images.

    ==============================  ============================================
    ``rmse``                        ``sqrt(mean((p − t)²))``, m
    ``rmse_image``                  mean over images of the RMSE of each, m
    ``abs_rel``, ``sq_rel``         mean of ``|p − t| / t``, ``(p − t)² / t`` (m)
    ``rmse_log``                    ``sqrt(mean((ln p − ln t)²))``
    ``log10``                       mean of ``|log10 p − log10 t|``
    ``delta1`` … ``delta3``         share with ``max(p/t, t/p) < 1.25^k``
    ==============================  ============================================

    Args:
        crop: ``eigen`` compares only the middle of an image, in the shares that Eigen et al. cut out of
            480×640 px.
    """

    def __init__(self, crop: str | None = None) -> None:
        self.crop = crop
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64)
        self._images = torch.zeros(2, dtype=torch.float64)  # sum of RMSE, images with a measured pixel
        self._pixels = torch.zeros((), dtype=torch.int64)

    def update(self, depth: Tensor, truth: Tensor) -> None:
        """Count images.

        Args:
            depth: ``(B, h, w)`` predicted, m.
            truth: ``(B, h, w)`` m; 0 (or below) is left out.
        """
        if self.crop == "eigen":
            rows, columns = eigen_box(truth.shape[-2], truth.shape[-1])
            depth, truth = depth[:, rows, columns], truth[:, rows, columns]
        p, t, valid = depth.double().clamp(min=SMALLEST), truth.double(), truth > 0
        t = torch.where(valid, t, torch.ones_like(t))
        p = torch.where(valid, p, torch.ones_like(p))  # then all errors are 0 there
        difference, logs = p - t, p.log() - t.log()
        ratio = torch.maximum(p / t, t / p)
        parts = [difference.abs() / t, difference.square() / t, difference.square(), logs.square()]
        parts.append(logs.abs() / math.log(10))
        parts += [((ratio < 1.25**k) & valid).double() for k in (1, 2, 3)]
        sums = torch.stack([part.sum(dim=(1, 2)) for part in parts])
        counts = valid.sum(dim=(1, 2))
        rmse = (sums[2] / counts.clamp(min=1)).sqrt()
        self._sums += sums.sum(dim=1).cpu()
        self._images += torch.stack([rmse.sum(), (counts > 0).double().sum()]).cpu()
        self._pixels += counts.sum().cpu()

    def all_reduce(self) -> DepthErrors:
        """Add the sums of all processes, in place."""
        self._sums, self._images = (sum_over_processes(part) for part in (self._sums, self._images))
        self._pixels = sum_over_processes(self._pixels)
        return self

    @property
    def pixels(self) -> int:
        """Measured pixels that were compared."""
        return int(self._pixels)

    @property
    def images(self) -> int:
        """Images with at least one such pixel."""
        return int(self._images[1])

    def summary(self) -> dict[str, float]:
        """All measures; NaN without a pixel."""
        mean = dict(zip(_NAMES, (self._sums / self._pixels).tolist(), strict=True))
        return {
            "rmse": math.sqrt(mean["squares"]),
            "rmse_image": float(self._images[0] / self._images[1]),
            "abs_rel": mean["abs_rel"],
            "sq_rel": mean["sq_rel"],
            "rmse_log": math.sqrt(mean["log_squares"]),
            "log10": mean["log10"],
            **{name: mean[name] for name in ("delta1", "delta2", "delta3")},
        }


def eigen_box(height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of Eigen et al.'s crop in an image of another size than 480×640."""
    top, bottom, left, right = _EIGEN
    return (
        slice(round(top * height), round(bottom * height)),
        slice(round(left * width), round(right * width)),
    )
