"""Two devices that are no CPU and compute all the same: what runs on one and gives what a CPU gives takes every tensor along.

Its numbers are those of a CPU tensor behind a wrapper. An operation that meets tensors of several devices raises, as on a GPU, and so
does whatever reads its memory: `numpy()`, a generator of the host's. PyTorch's PrivateUse1 backend in Python.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def device_count(self):
        return 2


_setup_privateuseone_for_python_backend("other", Backend())
DEVICE, HOST = torch.device("other", 0), torch.device("cpu")
COPIES = {"_to_copy", "copy_"}  # which go from one device to another
NewGenerator, generators = torch.Generator, {}  # by their address: in an operation they are other objects of Python


class OtherTensor(torch.Tensor):
    """A tensor of the device; `here` is the CPU's that has its numbers."""

    @staticmethod
    def __new__(cls, here, device=DEVICE):
        device = torch.device(DEVICE.type, device.index or 0)
        shape = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=device, **shape)
        tensor.here = here
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.here.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = OtherTensor(self.here.clone(), self.device)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def data_ptr(self):
        return self.here.data_ptr() + (
            (1 + self.device.index) << 60
        )  # no address of the host's, by which Accelerate knows ties

    def untyped_storage(self):
        return self.here.untyped_storage()


def mapped(function, value):
    """The value with the function applied to the tensors in it, by themselves or in lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, one) for one in value)
    return function(value) if isinstance(value, torch.Tensor) else value


def computed(operation, args, kwargs):
    """What an operation gives, computed on the CPU: for the device where its tensors are, or where it is asked for."""
    name, hosts, others = operation.overloadpacket.__name__, [], {}

    def here(tensor):
        if not isinstance(tensor, OtherTensor):
            hosts.append(tensor)
            return tensor
        others[id(tensor.here)] = tensor
        return tensor.here

    into = args[0].device if name == "copy_" else None
    args, kwargs = mapped(here, args), {key: mapped(here, value) for key, value in kwargs.items()}
    devices = {tensor.device for tensor in others.values()}
    if name not in COPIES and (len(devices) > 1 or (devices and any(tensor.dim() for tensor in hosts))):
        raise RuntimeError(
            f"{name}: tensors on {', '.join(map(str, devices))} and others"
        )  # but a number of the host's
    device = into or next(iter(devices), HOST)
    if kwargs.get("device") is not None:
        device, kwargs = torch.device(kwargs["device"]), kwargs | {"device": HOST}
    is_there, generator = device.type == DEVICE.type, kwargs.get("generator")
    if generator is not None and (generator._cdata in generators) != is_there:
        raise RuntimeError(f"{name}: a generator of another device")
    there = lambda tensor: others[id(tensor)] if id(tensor) in others else OtherTensor(tensor, device)
    result = operation(*args, **kwargs)
    return mapped(there, result) if is_there else result


class OtherDevice(TorchDispatchMode):
    """Counts what the device computed, and how often the host read what it has, for which a GPU is waited for."""

    operations = reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = computed(function, args, kwargs or {})
        is_there = any(
            isinstance(one, OtherTensor) for one in (result if isinstance(result, (list, tuple)) else [result])
        )
        self.operations += is_there
        self.reads += not is_there and result is not None and any(isinstance(arg, OtherTensor) for arg in args)
        return result


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
    "empty_strided", lambda size, stride, dtype, device, **kwargs: OtherTensor(torch.empty_strided(size, stride, dtype=dtype), device), "PrivateUse1"
)  # fmt: skip
KERNELS.impl("_copy_from", copy_from, "PrivateUse1")
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
AUTOCAST.fallback(torch.library.fallthrough_kernel)


@contextmanager
def other_device():
    """While inside, the device is there, and what Accelerate computes on. Gives the counts."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as on a GPU
    try:
        with (
            mock.patch.dict("os.environ", {"ACCELERATE_TORCH_DEVICE": str(DEVICE)}),
            mock.patch.object(torch, "Generator", new_generator),
            OtherDevice() as there,
        ):
            yield there
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
