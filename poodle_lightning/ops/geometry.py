"""One composable coordinate map for everything geometric: crops, flips, rotations, optical flow.

Convention (stated once, used everywhere):

* Coordinates are ``(x, y)``, normalised to [−1, 1] over the image **extent**: the outer border of the image
  is at ±1 and the centre of the first pixel at −1 + 1/W (``align_corners=False``). The same map is therefore
  right for the image and for a feature map of any stride.
* A map takes a point of the frame we **write** to the point of the frame we **read**;
  ``a @ b`` is "first b, then a".
* ``pull(x, where, size)`` writes a grid of ``size`` by reading ``x`` at ``where(grid)``. It is the one caller
  of a sampler in the package. ``seen`` is true where the point stays inside **every** frame that the map
  passes through.
* Everything here is computed in float32 (or float64, if given), under any autocast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
WarpOrder = Literal["paper", "code"]
# Points within half a millionth of the border count as inside: rounding of a composed identity must not
# push border pixels out. In pixels of a 4,000 px wide image this is 1e-3 px.
_BORDER = 1.0 + 5e-7


def island(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, for geometry and losses that must run in float32.

    Meta tensors, on which costs are counted, know no autocast: for them it does nothing.
    """
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _is_cuda(device: torch.device | str | None) -> bool:
    """Whether a copy to this device may go on behind our back: elsewhere it would be read too early."""
    return device is not None and torch.device(device).type == "cuda"


def pixel_grid(size: Size, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres of the pixels of an image, ``(H, W, 2)`` as ``(x, y)`` in extent coordinates."""
    height, width = size
    ys = (torch.arange(height, device=device, dtype=dtype) * 2 + 1) / height - 1
    xs = (torch.arange(width, device=device, dtype=dtype) * 2 + 1) / width - 1
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return _planar(x, y)


def _planar(x: Tensor, y: Tensor) -> Tensor:
    """Points ``(…, 2)`` with contiguous x and contiguous y: arithmetic on one of them then runs along it."""
    return torch.stack([x, y]).movedim(0, -1)


def pixels_to_extent(points: Tensor, size: Size) -> Tensor:
    """Pixel coordinates (centre of the first pixel at 0) ``(..., 2)`` to extent coordinates."""
    x, y = points.unbind(-1)
    return torch.stack([(x + 0.5) * (2.0 / size[1]) - 1.0, (y + 0.5) * (2.0 / size[0]) - 1.0], dim=-1)


def extent_to_pixels(points: Tensor, size: Size) -> Tensor:
    """Extent coordinates ``(..., 2)`` to pixel coordinates (centre of the first pixel at 0)."""
    x, y = points.unbind(-1)
    return torch.stack([(x + 1.0) * (size[1] / 2.0) - 0.5, (y + 1.0) * (size[0] / 2.0) - 0.5], dim=-1)


def inside(points: Tensor) -> Tensor:
    """Which points ``(..., 2)`` lie within the extent; bool ``(...)``."""
    x, y = points.unbind(-1)
    return (x.abs() <= _BORDER) & (y.abs() <= _BORDER)


@dataclass(frozen=True)
class Affine:
    """An affine map in extent coordinates.

    Args:
        matrix: ``(B, 3, 3)`` float32 or float64, last row (0, 0, 1).
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 3 or self.matrix.shape[-2:] != (3, 3):
            raise ValueError(f"Affine needs a (B, 3, 3) matrix, not {tuple(self.matrix.shape)}")
        if self.matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Affine needs float32 or float64, not {self.matrix.dtype}: build it outside autocast"
            )

    @classmethod
    def identity(
        cls, batch: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Affine:
        """The identity, for a batch."""
        return cls(torch.eye(3, device=device, dtype=dtype).expand(batch, 3, 3).contiguous())

    @classmethod
    def from_pixels(cls, matrix: Tensor, write: Size, read: Size) -> Affine:
        """From a matrix in pixel coordinates that takes the written frame's pixels to the read frame's.

        Args:
            matrix: ``(B, 3, 3)``.
            write: height and width of the frame written.
            read: height and width of the frame read.
        """
        matrix = matrix.detach()
        wide = matrix if matrix.dtype == torch.float64 else matrix.double()
        to_pixels = torch.linalg.inv(_pixels_to_extent_matrix(write, wide))
        composed = _pixels_to_extent_matrix(read, wide) @ wide @ to_pixels
        return cls(composed.to(matrix.dtype if matrix.dtype == torch.float64 else torch.float32))

    @classmethod
    def from_kornia(cls, matrix: Tensor, clean: Size, view: Size) -> Affine:
        """``to_clean`` of a view drawn by Kornia, whose pixel matrix goes from the clean image to the view.

        ``to_clean = (N_view · M · N_clean⁻¹)⁻¹`` with N = pixels → extent.
        """
        wide = matrix.detach().double()
        return cls.from_pixels(torch.linalg.inv(wide), write=view, read=clean).to(dtype=torch.float32)

    @classmethod
    def box(cls, boxes: Tensor) -> Affine:
        """The map that writes the content of boxes: the crop's extent onto the box.

        Args:
            boxes: ``(B, 4)`` as (x0, y0, x1, y1) in extent coordinates of the frame read.
        """
        x0, y0, x1, y1 = boxes.unbind(-1)
        zero, one = torch.zeros_like(x0), torch.ones_like(x0)
        rows = [(x1 - x0) / 2, zero, (x1 + x0) / 2, zero, (y1 - y0) / 2, (y1 + y0) / 2, zero, zero, one]
        return cls(torch.stack(rows, dim=-1).reshape(*boxes.shape[:-1], 3, 3))

    def __matmul__(self, other: Affine | Flow | Chain) -> Affine | Chain:
        """``self @ other``: first other, then self."""
        if isinstance(other, Affine):
            with island(self.matrix.device.type):
                return Affine(self.matrix @ other.matrix.to(self.matrix))
        return Chain((*_steps(other), self))

    def inverse(self) -> Affine:
        """The inverse map, in closed form: no solver, so that a GPU need not wait."""
        a, b, x = self.matrix[:, 0].unbind(-1)
        c, d, y = self.matrix[:, 1].unbind(-1)
        scale = 1.0 / (a * d - b * c)
        rows = [d, -b, b * y - d * x, -c, a, c * x - a * y]
        top = (torch.stack(rows, dim=-1) * scale[:, None]).reshape(-1, 2, 3)
        return Affine(torch.cat([top, self.matrix[:, 2:]], dim=1))

    def trace(self, points: Tensor, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Read points and ``seen`` for written points ``(B, H, W, 2)``."""
        read = self(points)
        return read, inside(read)

    def __call__(self, points: Tensor) -> Tensor:
        """Map points ``(B, ..., 2)``."""
        with island(points.device.type):
            matrix = self.matrix.to(points)
            shape = (matrix.shape[0], *(1,) * (points.ndim - 2))
            x, y = points.unbind(-1)
            rows = []
            for i in range(2):
                a, b, c = (matrix[:, i, j].reshape(shape) for j in range(3))
                rows.append((a * x).addcmul_(b, y).add_(c))
            return _planar(*rows)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Affine:
        """Moved to a device or dtype."""
        return Affine(self.matrix.to(device=device, dtype=dtype, non_blocking=_is_cuda(device)))

    def __getitem__(self, rows: slice | Tensor) -> Affine:
        """The maps of some rows of the batch."""
        return Affine(self.matrix[rows])

    def __len__(self) -> int:
        return self.matrix.shape[0]


@dataclass(frozen=True)
class Flow:
    """A dense displacement field: the point p of frame a is at ``p + displacement(p)`` in frame b.

    It has no inverse: asking for one is an error, not a wrong answer.

    Args:
        displacement: ``(B, 2, H, W)`` in extent units (x, then y), float32 or float64, finite.
    """

    displacement: Tensor

    def __post_init__(self) -> None:
        if self.displacement.ndim != 4 or self.displacement.shape[1] != 2:
            raise ValueError(f"Flow needs a (B, 2, H, W) displacement, not {tuple(self.displacement.shape)}")
        if self.displacement.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Flow needs float32 or float64, not {self.displacement.dtype}")

    @classmethod
    def from_pixels(cls, flow: Tensor) -> Flow:
        """From a flow in pixels of its own resolution, ``(B, 2, H, W)``; the only unit conversion."""
        height, width = flow.shape[-2:]
        flow = flow if flow.dtype == torch.float64 else flow.float()
        return cls(torch.stack([flow[:, 0] * (2.0 / width), flow[:, 1] * (2.0 / height)], dim=1))

    @property
    def size(self) -> Size:
        """Height and width of the field."""
        return self.displacement.shape[-2], self.displacement.shape[-1]

    def to_pixels(self) -> Tensor:
        """The displacement in pixels of its own resolution, ``(B, 2, H, W)``."""
        x, y = self.displacement.unbind(1)
        return torch.stack([x * (self.size[1] / 2.0), y * (self.size[0] / 2.0)], dim=1)

    def at(self, points: Tensor) -> Tensor:
        """The displacement at points ``(B, H, W, 2)``, bilinear, border values outside; ``(B, H, W, 2)``."""
        return sample(self.displacement.to(points.dtype), points).permute(0, 2, 3, 1)

    def trace(self, points: Tensor, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Read points and ``seen``; on the field's own grid the stored values are used unsampled."""
        if rows is not None and points.shape[2] == self.size[1]:
            here = self.displacement[:, :, rows].permute(0, 2, 3, 1).to(points.dtype)
        else:
            here = self.at(points)
        read = points + here
        return read, inside(read)

    def __matmul__(self, other: Affine | Flow | Chain) -> Chain:
        """``self @ other``: first other, then self."""
        return Chain((*_steps(other), self))

    def resized(self, size: Size) -> Flow:
        """The same motion on another grid (bilinear)."""
        if size == self.size:
            return self
        batch = len(self.displacement)
        grid = pixel_grid(size, self.displacement.device, self.displacement.dtype).expand(batch, *size, 2)
        return Flow(self.at(grid).permute(0, 3, 1, 2))

    def through(self, window: Affine, size: Size) -> Flow:
        """The motion as seen inside a window: ``window⁻¹ @ self @ window``, on a grid of ``size``.

        Args:
            window: point of the crop → point of the frame in which this flow is given; the same crop in
                both frames.
            size: height and width of the crop.
        """
        grid = pixel_grid(size, self.displacement.device, self.displacement.dtype).expand(
            len(window), *size, 2
        )
        read, _ = (self @ window).trace(grid)
        return Flow((window.inverse()(read) - grid).permute(0, 3, 1, 2))

    def __getitem__(self, rows: slice | Tensor) -> Flow:
        """The flows of some rows of the batch."""
        return Flow(self.displacement[rows])

    def __len__(self) -> int:
        return self.displacement.shape[0]


@dataclass(frozen=True)
class Chain:
    """Maps applied one after the other; the first in ``steps`` is applied first."""

    steps: tuple[Affine | Flow, ...]

    def __matmul__(self, other: Affine | Flow | Chain) -> Chain:
        """``self @ other``: first other, then self."""
        return Chain((*_steps(other), *self.steps))

    def trace(self, points: Tensor, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Read points and ``seen``: inside every frame on the way."""
        seen = torch.ones(points.shape[:-1], dtype=torch.bool, device=points.device)
        for number, step in enumerate(self.steps):
            points, here = step.trace(points, rows if number == 0 else None)
            seen = seen & here
        return points, seen


def _steps(where: Affine | Flow | Chain) -> tuple[Affine | Flow, ...]:
    return where.steps if isinstance(where, Chain) else (where,)


def _pixels_to_extent_matrix(size: Size, like: Tensor) -> Tensor:
    height, width = size
    return like.new_tensor(
        [[2.0 / width, 0, 1.0 / width - 1], [0, 2.0 / height, 1.0 / height - 1], [0, 0, 1]]
    )


def sample(x: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of ``x (B, C, H, W)`` at ``points (B, h, w, 2)``, clamped at the border."""
    with island(x.device.type):
        wide = x if x.dtype == torch.float64 else x.float()
        return F.grid_sample(
            wide, points.to(wide.dtype), mode="bilinear", padding_mode="border", align_corners=False
        )


def pull(
    x: Tensor, where: Affine | Flow | Chain, size: Size, rows: slice | None = None
) -> tuple[Tensor, Tensor]:
    """Write an image of ``size`` by reading ``x`` through a map.

    Args:
        x: ``(B, C, h, w)``, any resolution and stride; computed in float32 (float64 stays float64).
        where: from the written frame to the frame of ``x``.
        size: height and width of the frame written.
        rows: only these rows of the frame are written (for work in chunks).

    Returns:
        values ``(B, C, H, W)`` (border values outside) and ``seen (B, H, W)`` bool.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    points, seen = trace_grid(where, size, len(x), rows, device=x.device, dtype=dtype)
    return sample(x, points), seen


def trace_grid(
    where: Affine | Flow | Chain,
    size: Size,
    batch: int,
    rows: slice | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Where a map takes the pixels of a frame: what :func:`pull` reads at.

    Args:
        where: from the written frame to the frame that is read.
        size: height and width of the frame written.
        batch: how many images.
        rows: only these rows of the frame.
        device: of the points.
        dtype: of the points, float32 or float64.

    Returns:
        points ``(B, H, W, 2)`` and ``seen (B, H, W)`` bool.
    """
    with island(device.type):
        rows = slice(0, size[0]) if rows is None else rows
        grid = pixel_grid(size, device, dtype)[rows]
        return where.trace(grid.expand(batch, *grid.shape), _own_rows(where, size, rows))


def pull_boxes(x: Tensor, boxes: Affine, size: Size) -> tuple[Tensor, Tensor]:
    """K crops of every image, all of an image in one sampling: no image is copied K times.

    Args:
        x: ``(B, C, H, W)``.
        boxes: B·K rows (row ``i·K + k`` is crop k of image i), from a point of the crop to the image.
        size: height and width of the crops.

    Returns:
        values ``(B·K, C, *size)`` (border values outside) and ``seen (B·K, *size)`` bool.
    """
    count = len(boxes) // len(x)
    with island(x.device.type):
        grid = pixel_grid(size, x.device, boxes.matrix.dtype)
        points, seen = boxes.trace(grid.expand(len(boxes), *size, 2))
        values = sample(x, points.reshape(len(x), count * size[0], size[1], 2))
        return values.unflatten(2, (count, size[0])).transpose(1, 2).flatten(0, 1), seen


def warp_into_view(to_clean: Affine, flow: Flow, order: WarpOrder = "paper") -> Chain:
    """From the clean frame a to a view of frame b: first along the flow a → b, then into the view.

    ``order="code"`` is that of the PooDLe and FlowE authors' code, which warps inside the view by a flow
    that was estimated on clean frames; both are equal where ``to_clean`` is the identity.
    """
    steps = (flow, to_clean.inverse()) if order == "paper" else (to_clean.inverse(), flow)
    return Chain(steps)


def on_loss_grid(flow: Flow, visible: Tensor, stride: int) -> tuple[Size, Flow, Tensor]:
    """The grid of a dense loss taken on every ``stride``-th pixel: its size, the motion and visibility there.

    Args:
        flow: B rows at the crop's resolution.
        visible: ``(B, H, W)`` bool at the crop's resolution.
        stride: 1 is every pixel.
    """
    if stride == 1:
        return flow.size, flow, visible
    size = (flow.size[0] // stride, flow.size[1] // stride)
    centre = stride // 2
    return size, flow.resized(size), visible[:, centre::stride, centre::stride][:, : size[0], : size[1]]


def _own_rows(where: Affine | Flow | Chain, size: Size, rows: slice) -> slice | None:
    """The rows, if the first map is a flow given on exactly this grid (then it needs no sampling)."""
    first = _steps(where)[0]
    return rows if isinstance(first, Flow) and first.size == size else None
