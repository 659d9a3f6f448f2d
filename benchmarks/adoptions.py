#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What packages of others gain from the lines of docs/adoptions.md: whole calls, and memory.

Needs the packages; those that name an older torch, or more than is used, go to a folder::

    pip install torch==2.13.0 tabpfn==9.2.0 tabicl==2.2.0
    pip install --no-deps --target build/adopted anemoi-models==0.19.0 anemoi-utils \
torch-geometric xxhash boltz==2.2.1
    PYTHONPATH=build/adopted python benchmarks/adoptions.py

With and without ours, each in a process of its own, the two take turns; the median of a call counts
after the first one. The memory is the most that a process has had, and what it had before the first
call. Weights are random. Attention with a dense mask cannot be run at 40,320 tokens here: the time,
and the memory beyond what was there before, are those at fewer tokens times the square of the
ratio, and marked by "about".
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.adoptions import packages

SETTLE_SECONDS = 0.1  # between turns: threads of the other process stop spinning
VERSIONS = ("fastattn", "torch", "tabpfn", "tabicl", "anemoi-models", "boltz")


class Case(NamedTuple):
    """What is called, with which size, how often; and the largest size for a dense mask."""

    make: str
    size: int
    rounds: int
    most_dense: int = sys.maxsize


def cases(share: float) -> dict[str, Case]:
    """Return the cases, of sizes that are a share of the real ones."""
    rows, tokens, grid = (max(64, round(share * x)) for x in (1000, 256, 10_000))
    whole_grid = max(128, round(share * 40_320))
    return {
        f"TabPFN 2.6, {rows:,} rows": Case("tabpfn_2_6", rows, 5),
        f"TabPFN 3.5, {rows:,} rows": Case("tabpfn_3_5", rows, 3),
        f"TabICL, {rows:,} rows": Case("tabicl", rows, 5),
        f"anemoi's layer, {grid:,} tokens, window 512": Case("anemoi", grid, 3),
        f"anemoi's layer, {whole_grid:,} tokens, window 512": Case("anemoi", whole_grid, 2, grid),
        f"Boltz's triangle attention, {tokens} tokens": Case("triangle", tokens, 7),
        f"the same and its gradients, {tokens} tokens": Case("triangle_gradients", tokens, 5),
    }


def tabpfn(architecture: str, rows: int, ours: bool) -> Any:
    """Make a call that predicts a fifth as many rows as were seen."""
    import torch

    predict = packages.tabpfn(architecture, rows, torch.float32)
    if ours:
        adopt("TabPFN")
    return predict


tabpfn_2_6 = functools.partial(tabpfn, "tabpfn_v2_6")
tabpfn_3_5 = functools.partial(tabpfn, "tabpfn_v3_5")


def tabicl(rows: int, ours: bool) -> Any:
    """Make a call that predicts a fifth as many rows as were seen."""
    with tempfile.TemporaryDirectory() as folder:
        predict = packages.tabicl(folder, rows)
    if ours:
        adopt("TabICL")
    return predict


def anemoi(tokens: int, ours: bool) -> Any:
    """Make a call of the layer, 16 heads of 64."""
    import torch

    implementation = "scaled_dot_product_attention"
    if ours:
        adopt("Anemoi", 1)
        implementation = "flash_attention"
    width = 16 * 64
    _, call = packages.anemoi_layer(
        16, width, window_size=512, attention_implementation=implementation
    )
    return without_gradients(functools.partial(call, torch.randn(tokens, width)))


def triangle_module(tokens: int, ours: bool) -> tuple[Any, Any]:
    """Return the module, 4 heads of 32, and a call of it."""
    import torch

    layer = packages.triangle_attention("boltz", 128, 4, 32)
    if ours:
        function, _, place = packages.lines("OpenFold3 and Boltz")
        exec(function + place, {})
    x, mask = torch.randn(1, tokens, tokens, 128), torch.rand(1, tokens, tokens) > 0.1
    return layer, functools.partial(layer, x, mask.float())


def triangle(tokens: int, ours: bool) -> Any:
    """Make a call of the module."""
    return without_gradients(triangle_module(tokens, ours)[1])


def triangle_gradients(tokens: int, ours: bool) -> Any:
    """Make a call of the module and its backward pass."""
    layer, call = triangle_module(tokens, ours)

    def both() -> None:
        layer.zero_grad()
        call().square().sum().backward()

    return both


def without_gradients(call: Any) -> Any:
    """Return the call, under no_grad."""
    import torch

    return torch.no_grad()(call)


def adopt(heading: str, blocks: int | None = None) -> None:
    """Run what the page tells users to write."""
    exec("".join(packages.lines(heading)[:blocks]), {})


def most_memory() -> int:
    """Return the most bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(connection: Any, case: Case, ours: bool, threads: int) -> None:
    """Make the call, and make it whenever asked; send what memory there was, and each time."""
    import torch

    warnings.simplefilter("ignore")  # TabPFN: many rows may be slow on a CPU
    torch.set_num_threads(threads)
    call = globals()[case.make](case.size, ours)
    connection.send(most_memory())
    while connection.recv():
        begin = time.perf_counter()
        call()
        connection.send((time.perf_counter() - begin, most_memory()))


class Side:
    """A process that makes the call of a case, with ours or without."""

    def __init__(self, case: Case, ours: bool, threads: int) -> None:
        self.times: list[float] = []
        self._connection, end = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(end, case, ours, threads))
        self._process.start()
        end.close()
        self.before = self._connection.recv()

    def turn(self) -> None:
        """Make the call once."""
        self._connection.send(True)
        seconds, self.memory = self._connection.recv()
        self.times.append(seconds)
        time.sleep(SETTLE_SECONDS)

    def close(self) -> tuple[float, float, float]:
        """End the process; return the median of its times, the most memory, and that before."""
        self._connection.send(False)
        self._process.join()
        return statistics.median(self.times[1:]), self.memory, self.before


def measured(case: Case, threads: int) -> list[tuple[float, float, float]]:
    """Return time, memory and memory before the call, without ours and with it."""
    dense = case._replace(size=min(case.size, case.most_dense))
    sides = [Side(dense, False, threads), Side(case, True, threads)]
    for _ in range(case.rounds + 1):
        for side in sides:
            side.turn()
    (seconds, memory, before), ours = (side.close() for side in sides)
    scale = (case.size / dense.size) ** 2
    return [(seconds * scale, before + (memory - before) * scale, before), ours]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--share", type=float, default=1.0, help="of each size (%(default)s)")
    parser.add_argument("--case", default="", help="cases with this in their names")
    options = parser.parse_args()
    os.environ |= {x: str(options.threads) for x in ("OMP_NUM_THREADS", "FASTATTN_NUM_THREADS")}
    versions = ", ".join(f"{x} {metadata.version(x)}" for x in VERSIONS)
    show("| call | without | with fastattn | speed-up | memory without | with | before the call |")
    show("|---|---:|---:|---:|---:|---:|---:|")
    for name, case in cases(options.share).items():
        if options.case not in name:
            continue
        theirs, ours = measured(case, options.threads)
        about = "about " if case.size > case.most_dense else ""
        memory = " | ".join(f"{x / 2**20:,.0f} MiB" for x in (theirs[1], *ours[1:]))
        show(
            f"| {name} | {about}{theirs[0]:.3g} s | {ours[0]:.3g} s | "
            f"{about}{theirs[0] / ours[0]:.1f}x | {about}{memory} |"
        )
    show(f"\n{options.threads} threads, {versions}")


def show(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
