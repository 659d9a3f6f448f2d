# SPDX-License-Identifier: Apache-2.0
"""Weights as ggml quantises them: kept as stored, and made float32 in whole or row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn._arguments import is_integer
from fastattn._arrays import as_numpy

BLOCK = 32  # columns that share a scale
BLOCKS: dict[str, np.dtype[Any]] = {
    "Q8_0": np.dtype([("scale", "<f2"), ("quants", "i1", BLOCK)]),
    "Q4_0": np.dtype([("scale", "<f2"), ("quants", "u1", BLOCK // 2)]),
    "Q4_1": np.dtype([("scale", "<f2"), ("min", "<f2"), ("quants", "u1", BLOCK // 2)]),
}


@dataclass(frozen=True, eq=False)
class Quantised:
    """A tensor of small integers with a scale for each 32 columns: Q8_0, Q4_0 or Q4_1.

    Its `blocks` are as in the file, an array of shape (..., columns / 32) with the fields `scale`,
    `quants` and, of Q4_1, `min`. Q4_0 and Q4_1 keep two columns in a byte: in its low bits one of
    the block's first half, in its high bits the same one of the second half.
    """

    kind: str
    blocks: NDArray[Any]

    def __post_init__(self) -> None:
        if self.kind not in BLOCKS:
            raise ValueError(f"kind must be {', '.join(BLOCKS)}, got {self.kind!r}")
        dtype = getattr(self.blocks, "dtype", type(self.blocks).__name__)
        if not isinstance(self.blocks, np.ndarray) or dtype != BLOCKS[self.kind]:
            raise TypeError(f"blocks must be an array of {BLOCKS[self.kind]}, not {dtype}")
        as_numpy("blocks", self.blocks)  # refuses what is more than its numbers
        if not self.blocks.ndim:
            raise ValueError("blocks must have shape (..., columns / 32), got ()")
        for field in BLOCKS[self.kind].names or ():
            if field != "quants" and not np.isfinite(numbers := self.blocks[field]).all():
                place = np.argwhere(~np.isfinite(numbers))[0].tolist()
                got = f"{numbers[tuple(place)]} in block {place}"
                raise ValueError(f"every {field} of a block must be finite, got {got}")

    @classmethod
    def from_bytes(cls, kind: str, data: Any, shape: tuple[int, ...]) -> Quantised:
        """Return the tensor whose blocks lie in a buffer, row after row; nothing is copied.

        Parameters
        ----------
        kind : "Q8_0", "Q4_0" or "Q4_1"
        data : bytes, or whatever has a buffer
        shape : tuple of int
            That of the tensor: (rows, columns), or more axes before these.

        Raises
        ------
        TypeError
            The shape is no tuple of int, or data has no buffer.
        ValueError
            The buffer is not contiguous or has more or fewer bytes than the shape needs, a row is
            not whole blocks, or a scale is not finite.
        """
        if kind not in BLOCKS:
            raise ValueError(f"kind must be {', '.join(BLOCKS)}, got {kind!r}")
        if not isinstance(shape, tuple | list) or not all(map(is_integer, shape)):
            raise TypeError(f"shape must be a tuple of int, got {shape!r}")
        if not shape or min(shape) < 0 or shape[-1] % BLOCK:
            rule = f"have rows of a multiple of {BLOCK} columns"
            raise ValueError(f"shape must {rule}, got {tuple(shape)}")
        try:
            view = memoryview(data)
        except TypeError:
            raise TypeError(f"data must have a buffer, not {type(data).__name__}") from None
        if not view.c_contiguous:
            raise ValueError(f"data must be contiguous, got strides {view.strides}")
        held, blocks = view.nbytes, (*shape[:-1], shape[-1] // BLOCK)
        if held != (needed := math.prod(blocks) * BLOCKS[kind].itemsize):
            raise ValueError(f"data must have the {needed} bytes of {shape} in {kind}, got {held}")
        return cls(kind, np.frombuffer(data, BLOCKS[kind]).reshape(blocks))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor: (rows, columns), or more axes before these."""
        return (*self.blocks.shape[:-1], self.blocks.shape[-1] * BLOCK)

    def dequantised(self) -> NDArray[np.float32]:
        """Return the numbers of the tensor, as ggml defines them."""
        return self._numbers(self.blocks)

    def rows(self, index: Any) -> NDArray[np.float32]:
        """Return the numbers of some rows; `index` is as NumPy takes it for the first axis."""
        *axes, columns = self.blocks.shape
        return self._numbers(self.blocks.reshape(math.prod(axes), columns)[index])

    def _numbers(self, blocks: NDArray[Any]) -> NDArray[np.float32]:
        """Return what blocks stand for. A scale times an integer is exact in float32."""
        numbers = np.empty((*blocks.shape, BLOCK), np.float32)
        if self.kind == "Q8_0":
            numbers[...] = blocks["quants"]
        else:
            numbers[..., : BLOCK // 2] = blocks["quants"] & 15
            numbers[..., BLOCK // 2 :] = blocks["quants"] >> 4
        if self.kind == "Q4_0":
            numbers -= 8
        numbers *= blocks["scale"].astype(np.float32)[..., None]
        if self.kind == "Q4_1":
            numbers += blocks["min"].astype(np.float32)[..., None]
        return numbers.reshape(*blocks.shape[:-1], blocks.shape[-1] * BLOCK)
