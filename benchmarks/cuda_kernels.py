#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What do the kernels for GPUs compile to? The table of docs/cuda.md; no GPU is needed.

Needs the extra `cuda`, and nvdisasm (of CUDA, or of nvidia-cuda-nvdisasm on the PATH) to count
instructions. `--call KERNEL` calls one on a GPU instead, for a tool that watches it there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fastattn import cuda
from fastattn.cuda import _build
from fastattn.cuda.kernels import decode, mma, mma_backward, simt, wgmma, wgmma_backward
from fastattn.cuda.kernels.simt_tiles import Given

DTYPE = "bfloat16"
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
HEADS = 8  # of the queries of a call; half as many of the keys
HEAD_DIMS = {"wgmma": (64, 128), "mma": (64, 128), "decode": (64, 128, 256), "simt": (64,)}
COUNTED = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG")


def kernels():
    """Yield each kernel's name, head_dim, factory's result and the GPUs that it is compiled for."""
    for head_dim in mma.TILES:
        yield "mma", head_dim, mma.forward(DTYPE, head_dim), (AMPERE, ADA, HOPPER)
    for head_dim in mma_backward.QUERIES:
        both = (AMPERE, HOPPER)
        yield "mma, dk and dv", head_dim, mma_backward.dkdv(DTYPE, head_dim), both
        yield "mma, dq", head_dim, mma_backward.dq(DTYPE, head_dim), both
    for head_dim in wgmma.TILES:
        yield "wgmma", head_dim, wgmma.forward(DTYPE, head_dim), (HOPPER,)
        yield "wgmma, gradients", head_dim, wgmma_backward.backward(DTYPE, head_dim), (HOPPER,)
    for head_dim in decode.ROW_TILES:
        yield "decode, 16 rows", head_dim, decode.split(DTYPE, head_dim, 1), (AMPERE, HOPPER)
    for head_dim in (64, 128):
        kernel = simt.forward(Given("float32", "float32"), head_dim)
        yield "simt, float32", head_dim, kernel, (AMPERE,)


def instructions(cubin):
    """Return how often each counted instruction is in a cubin; nothing without nvdisasm."""
    nvdisasm = shutil.which("nvdisasm")
    if nvdisasm is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        listing = subprocess.run(
            [nvdisasm, "-c", file.name], capture_output=True, text=True, check=True
        )
    found = Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@\S+\s+)?(\w+)", listing.stdout, re.MULTILINE))
    return {name: found[name] for name in COUNTED}


def call(kernel, head_dims, tokens, gradients):
    """Call a kernel once for each head_dim on random data, and its gradients if asked to."""
    os.environ["FASTATTN_CUDA_KERNEL"] = kernel
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"no GPU: PyTorch {torch.__version__} sees none")
    dtype = torch.float32 if kernel == "simt" else torch.bfloat16
    q_len = 3 if kernel == "decode" else tokens
    for head_dim in head_dims:
        shapes = ((1, HEADS, q_len), (1, HEADS // 2, tokens), (1, HEADS // 2, tokens))
        arrays = [torch.randn(*x, head_dim, device="cuda", dtype=dtype) for x in shapes]
        sys.stdout.write(f"{cuda.explain(*arrays)}\n")
        out, lse = cuda.attention(*arrays, return_lse=True)
        results = [out, lse]
        if gradients and kernel != "decode":  # whose gradients are those of mma
            results += cuda.attention_backward(torch.randn_like(out), *arrays, out, lse)
        if not all(x.isfinite().all() for x in results):
            sys.exit(f"{kernel}, head_dim {head_dim}: not all results are finite")


def main():
    """Print the table, or call a kernel."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--call", choices=HEAD_DIMS, metavar="KERNEL", help=", ".join(HEAD_DIMS))
    parser.add_argument("--tokens", type=int, default=300, help="of the keys (300)")
    parser.add_argument("--head-dim", type=int, help="this one alone")
    parser.add_argument("--forward", action="store_true", help="no gradients")
    asked = parser.parse_args()
    if asked.call:
        head_dims = (asked.head_dim,) if asked.head_dim else HEAD_DIMS[asked.call]
        call(asked.call, head_dims, asked.tokens, not asked.forward)
        return
    head = ("kernel", "head_dim", "for", "registers", "spills", "local", "KiB", *COUNTED, "seconds")
    write = sys.stdout.write
    write("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n")
    for name, head_dim, kernel, capabilities in kernels():
        for capability in capabilities:
            start = time.perf_counter()
            binary = _build.build(kernel, capability)
            seconds = time.perf_counter() - start
            counts = instructions(binary.cubin)
            row = (
                name,
                head_dim,
                binary.architecture,
                binary.registers,
                f"{binary.spill_stores}/{binary.spill_loads}",
                "yes" if ".local" in binary.ptx else "no",
                round((binary.shared_bytes + binary.static_shared_bytes) / 1024),
                *(counts.get(name, "-") for name in COUNTED),
                f"{seconds:.1f}",
            )
            write("| " + " | ".join(map(str, row)) + " |\n")


if __name__ == "__main__":
    main()
