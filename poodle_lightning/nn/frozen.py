"""Networks that help a method but are no part of what it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network that never changes: always in eval mode, no gradients, not in the state dict.

    The network moves with its owner (``to``, ``cuda``, ``half``) but is otherwise hidden from it:
    ``train()``, ``parameters()``, ``modules()``, ``state_dict()`` and ``load_state_dict(strict=True)`` do not
    see it, so neither optimisers, nor checkpoints, nor the conversion to synchronised BatchNorm reach it.

    Args:
        module: taken over, not copied.

    Attributes:
        module: the network.
    """

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, which would register it as a child.
        object.__setattr__(self, "module", module.requires_grad_(False).eval())

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns, without a graph."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Changes nothing in the network, whatever the mode."""
        super().train(mode)
        self.module.eval()
        return self

    def extra_repr(self) -> str:
        """The hidden network, for ``print``."""
        return repr(self.module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.module._apply(fn, recurse)
        return self
