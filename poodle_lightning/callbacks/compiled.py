"""``torch.compile`` for the parts of a method, switched on by one callback."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import nn

from poodle_lightning.methods.base import Method
from poodle_lightning.nn.dino_head import DINOHead
from poodle_lightning.nn.frozen import Frozen
from poodle_lightning.nn.heads import MLP, ConvMLP
from poodle_lightning.nn.mae_decoder import MAEDecoder
from poodle_lightning.nn.pixpro_fpn import HeadedFPN
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError

Part = Literal["encoder", "decoder", "heads", "flow"]
_log = logging.getLogger(__name__)
# Compiled versions that PyTorch keeps per function before it goes on without compiling. All parts share the
# function that calls a module, and each has a version per image size. Blocks of a transformer share theirs,
# unless their drop paths differ: those of a ViT-L then need 50.
_VERSIONS = 64


class Compile(L.Callback):
    """Compiles parts of a method in place, after the first training batch.

    The first batch runs as it is, so that its operations can be counted; the second waits for the compiler
    (minutes). Results are the same to rounding, unless ``drop_path`` of a transformer is above 0: inductor
    draws random numbers of its own, which follow from the seed too. Names in the state dict do not change,
    and copies, checkpoints and exported encoders know nothing of it. Only training is compiled: evaluation
    modes and sizes of their own would each have to wait for the compiler again. Where no compiler works, a
    warning says why and training goes on without.

    Args:
        parts: ``"encoder"`` and ``"decoder"`` (online and target; PooDLe's decoder takes its dense projector
            along; of vision transformers and MAE's decoder each block by itself, but not the last block of a
            :meth:`ViT.look`, as at DoRA's teacher), ``"heads"`` (projectors and predictors; DINO's heads
            where they are called as a whole), ``"flow"`` (the network of the flow estimator). Parts that the
            method has not are passed over, unless it has none of them.
        mode: of ``torch.compile``; ``"max-autotune-no-cudagraphs"`` looks longest for fast kernels.
        dynamic: True compiles for any image size, False once for each size met.
        backend: of ``torch.compile``. ``"aot_eager"`` and ``"eager"`` need no compiler, gain nothing, and do
            not go together with ``recompute``.

    Raises:
        UserError: an unknown part, mode or backend, or a method with none of the parts.
    """

    def __init__(
        self,
        parts: Sequence[Part] = ("encoder", "decoder", "flow"),
        mode: str | None = None,
        dynamic: bool = False,
        backend: str = "inductor",
    ) -> None:
        unknown = [part for part in parts if part not in get_args(Part)]
        if unknown or not parts:
            raise UserError(
                f"Compile: parts {', '.join(unknown) or '(none)'}: choose from {', '.join(get_args(Part))}"
            )
        self.parts = tuple(parts)
        self.options: dict[str, Any] = {"mode": mode, "dynamic": dynamic, "backend": backend}
        self.compiled: list[nn.Module] = []
        self._waiting: list[nn.Module] = []
        self._limit: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the parts, and tries the compiler on three operations."""
        found = {part: modules_of(part, pl_module) for part in self.parts}
        if not any(found.values()):
            raise UserError(
                f"Compile: {type(pl_module).__name__} has no {', no '.join(self.parts)} to compile: "
                "choose other parts or leave the callback out"
            )
        reason = self._refusal(pl_module.device)
        if reason is not None:
            warnings.warn(f"training goes on without torch.compile, which fails here: {reason}", stacklevel=2)
            return
        self._waiting = [module for modules in found.values() for module in modules]

    def _refusal(self, device: torch.device) -> str | None:
        """Why nothing can be compiled on this machine, in one line; None where it works."""
        inputs = torch.ones(8, device=device, requires_grad=True)
        try:
            call = torch.compile(_three_operations, **self.options)
            call(inputs).backward()
        except Exception as error:  # compilers fail in as many ways as there are compilers
            said = " ".join(str(error).split()) or type(error).__name__
            if type(error).__name__ == "InvalidBackend" or said.startswith("Unrecognized mode"):
                raise UserError(f"Compile: {said}") from error
            return said[:200]
        return None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tells compiled GPU graphs (mode "reduce-overhead") that the step before is over."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind the first batch: what is called from now on is compiled."""
        if not self._waiting:
            return
        config: Any = torch._dynamo.config
        self._limit, config.recompile_limit = config.recompile_limit, max(_VERSIONS, config.recompile_limit)
        for module in self._waiting:
            module.compile(**self.options)
            if module.training:  # a frozen flow network is not, and has but one mode
                module._compiled_call_impl = _while_training(pl_module, module)
        self.compiled, self._waiting = self._waiting, []
        _log.info("compiled %s: the next step waits for the compiler", ", ".join(self.parts))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything is called as before."""
        for module in self.compiled:
            module._compiled_call_impl = None  # compile() has no other way back
        self.compiled, self._waiting = [], []
        if self._limit is not None:
            config: Any = torch._dynamo.config
            config.recompile_limit, self._limit = self._limit, None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """The same when training breaks off."""
        self.on_fit_end(trainer, pl_module)


def modules_of(part: Part, method: L.LightningModule) -> list[nn.Module]:
    """The modules of a method that make up a part, online and target; empty where it has none."""
    if not isinstance(method, Method):
        return []
    networks = [method.online] + ([] if method.target is None else [method.target.module])
    if part == "heads":
        kinds = ConvMLP | MLP | DINOHead
        named = [child for net in networks for name, child in net.named_children() if "projector" in name]
        return [*(one for one in method.modules() if isinstance(one, kinds)), *_others(named, kinds)]
    if part == "flow":
        flow = getattr(method, "flow", None)
        frozen = flow.modules() if isinstance(flow, nn.Module) else ()
        # an estimator calls the parts of its network one by one
        return [child for net in frozen if isinstance(net, Frozen) for child in net.module.children()]
    owners = [*networks, method] if part == "decoder" else networks  # MAE's decoder is not exported
    found = [getattr(owner, part, None) for owner in owners]
    return [called for module in found if module is not None for called in _called(module)]


def _called(network: nn.Module) -> list[nn.Module]:
    """What every way through a network calls: a transformer has several, which share its blocks."""
    if isinstance(network, HeadedFPN):  # PixPro takes all levels, an exported encoder the finest
        return [network.fpn, network.head]
    return list(network.blocks) if isinstance(network, ViT | MAEDecoder) else [network]


def _others(modules: list[nn.Module], kinds: Any) -> list[nn.Module]:
    """Projectors that are plain sequences, as MoCo's."""
    return [module for module in modules if not isinstance(module, kinds)]


def _while_training(method: L.LightningModule, module: nn.Module) -> Callable[..., Any]:
    compiled = module._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if method.training else module._call_impl(*args, **kwargs)

    return call


def _three_operations(x: torch.Tensor) -> torch.Tensor:
    return (2 * x).relu().sum()
