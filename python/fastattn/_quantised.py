# SPDX-License-Identifier: Apache-2.0
"""Weights as ggml quantises them: kept as stored, and made float32 in whole or row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor: (rows, columns), or more axes before these."""
        return (*self.blocks.shape[:-1], self.blocks.shape[-1] * BLOCK)

    def dequantised(self) -> NDArray[np.float32]:
        """Return the numbers of the tensor, as ggml defines them."""
        return self._numbers(self.blocks)

    def rows(self, index: Any) -> NDArray[np.float32]:
        """Return the numbers of some rows; `index` is as NumPy takes it for the first axis."""
        return self._numbers(self.blocks.reshape(-1, self.blocks.shape[-1])[index])

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
        with np.errstate(invalid="ignore"):  # A damaged scale may be NaN or infinite.
            numbers *= blocks["scale"].astype(np.float32)[..., None]
            if self.kind == "Q4_1":
                numbers += blocks["min"].astype(np.float32)[..., None]
        return numbers.reshape(*blocks.shape[:-1], -1)
