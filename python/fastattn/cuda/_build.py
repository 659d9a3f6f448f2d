# SPDX-License-Identifier: Apache-2.0
"""How does a kernel in Python become machine code? Numba writes PTX, nvJitLink assembles it.

Called by `_cache.py`, and by tests that look at the PTX and the registers. Calls numba-cuda and
cuda-bindings, which are imported when the first kernel is built. Neither a GPU nor a driver is
needed: what is built here can be loaded elsewhere by `_driver.py` alone.
"""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastattn.cuda.kernels import Kernel

Capability = tuple[int, int]

INSTALL = 'pip install "fastattn[cuda]"'
LEAST_CAPABILITY = (7, 5)  # Turing: CUDA 13 writes code for nothing older
HOPPER = (9, 0)
PARAMETERS = ("int32", "int64", "float32", "float64")  # what a kernel may take by value
TENSOR_MAP = "tensor_map"
TENSOR_MAP_BYTES = 128


class Binary(NamedTuple):
    """Machine code, what launching it takes, and what the assembler said of it."""

    name: str  # the symbol in the code
    cubin: bytes  # what the driver loads; PTX if the GPU is newer than the compiler
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

    Raises RuntimeError if the kernel cannot run there, or if NVIDIA's libraries refuse it, and
    ImportError without numba-cuda.
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
        ptx = with_tensor_maps(ptx, kernel.name, kernel.tensor_maps)
        cubin, log = assemble(ptx, architecture)
    # The code for one generation does not run on the next: there, the driver compiles the PTX.
    image = cubin if target[0] == capability[0] else ptx.encode() + b"\0"
    return Binary(
        kernel.name,
        image,
        kernel.threads,
        kernel.shared_bytes,
        parameters,
        architecture,
        **report(log),
        log=log,
        ptx=ptx,
    )


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
    """Return what each argument of a kernel is: one of PARAMETERS, or TENSOR_MAP."""
    names = [str(kind) for kind in kernel.signature]
    for number, name in enumerate(names):
        if name not in PARAMETERS:
            raise TypeError(
                f"argument {number} of {kernel.name} must be one of {', '.join(PARAMETERS)}, "
                f"not {name}"
            )
    for number in kernel.tensor_maps:
        if names[number] != "int64":
            raise TypeError(
                f"argument {number} of {kernel.name} is a tensor map and must be declared int64, "
                f"not {names[number]}"
            )
        names[number] = TENSOR_MAP
    return tuple(names)


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
        if declared != 1 or f"[{parameter}" in ptx:
            raise RuntimeError(f"{name}: parameter {number} is read in an unknown way in the PTX")
    return ptx


def assemble(ptx: str, architecture: str) -> tuple[bytes, str]:
    """Return the machine code that nvJitLink makes of PTX, and its log, warnings included."""
    from cuda.bindings import nvjitlink

    def text(size_of: Any, read: Any) -> str:
        buffer = bytearray(size_of(handle))
        read(handle, buffer)
        return buffer.rstrip(b"\0").decode(errors="replace")

    handle = None
    try:
        options = [f"-arch={architecture}", "-Xptxas=-v"]  # -v: registers and spills in the log
        handle = nvjitlink.create(len(options), options)
        code = ptx.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        logs = (
            text(nvjitlink.get_info_log_size, nvjitlink.get_info_log),
            text(nvjitlink.get_error_log_size, nvjitlink.get_error_log),
        )
    except nvjitlink.nvJitLinkError as error:
        said = str(error)
        if handle is not None:
            said += "\n" + text(nvjitlink.get_error_log_size, nvjitlink.get_error_log)
        raise RuntimeError(
            f"nvJitLink made no code for {architecture} of what NVVM wrote; nvidia-nvjitlink must "
            f"be no older than nvidia-nvvm ({INSTALL} gets a pair that fits): {said.strip()}"
        ) from error
    finally:
        if handle is not None:
            nvjitlink.destroy(handle)
    return bytes(cubin), "\n".join(filter(None, logs))


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
        from cuda.bindings import nvjitlink  # noqa: F401
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
