# SPDX-License-Identifier: Apache-2.0
"""Do kernels become machine code? Compiling without a GPU; what is refused."""
# ruff: noqa: E501 - the tables have a line per case

import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastattn.cuda import _build
from tests.cuda.kernels import Asked, small
from tests.cuda.sass import counts, disassemble
from tests.support.child import run

# Importing.


def imported():
    """Return what of CUDA `import fastattn` imports."""
    names = {x.split(".")[0] for x in sys.modules}
    found = sorted(names & {"numba", "numba_cuda", "llvmlite", "cuda", "cupy", "torch", "jax"})
    return found + [x for x in sys.modules if x.startswith("fastattn.cuda")]


def used_without_cuda():
    """Return whether an array of NumPy is on a GPU, and the errors of what needs one."""
    for name in ("numba", "numba_cuda", "llvmlite", "cuda"):
        sys.modules[name] = None
    from fastattn.cuda import _arrays, _cache, _driver

    errors = []
    for call in (_driver.count, lambda: _cache.load(Asked(), (8, 0))):
        try:
            call()
        except ImportError as error:
            errors.append(str(error))
    return [_arrays.library_of(np.zeros(3)).on_gpu, errors]


def test_importing_fastattn_touches_no_cuda():
    lines = [
        "import json, sys, fastattn",
        inspect.getsource(imported),
        "print(json.dumps(imported()))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_without_anything_of_cuda():
    is_cuda_array, errors = run(used_without_cuda, env={"FASTATTN_CACHE_DIR": ""})
    assert is_cuda_array is False
    assert [text.split(" (")[0] for text in errors] == [
        "fastattn.cuda needs cuda-bindings",
        "fastattn.cuda needs numba-cuda to compile its kernels",
    ]
    assert all(text.endswith('): pip install "fastattn[cuda]"') for text in errors)


# What is refused.


@pytest.mark.parametrize(
    ("needs", "capability", "message"),
    [
        (
            (7, 5),
            (7, 0),
            "fastattn.cuda needs a GPU of compute capability 7.5 (Turing) or later, got one of "
            "7.0: fastattn.attention computes on the CPU",
        ),
        ((8, 0), (7, 5), "asked needs a GPU of compute capability 8.0 or later, got one of 7.5"),
        ((9, 0), (10, 0), "asked needs a GPU of compute capability 9.0 itself, got one of 10.0"),
    ],
)
def test_gpus_without_the_instructions(needs, capability, message):
    with pytest.raises(RuntimeError) as error:
        _build.build(Asked(needs=needs), capability)
    assert str(error.value) == message


def array(ndim):
    """Return what stands for Numba's type of an array."""
    return types.SimpleNamespace(ndim=ndim)


def test_arguments_are_taken_apart_as_numba_does():
    pair = types.SimpleNamespace(types=("float32", array(1)))
    signature = ("int64", "int64", "uint32", array(2), "none", pair)
    assert _build.parameters_of(Asked(signature=signature, tensor_maps=(1,))) == (
        *("int64", "tensor_map", "uint32"),
        *("int64",) * 9,
        "int64",
        *("float32", *("int64",) * 7),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signature": ("int64", "float16")}, "argument 1 of asked must be a number (int32, uint32, int64, float32, float64), an array, a tuple or none, not float16"),
        ({"tensor_maps": (1,)}, "argument 1 of asked is a tensor map: it must be declared int64, and stand before arrays and tuples"),
        ({"signature": (array(1), "int64"), "tensor_maps": (1,)}, "argument 1 of asked is a tensor map: it must be declared int64, and stand before arrays and tuples"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_passed(fields, message):
    with pytest.raises(TypeError) as error:
        _build.build(Asked(**fields), (8, 0))
    assert str(error.value) == message


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])  # PTX of the second says more
def test_every_kind_of_argument_is_in_the_ptx_as_expected(ptxas, capability):
    """Of real types: else Numba takes arguments apart in another way than a launch passes them."""
    from numba.cuda import types

    def nothing(a, b, c, d, e, f, g):
        pass

    kinds = (types.int64, types.uint32, types.float64, types.none, types.int32)
    arrays = types.Array(types.uint16, 3, "A"), types.UniTuple(types.float32, 2)
    kernel = dataclasses.replace(small(), function=nothing, signature=(*kinds, *arrays))
    binary = _build.build(kernel, capability)
    assert binary.parameters == (
        *("int64", "uint32", "float64", "int64", "int32"),
        *("int64",) * 11,
        *("float32",) * 2,
    )
    with pytest.raises(RuntimeError, match=r"^small has other parameters in the PTX than is known"):
        _build.check_parameters(binary.ptx, "small", binary.parameters[:-1])
    with pytest.raises(RuntimeError, match=r"than is known: .*'u64', 'u32', 'f64', 'u64', 'u32', "):
        _build.check_parameters(binary.ptx, "small", ("int32", *binary.parameters[1:]))


def program(path, *, says, status):
    """Write a program that says something and ends."""
    path.write_text(f"#!/bin/sh\necho {shlex.quote(says)} >&2\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def test_ptx_with_an_error(ptxas):
    (path, *_) = _build.assemblers()
    with pytest.raises(RuntimeError) as error:
        _build.assemble(".version 8.0\n.target sm_80\n.address_size 64\nnonsense;\n", "sm_80")
    message = str(error.value)
    assert message.startswith(f"{path} made no code for sm_80 of what NVVM wrote: ptxas ")
    assert "syntax error" in message


def test_an_assembler_that_is_too_old_is_passed_over(ptxas, monkeypatch, tmp_path):
    """Be it for the PTX or for the architecture; without another, the driver compiles the PTX."""
    versions, known = "ptxas fatal: Unsupported .version 9.0; current version is 8.0", []
    known.append(program(tmp_path / "first", says=versions, status=255))
    names = "ptxas fatal: Value 'sm_90a' is not defined for option 'gpu-name'"
    known.append(program(tmp_path / "second", says=names, status=1))
    good = _build.assemblers()
    monkeypatch.setattr(_build, "assemblers", lambda: known + good)
    assert _build.build(small(), (8, 0)).cubin.startswith(b"\x7fELF")
    monkeypatch.setattr(_build, "assemblers", lambda: known)
    binary = _build.build(small(), (8, 0))
    assert binary.cubin == binary.ptx.encode() + b"\0"
    assert binary.registers is None
    assert binary.log == (
        f"{known[0]} is too old, {known[1]} is too old: the driver compiles the PTX"
    )


def test_what_ptxas_itself_calls_too_old(ptxas):
    """The texts that passing over rests on are those of the real one."""
    assert _build.assemble(".version 99.0\n.target sm_80\n.address_size 64\n", "sm_80")[0] is None
    assert _build.assemble(".version 8.0\n.target sm_80\n", "sm_999")[0] is None


def test_without_an_assembler_the_driver_compiles(numba_cuda, monkeypatch):
    monkeypatch.setattr(_build, "assemblers", list)
    binary = _build.build(small(needs=(9, 0)), (9, 0))
    assert binary.cubin == binary.ptx.encode() + b"\0"
    assert binary.log == "ptxas is not here: the driver compiles the PTX"
    assert binary.architecture == "sm_90a"


def test_where_assemblers_are_looked_for(numba_cuda, monkeypatch, tmp_path):
    from cuda import pathfinder

    (tmp_path / "triton" / "backends" / "nvidia" / "bin").mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").write_text("")
    (tmp_path / "bin").mkdir()
    of_triton = program(tmp_path / "triton/backends/nvidia/bin/ptxas", says="", status=0)
    on_path = program(tmp_path / "bin" / "ptxas", says="", status=0)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: "/of/nvidia/" + name)
    assert _build.assemblers() == ["/of/nvidia/ptxas", on_path, of_triton]
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: on_path)
    assert _build.assemblers() == [on_path, of_triton]
    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _build.assemblers() == [of_triton]


def test_compiler_libraries_that_are_missing(numba_cuda, monkeypatch):
    class DynamicLibNotFoundError(RuntimeError):
        pass

    def missing(*_, **__):
        raise DynamicLibNotFoundError("no libnvvm.so")

    monkeypatch.setattr(numba_cuda, "compile", missing)
    with pytest.raises(RuntimeError) as error:
        _build.build(small(), (8, 0))
    assert str(error.value) == (
        "fastattn.cuda needs NVIDIA's compiler libraries: "
        'pip install "fastattn[cuda]": no libnvvm.so'
    )


def test_gpus_that_the_compiler_knows_no_more(numba_cuda, monkeypatch):
    from numba.cuda.cudadrv import nvrtc

    monkeypatch.setattr(nvrtc, "get_supported_ccs", lambda: [(8, 0), (9, 0)])
    with pytest.raises(RuntimeError) as error:
        _build.build(small(), (7, 5))
    assert str(error.value) == (
        "this CUDA compiler knows no GPU of compute capability 7.5 any more, only 8.0 and later: "
        'pip install "fastattn[cuda]"'
    )


# What is built.


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_machine_code_without_a_gpu(ptxas, capability, tmp_path):
    binary = _build.build(small(), capability)
    assert binary.cubin.startswith(b"\x7fELF")
    assert binary.architecture == "sm_{}{}".format(*capability)
    assert f".target {binary.architecture}\n" in binary.ptx
    assert ".visible .entry small(" in binary.ptx
    assert binary[2:5] == (64, 256, ("int64", "int64", "int32", "float32"))
    assert 4 <= binary.registers <= 64
    assert (binary.spill_stores, binary.spill_loads, binary.stack_bytes) == (0, 0, 0)
    assert binary.static_shared_bytes == 0
    assert "Compiling entry function 'small'" in binary.log
    sass = counts(disassemble(binary.cubin, tmp_path))
    assert (sass["BAR"], sass["STS"], sass["LDS"], sass["STG"]) == (1, 1, 1, 1)


def test_instructions_of_one_architecture(numba_cuda):
    binary = _build.build(small(needs=(9, 0)), (9, 0))
    assert binary.architecture == "sm_90a"
    assert ".target sm_90a\n" in binary.ptx


def test_the_bounds_of_a_launch(numba_cuda):
    ptx = _build.build(small(threads=384, blocks_per_sm=2), (8, 0)).ptx
    assert ".maxntid 384" in ptx
    assert ".minnctapersm 2" in ptx


def test_a_gpu_newer_than_the_compiler_gets_the_nearest_code(ptxas, monkeypatch):
    """Within a generation machine code, on the next the PTX: the driver compiles that."""
    from numba.cuda.cudadrv import nvrtc

    monkeypatch.setattr(nvrtc, "get_supported_ccs", lambda: [(7, 5), (8, 0), (9, 0)])
    assert _build.build(small(), (8, 9)).architecture == "sm_80"
    binary = _build.build(small(), (10, 0))
    assert binary.cubin == binary.ptx.encode() + b"\0"
    assert ".target sm_90\n" in binary.ptx


def test_static_shared_memory_and_spills_are_read_from_the_log():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas info    : Function properties for k\n"
        "ptxas         .     96 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 96 bytes cumulative stack size, "
        "4096 bytes smem\n"
    )
    assert _build.report(log) == {
        "registers": 255,
        "spill_stores": 28,
        "spill_loads": 24,
        "stack_bytes": 96,
        "static_shared_bytes": 4096,
    }
    nothing = dict.fromkeys(("registers", "spill_stores", "spill_loads", "stack_bytes"))
    assert _build.report("") == {**nothing, "static_shared_bytes": 0}


def test_warnings_of_the_assembler_are_in_the_log(ptxas):
    """Such as that setmaxnreg is ignored, or wgmma serialised."""
    ptx = """
    .version 8.0
    .target sm_90a
    .address_size 64
    .visible .entry k()
    {
        setmaxnreg.dec.sync.aligned.u32 24;
        ret;
    }
    """
    bounded = ptx.replace("k()", "k() .maxntid 384 .minnctapersm 1")
    assert "Potential Performance Loss: 'setmaxnreg' ig" in _build.assemble(ptx, "sm_90a")[1]
    assert "Potential Performance Loss" not in _build.assemble(bounded, "sm_90a")[1]


# Tensor maps.


def test_dynamic_shared_memory_is_aligned_for_swizzles(ptxas):
    binary = _build.build(small(), (8, 0))
    assert re.findall(r"\.extern \.shared \.align (\d+)", binary.ptx) == ["128"]


def test_what_a_warp_does_together_is_convergent(ptxas, monkeypatch):
    from llvmlite import ir
    from numba import cuda
    from numba.cuda import types

    from fastattn.cuda.ptx import ex2, exchange
    from fastattn.cuda.ptx import multiply as multiply_of

    multiply = multiply_of["float16"]

    def together(scale):
        acc = cuda.local.array(4, dtype=np.float32)
        left = cuda.local.array(4, dtype=np.int32)
        for i in range(4):
            acc[i], left[i] = ex2(scale), i
        multiply(acc, 0, left, 0, left[0], left[1])
        exchange(acc[0], 1)

    found = {}
    call = ir.IRBuilder.call

    def watched(self, function, arguments, *rest, **given):
        if isinstance(function, ir.InlineAsm):
            found[function.asm.split(".")[0]] = "convergent" in given.get("attrs", ())
        return call(self, function, arguments, *rest, **given)

    monkeypatch.setattr(ir.IRBuilder, "call", watched)
    _build.build(small(function=together, signature=(types.float32,)), (8, 0))
    assert found == {"ex2": False, "mma": True, "shfl": True}


def test_a_tensor_map_is_passed_by_value(ptxas, tmp_path):
    plain = _build.build(small(), (9, 0))
    mapped = _build.build(small(tensor_maps=(0,)), (9, 0))
    assert mapped.parameters == ("tensor_map", "int64", "int32", "float32")
    assert ".param .align 128 .b8 small_param_0[128]" in mapped.ptx
    assert "[small_param_0]" in plain.ptx
    assert "[small_param_0]" not in mapped.ptx
    assert "cvta.param.u64" in mapped.ptx
    # sm_90 has parameters from 0x210, a map at a multiple of 128; the count is the third.
    for binary, address in ((plain, 0x220), (mapped, 0x308)):
        assert f"[{address:#x}]" in disassemble(binary.cubin, tmp_path)


def test_a_tensor_map_that_is_read_in_an_unknown_way():
    ptx = ".visible .entry k(\n.param .u64 k_param_0\n)\nld.param.v2.u64 {%rd1, %rd2}, [k_param_0];"
    with pytest.raises(RuntimeError, match=r"^k: parameter 0 is read in an unknown way in the PTX"):
        _build.with_tensor_maps(ptx, "k", (0,))
    with pytest.raises(RuntimeError, match=r"^k: parameter 1 is read in an unknown way in the PTX"):
        _build.with_tensor_maps(ptx, "k", (1,))


def test_only_the_parameter_that_is_meant_becomes_a_tensor_map():
    ptx = "".join(
        f".param .u64 k_param_{i};ld.param.u64 %rd{i}, [k_param_{i}];" for i in (1, 10, 11)
    )
    rewritten = _build.with_tensor_maps(ptx, "k", (1,))
    assert rewritten.count("[128]") == 1
    assert "ld.param.u64 %rd10, [k_param_10];" in rewritten
    assert "mov.b64 %rd1, k_param_1;" in rewritten


# Shims.


def build_without_row_stack():
    """Build under a NumPy that lacks row_stack, as 2.5 does; return what is left of the shims."""
    if hasattr(np, "row_stack"):
        delattr(np, "row_stack")
    binary = _build.build(small(), (8, 0))
    from numba.cuda import dispatcher

    return [
        hasattr(np, "row_stack"),
        dispatcher.get_current_device.__module__,
        binary.cubin[:4].hex(),
    ]


def test_numpy_without_row_stack_and_undone_shims(numba_cuda):
    assert run(build_without_row_stack) == [False, "numba.cuda.api", "7f454c46"]


def test_shims_are_undone_when_a_kernel_does_not_compile(numba_cuda):
    from numba.cuda import dispatcher

    def wrong(source, target, count, factor):
        source.nothing()

    before = dispatcher.get_current_device
    with pytest.raises(Exception, match="Unknown attribute 'nothing' of type int64"):
        _build.build(dataclasses.replace(small(), function=wrong), (8, 0))
    assert dispatcher.get_current_device is before


def test_threads_may_build_at_once(numba_cuda):
    kernels = [small(name=f"small_{i}", threads=32 * (i + 1)) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda kernel: _build.build(kernel, (8, 0)), kernels))
    for kernel, binary in zip(kernels, built, strict=True):
        assert binary.name == kernel.name
        assert f".entry {kernel.name}(" in binary.ptx
        assert f".maxntid {kernel.threads}" in binary.ptx
