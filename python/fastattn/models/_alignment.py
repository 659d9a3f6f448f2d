# SPDX-License-Identifier: Apache-2.0
"""When is each word said? The heads that follow the sound say it, and the pauses.

Tokens and frames have one order, so the path through both along which the weights are largest is
the alignment: dynamic time warping of attention, as Whisper's, https://arxiv.org/abs/2212.04356. A
path leaves no frame out: a pause is divided among the words around it. The loudness tells where it
is, and that it belongs to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastattn.nn import Floats, Integers

MEDIAN = 7  # frames, of whose weights one becomes the median
MOMENT = 0.01  # seconds whose loudness is one number
LOUD, SOFT = 0.95, 0.05  # the shares of all moments that have less power than these two
QUIET = 1e-3  # of the power of a loud moment: where there is less, it is quiet;
ABOVE = 3  # or where there is less than so many times that of a soft one, as in noise
PAUSE = 0.1  # seconds at least: the closed lips of a p are no pause
REACH = 0.3  # seconds at most between a pause and the border of words that it stands for


def first_frames(weights: Floats, orders: int) -> Integers:
    """Return the frame with which each token begins.

    Parameters
    ----------
    weights : array of shape (heads, tokens, frames)
        How much each token looks at each frame.
    orders : int
        How many tokens there are at first that are not said.

    Returns
    -------
    ndarray of shape (tokens - orders,)
        Ascending, from 0 on.
    """
    # A frame that all tokens look at tells nothing, so its weights are compared with each other.
    deviation = np.maximum(weights.std(axis=1, keepdims=True), np.float32(1e-12))
    compared = (weights - weights.mean(axis=1, keepdims=True)) / deviation
    padded = np.pad(compared, [(0, 0), (0, 0), (MEDIAN // 2, MEDIAN // 2)], "reflect")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, MEDIAN, axis=2), axis=3)
    return _first_columns(-smooth[:, orders:].mean(axis=0, dtype=np.float64))


def _first_columns(costs: NDArray[np.float64]) -> Integers:
    """Return where each row begins on the cheapest path from the first cell to the last one.

    Its steps go to the next column, to the next row, or to both.
    """
    rows, columns = costs.shape
    entries = np.empty((rows, columns), np.int64)  # where the best path to a cell enters its row,
    slanted = np.empty((rows, columns), np.int64)  # and whether a step to both enters there
    above = np.full(columns + 1, np.inf)  # the cost of each path to the row above; of none before
    above[0] = 0
    for row, along in enumerate(costs.cumsum(axis=1)):
        slanted[row] = above[:-1] <= above[1:]
        entering = np.minimum(above[:-1], above[1:]) - along + costs[row]
        least = np.minimum.accumulate(entering)
        entries[row] = np.maximum.accumulate(np.where(entering == least, np.arange(columns), 0))
        above = np.concatenate([[np.inf], least + along])
    found, column = np.empty(rows, np.int64), columns - 1
    for row in reversed(range(rows)):
        found[row] = entries[row, column]
        column = found[row] - slanted[row, found[row]]
    return found


def without_pauses(
    borders: Sequence[float], samples: Floats, rate: int
) -> list[tuple[float, float]]:
    """Return when words begin and end, without the pauses between them.

    Parameters
    ----------
    borders : sequence of float
        When each word begins, in seconds, and when the last one ends.
    samples : array of shape (samples,)
        The sound, of which there are `rate` in a second.

    Returns
    -------
    list of (float, float)
    """
    # A pause is between the words whose border is nearest; of several the nearest one counts.
    times, ends = np.array(borders), [(REACH, x, x) for x in borders]
    for begin, end in _pauses(samples, rate):
        gaps = np.maximum(np.maximum(begin - times, times - end), 0)
        i = int(gaps.argmin())
        ends[i] = min(ends[i], (float(gaps[i]), begin, end))
    found, least = list[tuple[float, float]](), 0.0
    for (_, _, begin), (_, end, _) in pairwise(ends):
        begin = max(begin, least)
        least = max(begin, end)
        found.append((begin, least))
    return found


def _pauses(samples: Floats, rate: int) -> list[tuple[float, float]]:
    """Return when it is quiet."""
    size = round(rate * MOMENT)
    moments = samples[: len(samples) // size * size].reshape(-1, size)
    power = np.square(moments).mean(axis=1, dtype=np.float64)
    soft, loud = np.quantile(power, (SOFT, LOUD))
    is_quiet = power < max(ABOVE * soft, QUIET * loud)
    changes = np.flatnonzero(np.diff(is_quiet, prepend=False, append=False)) * MOMENT
    runs = zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True)
    return [x for x in runs if x[1] - x[0] >= PAUSE]
