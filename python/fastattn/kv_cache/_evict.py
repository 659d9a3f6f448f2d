# SPDX-License-Identifier: Apache-2.0
"""Which tokens does an eviction leave, and at which positions? Both without moving any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]


class Left(NamedTuple):
    """What is left of rows, as `PagePool` says it."""

    begins: Numbers
    lengths: Numbers
    parts: NDArray[Any]


def evicted(before: Left, keep: Numbers, keep_first: Numbers, renumber: bool) -> Left:
    """Return what is left: the tokens before position keep_first, and the newest `keep`.

    Slots stay; a renumbered part is one with other positions and another shift. Where keep is more
    than the newest part has, the first one's last tokens are among the newest too.
    """
    begins, lengths, parts = before
    shift, first_begins, first_ends, first_shift = parts.T
    apart = first_begins < first_ends
    left = np.maximum(begins, lengths - keep)
    starts = np.where(apart, first_begins, begins)
    ends = np.where(apart, first_ends, left)
    first_shift = np.where(apart, first_shift, shift)
    newest = ends - np.where(apart, np.clip(keep - (lengths - begins), 0, ends - starts), 0)
    wrong = (starts < keep_first) & (keep_first < newest) & (newest < ends)
    wrong |= apart & (begins < keep_first) & (keep_first < left)
    for i in np.flatnonzero(wrong)[:1]:
        raise ValueError(
            "keep and keep_first must leave two parts of a sequence at most, "
            f"got keep={keep[i]}, keep_first={keep_first[i]} where there are the tokens "
            f"{starts[i]}..{ends[i] - 1} and {begins[i]}..{lengths[i] - 1}"
        )
    every = keep_first >= left
    left = np.where(every, begins, left)
    ends = np.where(newest < ends, ends, np.clip(keep_first, starts, ends))
    starts = np.where(keep_first > starts, starts, newest)
    ends = np.where(every & ~apart, starts, np.maximum(starts, ends))

    if renumber:
        kept = ends - starts
        shift, first_shift = shift + left - kept, first_shift + starts
        lengths, left = lengths - left + kept, kept
        starts, ends = np.zeros_like(starts), kept
    first = np.stack([starts, ends, first_shift], axis=-1)
    first[starts == ends] = 0
    return Left(left, lengths, np.column_stack([shift, first]))
