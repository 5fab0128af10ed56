"""A device that exists in name only: what would go wrong on a GPU, found on a machine that has none.

Tensors "on the device" keep their values in host memory, but torch sees another device: branches on
``device.type`` go where a GPU's go, and an operation on tensors of the device and of the host is an error, as
it is on a GPU. What the host may give is a single number, rows to index by, and a copy.

A device is registered for the whole process and for good, before its first backward pass: tests work in a
process of its own (``in_own_process``).
"""

import atexit
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
PLACE = f"{NAME}:0"
# Operations that wait for the device, beside copies to the host and indexing by a mask.
_READS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"),
    *("_unique2", "unique_consecutive", "unique_dim"),
)
_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")
# Operations that take single numbers from the host, beside all pointwise ones.
_NUMBERS = ("fill", "fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_")
# Operations that work on integers on the host, and on a GPU do not.
_FLOATING = (
    *("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "convolution", "avg_pool2d"),
    *("max_pool2d_with_indices", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
)


class Mixed(RuntimeError):
    """An operation on tensors of the device and of the host, or one that a GPU does not have."""


class Pretended(torch.Tensor):
    """A tensor of the device; ``value`` is what it holds, on the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value):
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=PLACE, requires_grad=value.requires_grad, **layout
        )
        made.value = value.detach()
        return made

    def __repr__(self):
        return f"Pretended({self.value})"

    # by these a module exchanges its parameters in place, and tied ones stay tied
    def __tensor_flatten__(self):
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Pretended(inner["value"])

    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_without_lists(index), value)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise Mixed(f"{operation} outside of `pretending`")


class _Device(TorchDispatchMode):
    """Runs every operation on the values; ``reads`` names those that would have waited for the device."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = operation.overloadpacket.__name__
        here = _on_device(operation, name, args, kwargs)
        there = here
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == NAME
            kwargs["device"] = torch.device("cpu") if there else kwargs["device"]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if here:
            self._note(name, there, args)
        if here and name == "_fused_sdp_choice":
            return 0  # the plain form: the others belong to a kind of device
        out = operation(*tree_map(_value, args), **tree_map(_value, kwargs))
        if not there:
            return out.clone() if here and out is _value(args[0]) else out
        out = tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(operation, args, kwargs, out) if here else out

    def _note(self, name, there, args):
        to_host = name == "copy_" and not isinstance(args[0], Pretended)
        masked = name in _INDEXING and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)
        )
        if name in _READS or to_host or masked or not there:
            self.reads.append(name)


def _value(x):
    return x.value if isinstance(x, Pretended) else x


def _without_lists(index):
    """Torch makes a tensor of a list past the dispatcher."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(torch.tensor(part).to(PLACE) if isinstance(part, list) else part for part in parts)
    return parts if isinstance(index, tuple) else parts[0]


def _on_device(operation, name, args, kwargs):
    """Whether any tensor is on the device; an error where a GPU would make one."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = [x for x in tensors if isinstance(x, Pretended)]
    host = [x for x in tensors if not isinstance(x, Pretended)]
    if not device:
        return False
    if name in _FLOATING and not device[0].is_floating_point():
        raise Mixed(f"{operation} of {device[0].dtype}")
    if not host or name == "copy_":
        return True
    into_host = isinstance(args[0], torch.Tensor) and not isinstance(args[0], Pretended)
    written = bool(operation._schema.arguments) and operation._schema.arguments[0].is_write
    numbers = torch.Tag.pointwise in operation.tags or name in _NUMBERS or name.startswith("_foreach")
    if name in _INDEXING:
        values = [x for x in args[2:3] if not isinstance(x, Pretended)]
        fine = not into_host and all(x.dim() == 0 for x in values)
    else:
        fine = numbers and not (written and into_host) and all(x.dim() == 0 for x in host)
    if not fine:
        sides = [[tuple(x.shape) for x in side] for side in (host, device)]
        raise Mixed(f"{operation}: {sides[0]} on the host, {sides[1]} on the device")
    return True


def _made(original):
    """Torch copies numbers to a device past the dispatcher."""

    def call(*args, device=None, **kwargs):
        made = original(*args, **kwargs)
        return made if device is None else made.to(device)

    return call


@contextmanager
def pretending():
    """There is a device ``PLACE``; gives the list of reads, which grows."""
    with (
        patch.object(torch, "tensor", _made(torch.tensor)),
        patch.object(torch, "as_tensor", _made(torch.as_tensor)),
        _Device() as device,
    ):
        yield device.reads


class _Backend:
    """What torch asks the module of a kind of device."""

    def __init__(self):
        self.default_generators = [torch.Generator()]

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def register():
    """Makes the device known to this process, and no other one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    atexit.register(os._exit, 0)  # torch's thread for the device does not survive the end of the interpreter


def in_own_process():
    """An executor of one fresh process in which the device is known."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=register)
