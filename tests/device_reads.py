"""What a training step would read back from a GPU, told on a machine that has none.

Some tensors are declared to be "on the device" (parameters, frames, flow); so is everything that is computed
from them. Reading one of those on the host would make a GPU wait. Tensors that never touched them, such as
random draws and keys, are on the host in training too and may be read. Making a tensor of
numbers on the device is found as well: its copy is not from page-locked memory, so it waits too. What cannot
be told apart here is ``x.to(device)`` of a device that happens to be the host.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result, or whose shape, the host must know before it can go on.
_READS = (
    *("_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "is_nonzero", "equal", "item"),
    *("unique_consecutive", "_unique", "_unique2", "unique_dim", "unique_dim_consecutive"),
    *("repeat_interleave", "linalg_inv_ex", "_linalg_solve_ex", "linalg_cholesky_ex", "linalg_lstsq"),
)
# These look at the memory itself, past the dispatcher.
_PAST_DISPATCH = ("tolist", "numpy", "cpu", "__array__")


class DeviceReads(TorchDispatchMode):
    """Collects the names of reads from tensors that count as being on the device.

    Args:
        device: tensors to begin with.
    """

    def __init__(self, device):
        super().__init__()
        self.found = []
        self._kept = []  # alive, so that no address is used twice
        self._places = set()
        self._stack = ExitStack()
        self.mark(device)

    def mark(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._places:
                    self._places.add(storage._cdata)
                    self._kept.append(storage)

    def on_device(self, tensor):
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.layout == torch.strided
            and tensor.untyped_storage()._cdata in self._places
        )

    def __enter__(self):
        for name in (*_PAST_DISPATCH, "new_tensor"):
            self._stack.enter_context(patch.object(torch.Tensor, name, self._watched(name)))
        self._stack.enter_context(
            patch.object(torch.Tensor, "to", self._watched("to", lambda to: "cpu" in to))
        )
        self._stack.enter_context(patch.object(torch, "tensor", self._making(torch.tensor)))
        return super().__enter__()

    def __exit__(self, *error):
        self._stack.close()
        return super().__exit__(*error)

    def _making(self, original):
        def call(*args, **kwargs):
            if kwargs.get("device") not in (None, "cpu"):
                self.found.append("tensor")
            return original(*args, **kwargs)

        return call

    def _watched(self, name, when=lambda words: True):
        original = getattr(torch.Tensor, name)

        def call(tensor, *args, **kwargs):
            words = [word for word in (*args, *kwargs.values()) if isinstance(word, str)]
            if self.on_device(tensor) and when(words):
                self.found.append(name)
            return original(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = tree_leaves((args, kwargs))
        touched = any(self.on_device(x) for x in inputs)
        name = func.overloadpacket.__name__
        if touched and name in _READS and not (name == "repeat_interleave" and "self_int" in str(func)):
            self.found.append(name)
        if name == "copy_" and self.on_device(args[1]) and not self.on_device(args[0]):
            self.found.append(name)
        if touched and name in ("index", "index_put", "index_put_"):
            picked = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in picked):
                self.found.append(f"{name} by a mask")
        out = func(*args, **(kwargs or {}))
        if touched:
            self.mark(out)
        return out
