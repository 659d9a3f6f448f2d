# SPDX-License-Identifier: Apache-2.0
"""How is a token rounded to int8? As ``round(x / scale)``, with a scale for each token and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

LARGEST = 127  # int8 that a token's largest number becomes
SMALLEST_SCALE = np.finfo(np.float32).tiny  # below it, a quotient may exceed LARGEST


def scales_of(name: str, x: Array, counts: Array) -> Array:
    """Return what int8 of each token and head is multiplied by: 0 where all numbers are 0."""
    with np.errstate(all="ignore"):
        largest = np.maximum(x.max(axis=-1), -x.min(axis=-1)).astype(np.float32)
        scales = np.where(largest > 0, np.maximum(largest / LARGEST, SMALLEST_SCALE), 0)
    meant = np.arange(x.shape[2]) < counts[:, None]
    if not (np.isfinite(largest) | ~meant[:, None]).all():
        raise ValueError(f"{name} must be finite in an int8 cache, got NaN or Inf")
    return scales


class Quantised:
    """Keys or values that are rounded when they are read, so that no rounded copy of all exists."""

    def __init__(self, x: Array, scales: Array) -> None:
        self.x, self.scales = x, scales

    def __getitem__(self, index: Any) -> Array:
        """Return the tokens at the index: integers within -127..127, still as float32."""
        divisor = np.maximum(self.scales[index], SMALLEST_SCALE)  # 0 / 0 would be NaN
        quotients: Array = self.x[index].astype(np.float32) / divisor[..., None]
        return np.rint(quotients)
