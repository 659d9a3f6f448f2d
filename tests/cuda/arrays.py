# SPDX-License-Identifier: Apache-2.0
"""What tests of arrays on a GPU share: arrays of no library, at addresses of the fake driver."""

import numpy as np
import pytest

from fastattn.cuda._arrays import DeviceArray

INTERFACE = "__cuda_array_interface__"
FLOATS = ("float16", "bfloat16", "float32", "float64")
STREAM = 77
needs_versions = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="this NumPy's capsules have no version"
)


def attribute(**attributes):
    return type("Thing", (), attributes)()


def interface(gpu, shape=(2, 3), typestr="<f4", device=0, offset=0, read_only=False, **entries):
    """Return an array of some library that has an interface and nothing else."""
    known = {"shape": shape, "typestr": typestr, "read_only": read_only}
    return interface_at(gpu.array(4096, device, offset), **known | entries)


def interface_at(address, shape=(2, 3), typestr="<f4", read_only=False, **entries):
    known = {"shape": shape, "typestr": typestr, "data": (address, read_only), "version": 3}
    return attribute(**{INTERFACE: known | entries})


def pointer_of(x):
    return getattr(x, INTERFACE)["data"][0]


class Capsules:
    """An array with DLPack alone: NumPy's capsules, said to be of a GPU."""

    def __init__(self, array, device=(2, 0), versions=True):
        self.array, self.device, self.versions, self.asked = array, device, versions, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream, **given):
        self.asked.append((stream, given.get("max_version")))
        if given and not self.versions:
            raise TypeError("unexpected keyword max_version")
        return self.array.__dlpack__(**given)


def query_on(device=0, library="other", owner=None):
    return DeviceArray(4096, (2, 3), (3, 1), "float32", device, owner, library)


def tensor(torch, shape=(2, 3), dtype=None, *, strides=None, device="cuda:0", **attributes):
    """Return a tensor that says that it is on a GPU, at an address of the test's."""
    known = {
        "__torch_function__": torch._C._disabled_torch_function_impl,
        "data_ptr": lambda self: attributes.get("address", 4096),
        "__torch_dispatch__": classmethod(lambda *_, **__: NotImplemented),
    }
    requires_grad = attributes.pop("requires_grad", False)
    kind = type("CudaTensor", (torch.Tensor,), known | attributes)
    dtype = torch.float32 if dtype is None else dtype
    return torch.Tensor._make_wrapper_subclass(
        kind, shape, strides=strides, dtype=dtype, device=device, requires_grad=requires_grad
    )
