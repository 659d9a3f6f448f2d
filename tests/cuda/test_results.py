# SPDX-License-Identifier: Apache-2.0
"""Results on a GPU: in memory of our own, or where `out` lies."""
# ruff: noqa: E501 - the tables have a line per case

import ctypes
import sys

import numpy as np
import pytest

from fastattn import _dlpack
from fastattn.cuda import _arrays, _driver
from fastattn.cuda._arrays import OwnArray
from tests.cuda.arrays import INTERFACE, STREAM, attribute, interface, pointer_of, query_on, tensor
from tests.cuda.fake_driver import Gpu
from tests.support.child import start

# Memory of our own.


def test_our_memory_is_given_back_after_its_readers(gpu):
    own = OwnArray((2, 3), "float32", STREAM, 1)
    assert gpu.of("cuMemAllocAsync") == [(24, STREAM)]
    capsule = own.__dlpack__(stream=5)
    own.__dlpack__(stream=-1)
    gpu.calls.clear()
    pointer = own.pointer
    del own
    assert gpu.of("cuMemFreeAsync") == []  # the capsule has it
    del capsule
    assert [x[1] for x in gpu.of("cuEventRecord")] == [5]
    assert [x[0] for x in gpu.of("cuStreamWaitEvent")] == [STREAM]
    assert gpu.of("cuMemFreeAsync") == [(pointer, STREAM)]
    assert gpu.names().index("cuStreamWaitEvent") < gpu.names().index("cuMemFreeAsync")
    assert _arrays._exports == {}


def test_our_memory_without_a_reader(gpu):
    own = OwnArray((), "float64", STREAM, 0)
    pointer = own.pointer
    del own
    assert gpu.of("cuMemFreeAsync") == [(pointer, STREAM)]
    assert gpu.of("cuEventRecord") == []


def test_a_result_that_there_is_no_memory_for(gpu):
    gpu.fails["cuMemAllocAsync"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(MemoryError, match="smaller batch"):
        _arrays.empty(query_on(), (2**40,), "float32", STREAM)
    assert gpu.of("cuMemFreeAsync") == []


def test_a_context_that_is_gone_when_memory_is_given_back(gpu):
    own = OwnArray((3,), "float32", STREAM, 0)
    gpu.fails["cuCtxPushCurrent"] = "CUDA_ERROR_UNKNOWN"
    del own
    # An exception there would be a warning, and that an error.
    gpu.fails.clear()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_our_memory_has_the_interface(gpu, dtype):
    own = OwnArray((2, 3), dtype, STREAM, 0)
    assert getattr(own, INTERFACE) == {
        "version": 3,
        "shape": (2, 3),
        "strides": None,
        "typestr": np.dtype(dtype).str,
        "data": (own.pointer, False),
        "stream": STREAM,
    }
    assert getattr(OwnArray((2,), dtype, 0, 0), INTERFACE)["stream"] == 1
    again = _arrays.device_array("key", own, STREAM, dtypes=(dtype,))
    assert again[:5] == (own.pointer, (2, 3), (3, 1), dtype, 0)


def test_bfloat16_of_ours_is_given_by_dlpack(gpu):
    own = OwnArray((2, 3), "bfloat16", STREAM, 1)
    assert not hasattr(own, INTERFACE)
    assert own.__dlpack_device__() == (2, 1)
    assert _arrays.library_of(own).on_gpu
    again = _arrays.device_array("key", own, STREAM)
    assert again[:5] == (own.pointer, (2, 3), (3, 1), "bfloat16", 1)


def test_our_capsules_are_understood_by_others(gpu, torch):
    """The numbers that PyTorch reads there; on the CPU, where there are some."""
    own = OwnArray((2, 3), "float32", STREAM, 0)
    numbers = np.arange(6, dtype=np.float32)
    ctypes.memmove(own.pointer, numbers.ctypes.data, numbers.nbytes)
    capsule = own.__dlpack__(stream=-1)
    whole = _dlpack.Managed.from_address(_dlpack.pointer_in(capsule, _dlpack.DLTENSOR))
    whole.tensor.device_type = 1
    read = torch.utils.dlpack.from_dlpack(capsule)
    assert read.tolist() == numbers.reshape(2, 3).tolist()
    del own, capsule, whole
    assert gpu.of("cuMemFreeAsync") == []
    del read
    assert len(gpu.of("cuMemFreeAsync")) == 1
    assert _arrays._exports == {}


@pytest.mark.parametrize("given", [{"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (2, 1)}])
def test_our_memory_is_given_as_it_is(gpu, given):
    own = OwnArray((3,), "float32", STREAM, 0)
    with pytest.raises(BufferError, match=r"^fastattn's results are given to their own GPU, with"):
        own.__dlpack__(stream=5, **given)
    assert own.__dlpack__(stream=None, max_version=(1, 0), dl_device=(2, 0), copy=False)
    assert [x[0] for x in gpu.of("cuStreamWaitEvent")] == [1]


# out.


def out_of(gpu, query, shape=(2, 3), dtype="float32", inputs=(), **entries):
    out = interface(gpu, **{"shape": shape} | entries)
    return _arrays.destination(out, query, (2, 3), dtype, inputs, STREAM), out


def test_an_out_is_written_where_it_lies(gpu):
    array, out = out_of(gpu, query_on(), strides=(40, 4), inputs=[query_on()])
    assert array[:3] == (pointer_of(out), (2, 3), (10, 1))


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        ({"typestr": "<f8"}, TypeError, "out must be an array of float32, not float64"),
        ({"shape": (3, 2)}, ValueError, "out must have the shape of the result, (2, 3), got out.shape=(3, 2)"),
        ({"read_only": True}, ValueError, "out must be writeable, got a read-only array"),
        ({"strides": (24, 8)}, ValueError, "out must be contiguous along its last axis, got strides of (6, 2) elements"),
        ({"strides": (8, 4)}, ValueError, "out must not overlap itself, got strides of (2, 1) elements"),
        ({"strides": (0, 4)}, ValueError, "out must not overlap itself, got strides of (0, 1) elements"),
    ],
)  # fmt: skip
def test_outs_that_are_refused(gpu, entries, kind, message):
    with pytest.raises(kind) as error:
        out_of(gpu, query_on(), **entries)
    assert str(error.value) == message


def test_an_out_that_shares_memory_with_an_input(gpu):
    whole = interface(gpu, (4, 6), strides=(24, 4))
    pointer = pointer_of(whole)

    def part(row, column):
        entries = {"shape": (2, 3), "typestr": "<f4", "strides": (24, 4), "version": 3}
        return attribute(
            **{INTERFACE: entries | {"data": (pointer + row * 24 + column * 4, False)}}
        )

    gpu.hooks["cuPointerGetAttribute"] = lambda _, address: gpu.memory.setdefault(
        address, (0, None)
    )
    query = _arrays.device_array("query", part(0, 0), STREAM)
    for row, column, overlaps in ((0, 3, False), (2, 0, False), (1, 0, True), (0, 2, True)):
        out = part(row, column)
        if overlaps:
            with pytest.raises(ValueError, match=r"^out must not overlap an input, got an array"):
                _arrays.destination(out, query, (2, 3), "float32", [query], STREAM)
        else:
            _arrays.destination(out, query, (2, 3), "float32", [query], STREAM)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("torch", "out must be a tensor, as query is, not ndarray"),
        ("cupy", "out must be an array of cupy, as query is, not ndarray"),
        ("numba", "out must be an array of numba, as query is, not ndarray"),
        ("jax", "out must not be given if query is a JAX array: these are never written"),
    ],
)
def test_an_out_is_of_querys_library(gpu, library, message):
    with pytest.raises(TypeError) as error:
        _arrays.destination(
            np.zeros((2, 3)), query_on(library=library), (2, 3), "float32", [], STREAM
        )
    assert str(error.value) == message


def test_an_out_whose_negative_bit_is_set(gpu, torch):
    out = tensor(torch, is_neg=lambda _: True)
    with pytest.raises(ValueError, match=r"^out must be written as it is, got a tensor whose neg"):
        _arrays.destination(out, query_on(library="torch"), (2, 3), "float32", [], STREAM)


def test_an_empty_out(gpu):
    query = query_on()
    out = interface(gpu, (0, 3), data=(0, False), strides=(0, 4))
    assert _arrays.destination(out, query, (0, 3), "float32", [query], STREAM).shape == (0, 3)


def end_with_memory():
    """End a process that keeps memory of ours until the GPU, which it is not asked, has read it."""
    fake = sys.modules["cuda.bindings.driver"] = Gpu()
    own = OwnArray((3,), "float32", STREAM, 0)
    _driver.keep(STREAM, _driver.device(0), [own])
    return len(fake.memory)


def test_a_process_may_end_with_memory_of_ours():
    process = start(end_with_memory)
    assert process.communicate(timeout=60) == ("1\n", "")
    assert process.returncode == 0
