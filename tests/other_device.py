"""A device that is no CPU and computes all the same: what runs on it and gives what a CPU gives takes every tensor along.

Its numbers are those of a CPU tensor behind a wrapper. An operation that meets tensors of the host and of the device raises, as on a GPU,
and so does whatever reads its memory: `numpy()`, a generator of the host's. PyTorch's PrivateUse1 backend in Python.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


_setup_privateuseone_for_python_backend("other")
DEVICE, HOST = torch.device("other", 0), torch.device("cpu")
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}  # which go from one device to another
NewGenerator, generators = torch.Generator, {}  # by their address: in an operation they are other objects of Python


class OtherTensor(torch.Tensor):
    """A tensor of the device; `here` is the CPU's that has its numbers."""

    @staticmethod
    def __new__(cls, here):
        shape = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=DEVICE, **shape)
        tensor.here = here
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    others = [leaf for leaf in leaves if isinstance(leaf, OtherTensor)]
    name, asked = function.overloadpacket.__name__, kwargs.get("device")
    if others and name not in COPIES:
        for leaf in leaves:  # a number as a tensor may come from the host
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OtherTensor) and leaf.dim():
                raise RuntimeError(f"{name}: tensors on the CPU and on {DEVICE}")
    there = bool(others)
    if asked is not None:
        there, kwargs = torch.device(asked).type == DEVICE.type, kwargs | {"device": HOST}
    elif name == "copy_":
        there = isinstance(args[0], OtherTensor)
    if (generator := kwargs.get("generator")) is not None and (generator._cdata in generators) != there:
        raise RuntimeError(f"{name}: a generator of another device")
    args, kwargs = tree_map(lambda leaf: leaf.here if isinstance(leaf, OtherTensor) else leaf, (args, kwargs))
    known = {id(other.here): other for other in others}  # what is computed in its place

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor) or not there:
            return leaf
        return known[id(leaf)] if id(leaf) in known else OtherTensor(leaf)

    return tree_map(wrapped, function(*args, **kwargs))


class OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def new_generator(device="cpu"):
    if torch.device(device).type != DEVICE.type:
        return NewGenerator(device)
    generator = NewGenerator()
    return generators.setdefault(generator._cdata, generator)


def copy_from(source, target, non_blocking=False):
    here = lambda tensor: tensor.here if isinstance(tensor, OtherTensor) else tensor
    here(target).copy_(here(source))
    return target


# `torch.tensor(..., device=)` goes by no mode
KERNELS = torch.library.Library("aten", "IMPL")
KERNELS.impl(
    "empty_strided", lambda size, stride, dtype, **kwargs: OtherTensor(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1"
)  # fmt: skip
KERNELS.impl("_copy_from", copy_from, "PrivateUse1")


@contextmanager
def other_device():
    """While inside, the device is there, and what Accelerate computes on."""
    with (
        mock.patch.dict("os.environ", {"ACCELERATE_TORCH_DEVICE": str(DEVICE)}),
        mock.patch.object(torch, "Generator", new_generator),
        OtherDevice(),
    ):
        yield DEVICE
