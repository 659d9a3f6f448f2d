# SPDX-License-Identifier: Apache-2.0
"""Problems as arrays of other libraries, and exporters by DLPack that are no library's."""

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from fastattn import _dlpack
from tests.support.problems import make_problem

NAMES = ("float32", "float64", "float16", "bfloat16")
SHAPES = {"heads": 4, "kv_heads": 2, "batch": (2,)}


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def tensor(torch, x):
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def numpy_of(x):
    """Return what a tensor or an array of JAX holds."""
    if type(x).__module__.startswith("jax") or isinstance(x, np.ndarray):
        return np.asarray(x)
    if isinstance(x, Exported):
        return x.array
    if str(x.dtype) == "torch.bfloat16":
        return x.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def problem(name="float32", q_len=21, kv_len=37):
    return make_problem(q_len, kv_len, dtype=dtype_of(name), **SHAPES)


def options():
    """Return every argument that may be an array, and is_causal, which needs query_offset."""
    rng = np.random.default_rng(1)
    return {
        "mask": rng.random((2, 1, 21, 37)) < 0.8,
        "bias": rng.standard_normal((4, 21, 37)).astype(np.float32),
        "query_offset": np.array([16, 9]),
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
        "kv_lengths": np.array([37, 30], np.int32),
        "is_causal": True,
    }


def converted(convert, arguments):
    return {k: convert(x) if isinstance(x, np.ndarray) else x for k, x in arguments.items()}


class Exported:
    """An array of a library that has DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return _dlpack.CPU, 0

    def __dlpack__(self, **wanted):
        return _dlpack.exporter(self.array).__dlpack__(**wanted)


class BeforeVersions(Exported):
    def __dlpack__(self, stream=None):
        return super().__dlpack__()


def view(x):
    """Return what a library's from_dlpack would give, by NumPy's if it can."""
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError):
        return _dlpack.array_of(x).view(ml_dtypes.bfloat16)


class InNamespace(Exported):
    """An array of a library that follows the array API standard."""

    device = "cpu"

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(from_dlpack=lambda x: InNamespace(view(x)))


X = np.ones((1, 2, 3, 4), np.float32)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


class Unit(np.ndarray):
    """Numbers with a unit, which NumPy's functions respect."""

    def __array_ufunc__(self, *given, **options):
        return NotImplemented
