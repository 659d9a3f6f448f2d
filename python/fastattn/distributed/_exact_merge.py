# SPDX-License-Identifier: Apache-2.0
"""A merge whose result does not depend on the order: sums of integers.

A part (out, lse) counts exp(lse) times: its numerators are out * exp(lse), its denominator is
exp(lse). Both are written as digits of 24 bits on a grid of absolute powers of 2, one grid for a
row's numerators and one for its denominator, and the highest three digits are kept. They are
integers, and adding them has no order. A digit that is too low beside some part is dropped,
whenever that part is met.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Integers = NDArray[np.int64]

BITS, DIGITS = 24, 3
NOTHING = -(2**40)  # the highest digit of a row that has seen no key


class _Numbers(NamedTuple):
    """Views of the numbers of each row that share a grid."""

    top: Integers  # of shape (rows,): all are below 2 ** (BITS * top)
    digits: Integers  # of shape (rows, DIGITS, numbers), the highest first


def empty(rows: int, columns: int) -> Integers:
    """Return the state of rows that have seen no key, of so many columns of out.

    Column 0 counts the parts of a row that were not finite. Behind it are the highest digit and the
    digits of the denominator, and then those of the numerators.
    """
    state = np.zeros((rows, 1 + 1 + DIGITS + 1 + DIGITS * columns), np.int64)
    for numbers in _numbers(state):
        numbers.top[...] = NOTHING
    return state


def of_part(out: Array, lse: Array) -> Integers:
    """Return the state of a part: out of shape (rows, columns), lse of shape (rows,)."""
    state = empty(*out.shape)
    finite = np.isfinite(lse) & np.isfinite(out).all(axis=-1)
    state[:, 0] = ~finite & (lse != -np.inf)
    logarithm = np.where(finite, lse, 0).astype(np.float64) / np.log(2)
    power = np.floor(logarithm)
    weight = np.exp2(logarithm - power)[:, None]  # times 2**power
    for numbers, x in zip(_numbers(state), (np.ones((len(out), 1)), out), strict=True):
        rest = np.where(finite[:, None], x, 0) * weight
        _, bits = np.frexp(np.abs(rest).max(axis=-1, initial=0))
        top = -(-(power.astype(np.int64) + bits) // BITS)
        numbers.top[finite] = top[finite]
        for digit in range(DIGITS):
            unit = (BITS * (top - digit - 1) - power).astype(np.int64)[:, None]
            whole = np.rint(np.ldexp(rest, -unit))
            rest -= np.ldexp(whole, unit)
            numbers.digits[finite, digit] = whole[finite]
    return state


def added(a: Integers, b: Integers) -> Integers:
    """Return the state of two disjoint sets of parts together."""
    total = np.zeros_like(a)
    total[:, 0] = a[:, 0] + b[:, 0]
    for both, *each in zip(_numbers(total), _numbers(a), _numbers(b), strict=True):
        both.top[...] = np.maximum(each[0].top, each[1].top)
        for numbers in each:
            shift = both.top - numbers.top
            for lower in range(DIGITS):
                rows = shift == lower
                if rows.any():
                    both.digits[rows, lower:] += numbers.digits[rows, : DIGITS - lower]
    return total


def result(state: Integers) -> tuple[Array, Array]:
    """Return out and lse in float64; NaN in a row of which a part was not finite."""
    sums = []
    for numbers in _numbers(state):
        total = np.zeros(numbers.digits.shape[::2])
        for digit in range(DIGITS - 1, -1, -1):
            total += np.ldexp(numbers.digits[:, digit].astype(np.float64), -BITS * digit)
        sums.append(total)
    (denominator, numerators), (below, above) = sums, (x.top for x in _numbers(state))
    unseen = denominator[:, 0] == 0
    with np.errstate(all="ignore"):
        shift = np.where(unseen, 0, BITS * (above - below))[:, None]
        out = np.where(unseen[:, None], 0, np.ldexp(numerators / denominator, shift))
        lse = np.log(denominator[:, 0]) + BITS * (below - 1) * np.log(2)
    lse[unseen] = -np.inf
    broken = state[:, 0] > 0
    out[broken], lse[broken] = np.nan, np.nan
    return out, lse


def _numbers(state: Integers) -> tuple[_Numbers, _Numbers]:
    """Return views of the denominators and of the numerators."""
    of_numerators = 2 + DIGITS
    columns = (state.shape[1] - of_numerators - 1) // DIGITS
    return (
        _Numbers(state[:, 1], state[:, 2:of_numerators].reshape(len(state), DIGITS, 1)),
        _Numbers(
            state[:, of_numerators],
            state[:, of_numerators + 1 :].reshape(len(state), DIGITS, columns),
        ),
    )
