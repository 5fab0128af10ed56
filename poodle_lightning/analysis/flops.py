"""Multiply-adds of the networks, beside those that the PooDLe paper reports (appendix I).

``python -m poodle_lightning.analysis.flops --input 512x1024`` prints the table. The rule that reproduces the
paper's digits is fvcore's, with the network in train mode: one multiply-add counts 1; BatchNorm in train mode
and LayerNorm 5 per element (4 without scale and shift); BatchNorm in eval mode 2 (1); bilinear upsampling 4
per output element, nearest 1; adaptive pooling 1 per input element; everything else nothing. The classifier
of the bare ResNet is included.

What a training step costs a machine is another question: :func:`counted` counts the products alone
(convolutions, matrix products, attention), forward and backward, of whatever runs.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.pixpro_fpn import HeadedFPN
from poodle_lightning.nn.recompute import computing_again
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.ops.geometry import Size
from poodle_lightning.types import UserError

_PAPER_SIZE: Size = (512, 1024)
Rule = Callable[[tuple[Any, ...], Any], int]


def multiply_adds(module: nn.Module, *shape: int) -> int:
    """Multiply-adds of one call of a module in its present mode, by the rule of this file's head.

    Nothing is computed: a copy on the meta device is called, so any size costs milliseconds.

    Args:
        module: called with one float32 tensor; stays as it is.
        shape: of that tensor, e.g. ``1, 3, 512, 1024``.
    """
    meta = copy.deepcopy(module).to("meta")
    with torch.no_grad(), Counter(_RULES) as counter:
        meta(torch.empty(shape, device="meta"))
    return counter.total


def counted() -> Counter:
    """A context that counts the multiply-adds of the products that run inside it, on any device.

    ``with counted() as work: loss(...).backward()``, then ``work.total``. Counted are convolutions, matrix
    products and attention, with their backward passes where those run inside; for a network the backward pass
    costs twice the forward pass, less what is not asked for (the gradient to the images). What activation
    checkpointing (``nn.recompute``) or an attention kernel computes again counts once: it is no more of use.
    A sparse factor counts its stored values only. Everything that is not a product counts nothing, and what a
    compiler made of the operations cannot be seen: count an eager step. (Meta tensors are counted for free.)
    """
    return Counter(_PRODUCTS)


def trainable_parameters(module: nn.Module) -> int:
    """Number of values that an optimiser moves; shared parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


class Counter(TorchDispatchMode):
    """Adds up the cost of every operation under it; functions and modules are seen alike.

    Args:
        rules: cost by operation, from its arguments and its (first) result; other operations are free.

    Attributes:
        total: multiply-adds so far.
    """

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        super().__init__()
        self.total: int = 0
        self._rules = rules

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = self._rules.get(func.overloadpacket)
        if rule is not None and not computing_again():
            self.total += rule(args, out[0] if isinstance(out, tuple) else out)
        return out


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    image, weight, transposed = args[0], args[1], args[6]
    # Every cell of the side that the kernel walks over costs one kernel of (channels per group, *size).
    walked = image if transposed else out
    return int(walked.numel() * math.prod(weight.shape[1:]))


def _product(inner: Callable[[tuple[Any, ...]], int]) -> Rule:
    """Cost of a matrix product: each value of the result sums over the inner dimension."""
    return lambda args, out: int(out.numel() * inner(args))


def _batch_norm(args: tuple[Any, ...], out: Tensor) -> int:
    weight, training = args[1], args[5]
    if training:
        return (5 if weight is not None else 4) * out.numel()
    return (2 if weight is not None else 1) * out.numel()


def _mean(args: tuple[Any, ...], out: Tensor) -> int:
    # Global average pooling arrives as a mean over the last two dimensions.
    if len(args) < 2 or sorted(args[1] or ()) != [-2, -1]:
        return 0
    return int(args[0].numel())


_ATEN = torch.ops.aten
_RULES: dict[Any, Rule] = {
    _ATEN.convolution: _convolution,
    _ATEN.mm: _product(lambda args: args[0].shape[-1]),
    _ATEN.bmm: _product(lambda args: args[0].shape[-1]),
    _ATEN.addmm: _product(lambda args: args[1].shape[-1]),
    _ATEN.native_batch_norm: _batch_norm,
    _ATEN.native_layer_norm: lambda args, out: (5 if args[2] is not None else 4) * out.numel(),
    _ATEN.upsample_bilinear2d: lambda args, out: 4 * out.numel(),
    _ATEN.upsample_nearest2d: lambda args, out: out.numel(),
    _ATEN._adaptive_avg_pool2d: lambda args, out: args[0].numel(),
    _ATEN.mean: _mean,
}


def _convolution_backward(args: tuple[Any, ...], out: object) -> int:
    """As much as forward for each of the gradients to the image and to the weight, where asked for."""
    upstream, image, weight, transposed, asked = args[0], args[1], args[2], args[7], args[10]
    once = _convolution((image, weight, *[None] * 4, transposed), upstream)
    return once * (bool(asked[0]) + bool(asked[1]))


def _matrix(first: int) -> Rule:
    """Cost of the product of the arguments ``first`` and ``first + 1``, dense or sparse."""

    def cost(args: tuple[Any, ...], out: Tensor) -> int:
        left, right = args[first], args[first + 1]
        columns = right.shape[-1] if right.dim() > 1 else 1
        if left.layout != torch.strided:
            return int(left._nnz()) * columns
        if right.layout != torch.strided:
            return int(right._nnz()) * int(left.shape[-2])
        return int(left.numel()) * columns

    return cost


def _sampled(args: tuple[Any, ...], out: Tensor) -> int:
    """Products of rows and columns at the stored places of a sparse matrix only."""
    return int(args[0]._nnz() * args[1].shape[-1])


def _attention(args: tuple[Any, ...], out: Tensor) -> int:
    return _scores(*args[:3])


def _attention_backward(args: tuple[Any, ...], out: Tensor) -> int:
    return 2 * _scores(*args[1:4])  # behind the upstream gradient


def _scores(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Queries ``(..., N, E)`` against keys ``(..., S, E)``, then weights against values ``(..., S, V)``."""
    return int(math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


_PREFIX = "_scaled_dot_product_"
_KERNELS = (
    *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
    "fused_attention_overrideable",
)
_BY_NAME: dict[str, Rule] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(("mm", "bmm", "mv", "_sparse_mm"), _matrix(0)),
    **dict.fromkeys(("addmm", "addmm_", "_addmm_activation", "_sparse_addmm"), _matrix(1)),
    **dict.fromkeys(("baddbmm", "baddbmm_", "addmv"), _matrix(1)),
    "sparse_sampled_addmm": _sampled,
    **dict.fromkeys((f"{_PREFIX}{kernel}" for kernel in _KERNELS), _attention),
    **dict.fromkeys((f"{_PREFIX}{kernel}_backward" for kernel in _KERNELS), _attention_backward),
}
# Releases of PyTorch differ in which of them there are.
_PRODUCTS = {getattr(_ATEN, name): rule for name, rule in _BY_NAME.items() if hasattr(_ATEN, name)}


class _Classifier(nn.Module):
    """A bare ResNet with the 1000-way classifier, as the paper counts it."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(encoder.vector_dim, 1000)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.encoder(images).vector)
        return scores


class _Pyramid(nn.Module):
    """An encoder and all levels of its pyramid, which a readout takes one of."""

    def __init__(self, encoder: Encoder, decoder: HeadedFPN) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.decoder.pyramid(self.encoder(images).maps)


def paper_networks() -> dict[str, tuple[nn.Module, float]]:
    """The networks of appendix I: ``{name: (module on the meta device, the paper's GFLOPs)}``."""
    with torch.device("meta"):
        plain = ResNet(50)
        return {
            "ResNet-50": (_Classifier(plain), 43.3),
            "ResNet-50 + SDM": (DecodedEncoder(plain, SDM(plain.channels)), 60.5),
            "ResNet-50 + FPN": (_Pyramid(plain, HeadedFPN(plain.channels)), 124.4),
            "ResNet-50, stride 8": (_Classifier(ResNet(50, output_stride=8)), 200.7),
        }


def table(size: Size = _PAPER_SIZE) -> str:
    """The paper's networks at an input size, one line each."""
    lines = [f"{'network':<22}{'GFLOPs':>10}{'paper':>8}{'difference':>12}{'M parameters':>14}"]
    for name, (module, paper) in paper_networks().items():
        count = multiply_adds(module.train(), 1, 3, *size) / 1e9
        beside = f"{paper:>8.1f}{count / paper - 1:>+12.3%}" if size == _PAPER_SIZE else f"{'-':>8}{'-':>12}"
        lines.append(f"{name:<22}{count:>10.3f}{beside}{trainable_parameters(module) / 1e6:>14.2f}")
    return "\n".join(lines)


def _size(text: str) -> Size:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--input {text}: give height x width in pixels, e.g. 512x1024")
    return int(height), int(width)


def main(args: list[str] | None = None) -> int:
    """Prints the table; the paper's numbers stand beside it at the paper's input size."""
    parser = argparse.ArgumentParser(description="Multiply-adds of the networks beside the paper's.")
    parser.add_argument("--input", default="512x1024", help="height x width in pixels (default: %(default)s)")
    try:
        print(table(_size(parser.parse_args(args).input)))
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
