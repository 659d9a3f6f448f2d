# SPDX-License-Identifier: Apache-2.0
"""How does a kernel in Python become machine code? Numba writes PTX, NVIDIA's ptxas assembles it.

Called by `_cache.py`, and by tests that look at the PTX and the registers. Calls numba-cuda, which
is imported when the first kernel is built, and the program ptxas. Neither a GPU nor a driver is
needed: what is built here can be loaded elsewhere by `_driver.py` alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn.cuda.kernels import HOPPER, LEAST_CAPABILITY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastattn.cuda.kernels import Kernel

Capability = tuple[int, int]

INSTALL = 'pip install "fastattn[cuda]"'
PARAMETERS = ("int32", "uint32", "int64", "float32", "float64")  # numbers that a kernel may take
TENSOR_MAP = "tensor_map"
# As PTX declares them, where b is as good as u.
PTX_TYPES = {"int32": "u32", "uint32": "u32", "int64": "u64", "float32": "f32", "float64": "f64"}
PTX_TYPES[TENSOR_MAP] = "u8"
TENSOR_MAP_BYTES = 128
SHARED_ALIGNMENT = 128  # of dynamic shared memory
# What a ptxas says that is older than the compiler or the architecture.
OLD_ASSEMBLER = ("Unsupported .version", "is not defined for option 'gpu-name'")


class Binary(NamedTuple):
    """Machine code, what launching it takes, and what the assembler said of it."""

    name: str  # the symbol in the code
    cubin: bytes  # what the driver loads; PTX if it has to compile that itself
    threads: int
    shared_bytes: int  # dynamic
    parameters: tuple[str, ...]  # of PARAMETERS, or TENSOR_MAP
    architecture: str  # such as "sm_90a"
    registers: int | None = None  # of a thread; None where the assembler does not say
    spill_stores: int | None = None  # bytes, of a thread
    spill_loads: int | None = None
    stack_bytes: int | None = None  # local memory, of a thread
    static_shared_bytes: int = 0
    log: str = ""
    ptx: str | None = None  # not kept by the cache


def build(kernel: Kernel, capability: Capability) -> Binary:
    """Return a kernel's machine code for GPUs of a compute capability.

    Raises RuntimeError if the kernel cannot run there or does not compile, and ImportError without
    numba-cuda.
    """
    check_capability(kernel, capability)
    parameters = parameters_of(kernel)
    with _compiler() as cuda:
        target = _target(capability)
        # Instructions of one architecture, wgmma for one, are in its "a" set alone.
        suffix = "a" if kernel.needs == HOPPER else ""
        architecture = f"sm_{target[0]}{target[1]}{suffix}"
        with _compiling_for(target):
            ptx, _ = cuda.compile(
                kernel.function,
                kernel.signature,
                device=False,
                cc=(*target, suffix) if suffix else target,
                abi="numba",
                abi_info={"abi_name": kernel.name},
                fastmath=False,  # which takes it that nothing is NaN
                launch_bounds=(kernel.threads, kernel.blocks_per_sm),
            )
        ptx = with_tensor_maps(with_aligned_shared(ptx), kernel.name, kernel.tensor_maps)
        check_parameters(ptx, kernel.name, parameters)
        cubin, log = assemble(ptx, architecture)
    # The code for one generation does not run on the next: there, the driver compiles the PTX.
    image = cubin if target[0] == capability[0] else None
    return Binary(
        kernel.name,
        image or ptx.encode() + b"\0",
        kernel.threads,
        kernel.shared_bytes,
        parameters,
        architecture,
        **report(log),
        log=log,
        ptx=ptx,
    )


def check_numba() -> None:
    """Make sure that the modules of kernels can be imported."""
    try:
        from numba.cuda import types  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"fastattn.cuda needs numba-cuda for its kernels ({error}): {INSTALL}"
        ) from error


def check_capability(kernel: Kernel, capability: Capability) -> None:
    """Refuse GPUs that the kernel has no instructions for."""
    given = "got one of {}.{}".format(*capability)
    if capability < LEAST_CAPABILITY:
        raise RuntimeError(
            "fastattn.cuda needs a GPU of compute capability 7.5 (Turing) or later, "
            f"{given}: fastattn.attention computes on the CPU"
        )
    if kernel.needs == HOPPER and capability != HOPPER:
        raise RuntimeError(f"{kernel.name} needs a GPU of compute capability 9.0 itself, {given}")
    if capability < kernel.needs:
        needed = "{}.{}".format(*kernel.needs)
        raise RuntimeError(
            f"{kernel.name} needs a GPU of compute capability {needed} or later, {given}"
        )


def parameters_of(kernel: Kernel) -> tuple[str, ...]:
    """Return what a launch passes to a kernel: numbers of PARAMETERS, and TENSOR_MAPs.

    Numba takes arguments apart: a tuple into its elements, an array into two addresses that are
    not read, its count of elements, their bytes, its address, its shape, and its strides in bytes.
    """
    parameters: list[str] = []
    for number, kind in enumerate(kernel.signature):
        if number in kernel.tensor_maps:
            if str(kind) != "int64" or len(parameters) != number:
                raise TypeError(
                    f"argument {number} of {kernel.name} is a tensor map: it must be declared "
                    "int64, and stand before arrays and tuples"
                )
            parameters.append(TENSOR_MAP)
        else:
            parameters += _taken_apart(kernel.name, number, kind)
    return tuple(parameters)


def _taken_apart(name: str, number: int, kind: Any) -> list[str]:
    if str(kind) in PARAMETERS:
        return [str(kind)]
    if str(kind) == "none":  # an address that is not read
        return ["int64"]
    if hasattr(kind, "ndim"):
        return ["int64"] * (5 + 2 * kind.ndim)
    if hasattr(kind, "types"):
        return [x for each in kind.types for x in _taken_apart(name, number, each)]
    raise TypeError(
        f"argument {number} of {name} must be a number ({', '.join(PARAMETERS)}), an array, a "
        f"tuple or none, not {kind}"
    )


def check_parameters(ptx: str, name: str, parameters: tuple[str, ...]) -> None:
    """Make sure that Numba took the arguments apart as `parameters_of` says."""
    declared = re.findall(
        rf"\.param (?:\.align \d+ )?\.([a-z]\d+) [^,)]*?\b{re.escape(name)}_param_\d+", ptx
    )
    expected = [PTX_TYPES[parameter] for parameter in parameters]
    if [kind.replace("b", "u") for kind in declared] != expected:
        raise RuntimeError(f"{name} has other parameters in the PTX than is known: {declared}")


def with_tensor_maps(ptx: str, name: str, numbers: tuple[int, ...]) -> str:
    """Make parameters 128-byte tensor maps by value, and what was loaded their addresses.

    Numba passes numbers only; TMA wants the address of a map that the launch has copied
    (`const __grid_constant__ CUtensorMap` in CUDA C++).
    """
    for number in numbers:
        parameter = f"{name}_param_{number}"
        ptx, declared = re.subn(
            rf"\.param \.[ub]64 {re.escape(parameter)}\b",
            f".param .align {TENSOR_MAP_BYTES} .b8 {parameter}[{TENSOR_MAP_BYTES}]",
            ptx,
        )
        ptx = re.sub(
            rf"ld\.param\.[ub]64\s+(%\w+), \[{re.escape(parameter)}\];",
            rf"mov.b64 \1, {parameter};\n\tcvta.param.u64 \1, \1;",
            ptx,
        )
        if declared != 1 or re.search(rf"\[{re.escape(parameter)}\b", ptx):
            raise RuntimeError(f"{name}: parameter {number} is read in an unknown way in the PTX")
    return ptx


def with_aligned_shared(ptx: str) -> str:
    """Align dynamic shared memory as swizzles of addresses expect it: Numba asks for 4 bytes."""
    return re.sub(r"(?m)^(\.extern \.shared \.align) \d+", rf"\1 {SHARED_ALIGNMENT}", ptx)


def assemble(ptx: str, architecture: str) -> tuple[bytes | None, str]:
    """Return the machine code that ptxas makes of PTX, and its log, warnings included.

    None if there is no ptxas that knows this PTX and architecture. nvJitLink would not do: it
    compiles PTX as a part of something larger, and then ignores setmaxnreg and serialises wgmma.
    """
    refused = []
    for ptxas in assemblers():
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            source.write_text(ptx)
            # -v: registers and spills in the log.
            command = [ptxas, f"-arch={architecture}", "-v", "-o", str(target), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            log = (done.stdout + done.stderr).strip()
            if done.returncode == 0:
                return target.read_bytes(), log
        if not any(text in log for text in OLD_ASSEMBLER):
            raise RuntimeError(f"{ptxas} made no code for {architecture} of what NVVM wrote: {log}")
        refused.append(f"{ptxas} is too old")
    reason = ", ".join(refused) or "ptxas is not here"
    return None, f"{reason}: the driver compiles the PTX"


def assemblers() -> list[str]:
    """Return where programs ptxas are: of NVIDIA's packages or toolkit, on the PATH, of Triton."""
    from cuda.pathfinder import find_nvidia_binary_utility

    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or []
    found = [
        find_nvidia_binary_utility("ptxas"),
        shutil.which("ptxas"),
        *(shutil.which(f"{x}/backends/nvidia/bin/ptxas") for x in folders),
    ]
    return list(dict.fromkeys(filter(None, found)))


def report(log: str) -> dict[str, Any]:
    """Return what the assembler's log says of a kernel, as the fields of Binary."""

    def number(pattern: str) -> int | None:
        match = re.search(pattern, log)
        return int(match[1]) if match else None

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "static_shared_bytes": number(r"Used \d+ registers.*?(\d+) bytes smem") or 0,
    }


@contextlib.contextmanager
def _compiler() -> Iterator[Any]:
    """Give numba.cuda to one thread at a time: Numba's compiler serves no two."""
    try:
        from cuda.pathfinder import find_nvidia_binary_utility  # noqa: F401
        from numba import cuda
        from numba.cuda.core.compiler_lock import global_compiler_lock
    except ImportError as error:
        raise ImportError(
            f"fastattn.cuda needs numba-cuda to compile its kernels ({error}): {INSTALL}"
        ) from error
    with global_compiler_lock:
        try:
            yield cuda
        except Exception as error:
            # cuda-pathfinder's class, which older versions lack.
            if type(error).__name__ != "DynamicLibNotFoundError":
                raise
            raise RuntimeError(
                f"fastattn.cuda needs NVIDIA's compiler libraries: {INSTALL}: {error}"
            ) from error


def _target(capability: Capability) -> Capability:
    """Return the newest compute capability up to the given one that the compiler knows."""
    from numba.cuda.cudadrv.nvrtc import get_supported_ccs

    supported = get_supported_ccs()
    known: list[Capability] = [each for each in supported if each <= capability]
    if not known:
        raise RuntimeError(
            "this CUDA compiler knows no GPU of compute capability {}.{} any more, only {}.{} and "
            "later: {}".format(*capability, *min(supported), INSTALL)
        )
    return max(known)


@contextlib.contextmanager
def _compiling_for(target: Capability) -> Iterator[None]:
    """Let numba-cuda compile for a GPU that is not here, under any NumPy; undone afterwards."""
    from numba.cuda import dispatcher

    with contextlib.ExitStack() as undo:
        if not hasattr(np, "row_stack"):
            # NumPy 2.5 has none, and numba-cuda 0.30 names it when it first compiles.
            setattr(np, "row_stack", np.vstack)  # noqa: B010
            undo.callback(delattr, np, "row_stack")
        # A device function asks the current device what to compile for, and so needs a driver.
        current = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
        undo.callback(setattr, dispatcher, "get_current_device", current)
        yield
