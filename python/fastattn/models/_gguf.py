# SPDX-License-Identifier: Apache-2.0
"""What does a GGUF file hold? Metadata, and tensors that are views of the file, which is mapped.

A file of version 3 is little-endian, and is: a header; keys with typed values; a description of
each tensor; the data. All that it says is checked against its size before it is used, since a file
may come from anywhere.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastattn._quantised import BLOCK, BLOCKS, Quantised
from fastattn.models._file import File, Tensor, needed, shown, within

VERSION = 3
ALIGNMENT = "general.alignment"
MOST_AXES = 4
MOST_NESTED = 8  # arrays within each other
# The types of values, and of tensors, are numbers: places in these lists.
VALUE_TYPES = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")
STRING, ARRAY = 8, 9
TENSOR_TYPES = """F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K
    IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4
    Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4 Q1_0"""
SUPPORTED: dict[str, np.dtype[Any]] = {
    **{"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")},
    **BLOCKS,
}


def read(path: str | os.PathLike[str]) -> File:
    """Return what a GGUF file of version 3 holds.

    Parameters
    ----------
    path : path
        The file must not change while a tensor is in use.

    Returns
    -------
    File
        Values are an int, float, bool or str, a list of str, an array of numbers, or a list of such
        lists and arrays. A token may be any bytes: a str that is not UTF-8 in the file becomes
        those bytes by ``.encode(errors="surrogateescape")``. Tensors are read-only arrays or
        `Quantised`, and have the usual shape, (rows, columns).

    Raises
    ------
    ValueError
        The file is damaged, or has tensors that are not F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
    ModuleNotFoundError
        A tensor is BF16, and ml_dtypes is not installed.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    parser = _Parser(os.fspath(path), data)
    key_count, tensor_count = parser.header()
    metadata = parser.metadata(key_count)
    tensors = parser.tensors(tensor_count, metadata.get(ALIGNMENT, 32))
    return File(MappingProxyType(metadata), MappingProxyType(tensors))


class _Parser:
    """Steps through a file; `place` is what it is at, for errors."""

    def __init__(self, path: str, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.at, self.place = path, data, 0, "header"

    def refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"{self.path}: {self.place}: {problem}")

    def check_end(self, end: int, what: str) -> None:
        """Refuse the file if it ends before what it says that it holds."""
        if end > len(self.data):
            self.refuse(f"{what} must end within the {len(self.data)} bytes of the file, got {end}")

    def take(self, size: int, what: str) -> bytes:
        begin, self.at = self.at, self.at + size
        self.check_end(self.at, what)
        return self.data[begin : self.at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size, "an integer"), "little")

    def strings(self, count: int) -> list[str]:
        """Return strings, each of which has its length before it; a vocabulary has many."""
        self.check_end(self.at + 8 * count, f"{count} strings")
        data, end, size, strings = self.data, self.at, len(self.data), []
        for _ in range(count):
            begin = end + 8
            end = begin + int.from_bytes(data[end:begin], "little")
            if end > size:
                self.check_end(end, "a string")
            strings.append(str(data[begin:end], "utf-8", "surrogateescape"))
        self.at = end
        return strings

    def names(self, count: int, what: str) -> Iterator[str]:
        """Yield the name of each key or tensor; whoever asks reads what is behind it."""
        names: set[str] = set()
        for i in range(count):
            self.place = f"{what} {i + 1} of {count}"
            (name,) = self.strings(1)
            if not name or name in names or not name.isprintable():
                rule = "its name must be printable UTF-8, and no other's"
                self.refuse(f"{rule}, got {shown.repr(name)}")
            names.add(name)
            self.place = f"{what} {shown.repr(name)}"
            yield name

    def header(self) -> tuple[int, int]:
        """Return how many keys and tensors there are."""
        if (magic := self.data[:4]) != b"GGUF":
            self.refuse(f"the file must begin with b'GGUF', got {magic!r}")
        self.at = 4
        version = self.integer(4)
        if version != VERSION:
            big = version and version % 65536 == 0
            found = "a big-endian file" if big else str(version)
            self.refuse(f"the version must be {VERSION}, little-endian, got {found}")
        tensor_count, key_count = self.integer(8), self.integer(8)
        # The least: a length, a type and a value of a key; what a tensor without axes has.
        self.check_end(self.at + 13 * key_count, f"{key_count} keys")
        self.check_end(self.at + 24 * tensor_count, f"{tensor_count} tensors")
        return key_count, tensor_count

    def metadata(self, count: int) -> dict[str, Any]:
        return {name: self.value(self.integer(4)) for name in self.names(count, "key")}

    def value(self, kind: int, nested: int = 0) -> Any:
        if kind == STRING:
            return self.strings(1)[0]
        if kind != ARRAY:
            return self.numbers(kind, 1).item()
        if nested == MOST_NESTED:
            self.refuse(f"at most {MOST_NESTED} arrays must be within each other, got more")
        kind, count = self.integer(4), self.integer(8)
        if kind == STRING:
            return self.strings(count)
        if kind != ARRAY:
            return self.numbers(kind, count)
        self.check_end(self.at + 12 * count, f"{count} arrays")
        return [self.value(ARRAY, nested + 1) for _ in range(count)]

    def numbers(self, kind: int, count: int) -> NDArray[Any]:
        if kind >= len(VALUE_TYPES):
            self.refuse(f"the type of a value must be 0..{len(VALUE_TYPES) - 1}, got {kind}")
        dtype = np.dtype(VALUE_TYPES[kind])
        numbers = np.frombuffer(self.take(count * dtype.itemsize, f"{count} values"), dtype)
        if dtype == np.bool_ and (largest := numbers.view("u1").max(initial=0)) > 1:
            self.refuse(f"a bool must be 0 or 1, got {largest}")
        return numbers

    def tensors(self, count: int, alignment: Any) -> dict[str, Tensor]:
        told: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for name in self.names(count, "tensor"):
            if (axes := self.integer(4)) > MOST_AXES:
                self.refuse(f"it must have at most {MOST_AXES} axes, got {axes}")
            shape = tuple(self.integer(8) for _ in range(axes))[::-1]  # The file's is reversed.
            told[name] = shape, self.integer(4), self.integer(8)
        self.place = f"key {ALIGNMENT!r}"
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            self.refuse(f"it must be a power of two from 8, got {shown.repr(alignment)}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        extents = []
        for name, (shape, kind, offset) in told.items():
            self.place = f"tensor {shown.repr(name)}"
            if offset % alignment:
                self.refuse(f"its offset must be a multiple of {alignment}, got {offset}")
            tensors[name], size = self.tensor(shape, kind, start + offset)
            extents.append((offset, offset + size, name))
        for (_, end, _), (offset, _, name) in itertools.pairwise(sorted(extents)):
            if offset < end:
                self.place = f"tensor {shown.repr(name)}"
                self.refuse(f"its offset must be at least {end}, where another ends, got {offset}")
        return tensors

    def tensor(self, shape: tuple[int, ...], number: int, begin: int) -> tuple[Tensor, int]:
        """Return the tensor that begins there, and its size in bytes."""
        kind = dict(enumerate(TENSOR_TYPES.split())).get(number, f"type {number}")
        if kind not in SUPPORTED:
            self.refuse(f"{kind} is not supported: {', '.join(SUPPORTED)} are")
        if 0 in shape:
            self.refuse(f"its shape must be of positive numbers, got {shape}")
        dtype = SUPPORTED[kind]
        if dtype.names:
            columns = shape[-1] if shape else 1
            if columns % BLOCK:
                self.refuse(f"{kind} must have rows of a multiple of {BLOCK}, got {columns}")
            shape = (*shape[:-1], columns // BLOCK)
        size = math.prod(shape) * dtype.itemsize
        self.check_end(begin + size, "its data")
        array = np.frombuffer(self.data, dtype, math.prod(shape), begin).reshape(shape)
        if dtype.names:
            with within(f"{self.path}: {self.place}"):
                return Quantised(kind, array), size
        if kind == "BF16":
            with within(f"{self.path}: {self.place}"):
                array = array.view(needed("ml_dtypes").bfloat16)
        return array, size
