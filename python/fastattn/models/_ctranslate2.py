# SPDX-License-Identifier: Apache-2.0
"""Which variables does a model.bin of CTranslate2 hold? Arrays over the file, which is mapped.

A file of version 6 is little-endian, and is: the kind of model; variables, each with its name,
axes, type and bytes; aliases, other names of the same variables. All that it says is checked
against its size before it is used, since a file may come from anywhere.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastattn.models._file import needed, shown, within

VERSION = 6
MOST_AXES = 8
TYPES = ("<f4", "i1", "<i2", "<i4", "<f2", "bfloat16")  # by their numbers


class Contents(NamedTuple):
    """What a file holds: the kind of model, numbers by their names, and arrays."""

    kind: str
    numbers: Mapping[str, int | float]
    arrays: Mapping[str, NDArray[Any]]


def read(path: str | os.PathLike[str]) -> Contents:
    """Return what a model.bin of version 6 holds.

    Parameters
    ----------
    path : path
        The file must not change while an array is in use.

    Returns
    -------
    Contents
        Variables without axes are numbers; the others are arrays, read-only and not always aligned.

    Raises
    ------
    ValueError
        The file is damaged, or of another version.
    ModuleNotFoundError
        A variable is bfloat16, and ml_dtypes is not installed.
    """
    with within(path), Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _Parser(
            mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        ).contents()


class _Parser:
    """Steps through a file; `place` is what it is at, for errors."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at, self.place = data, 0, "header"

    def refuse(self, rule: str, found: Any) -> NoReturn:
        raise ValueError(f"{self.place}: {rule}, got {shown.repr(found)}")

    def skip(self, size: int, what: str) -> int:
        """Step over so many bytes, which must be there; return where they begin."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            self.refuse(f"{what} must end within the {len(self.data)} bytes of the file", self.at)
        return begin

    def integer(self, size: int) -> int:
        begin = self.skip(size, "an integer")
        return int.from_bytes(self.data[begin : self.at], "little")

    def name(self) -> str:
        """Return a string, which has its length before it and a 0 as its last byte."""
        begin = self.skip(self.integer(2), "a name")
        found = self.data[begin : self.at]
        text = found[:-1].decode(errors="replace")
        if found[-1:] != b"\0" or not text or not text.isascii() or not text.isprintable():
            self.refuse("a name must be printable ASCII and a 0", found)
        return text

    def contents(self) -> Contents:
        """Return what the file holds."""
        if (version := self.integer(4)) != VERSION:
            self.refuse(f"the version must be {VERSION}", version)
        kind = self.name()
        self.integer(4)  # the revision of the kind
        variables: dict[str, NDArray[Any]] = {}
        for i in range(count := self.integer(4)):
            self.place = f"variable {i + 1} of {count}"
            name = self.name()
            self.place = f"variable {name!r}"
            if name in variables:
                self.refuse("its name must be no other's", name)
            variables[name] = self.variable()
        self.place = "aliases"
        for _ in range(self.integer(4)):
            alias, name = self.name(), self.name()
            if name not in variables or alias in variables:
                self.refuse("each must be a new name of a variable", (alias, name))
            variables[alias] = variables[name]
        if self.at != len(self.data):
            self.refuse(f"the file must end behind them, at {len(self.data)}", self.at)
        arrays = {name: x for name, x in variables.items() if x.ndim}
        numbers = {name: x.item() for name, x in variables.items() if not x.ndim}
        return Contents(kind, MappingProxyType(numbers), MappingProxyType(arrays))

    def variable(self) -> NDArray[Any]:
        """Return the array that is described, and stands, here."""
        if (axes := self.integer(1)) > MOST_AXES:
            self.refuse(f"it must have at most {MOST_AXES} axes", axes)
        shape = [self.integer(4) for _ in range(axes)]
        if 0 in shape:
            self.refuse("its axes must be at least 1 long", shape)
        if (kind := self.integer(1)) >= len(TYPES):
            self.refuse(f"its type must be below {len(TYPES)}", kind)
        if TYPES[kind] == "bfloat16":
            needed("ml_dtypes")  # which gives NumPy the dtype
        dtype = np.dtype(TYPES[kind])
        size = math.prod(shape) * dtype.itemsize
        if (found := self.integer(4)) != size:
            self.refuse(f"it must take {size} bytes as {dtype.name} of shape {shape}", found)
        begin = self.skip(size, "its bytes")
        return np.ndarray(shape, dtype, self.data, begin)
