# SPDX-License-Identifier: Apache-2.0
"""When a result is right: near the definition, or the very bits."""

import numpy as np

import fastattn
from tests.fuzz.definition import Formula, wide

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

EXTRA_ULPS = 4  # of the largest number: what rounding the result itself may cost
MOST_LONG = 1_000_000  # multiplications in long doubles, which no library does; beyond, in float64
UNDERFLOW = 2.0**20  # times the smallest normal number: what may be lost where all is tiny
ROUNDINGS = 8  # of every intermediate number, in any one element


def dtype_of(name):
    """Return the dtype of that name."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def finfo(dtype):
    """Return what NumPy or ml_dtypes says of a dtype."""
    return (ml_dtypes if dtype.name == "bfloat16" else np).finfo(dtype)


def arithmetic(dtype):
    """Return what a query of the dtype is computed in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def in_pairs(query, key):
    """Tell whether the kernel in use multiplies pairs of bfloat16, as bfloat16."""
    both = {query.dtype.name, key.dtype.name} == {"bfloat16"}
    return both and fastattn.info()["isa"] == "avx512_bf16" and query.shape[-1] % 2 == 0


def formulas(query, key, value, options, int8=False, **more):
    """Return the truth, and what a plain program makes of it in the kernel's own precision.

    int8: key and value are the numbers of a cache of int8. Where pairs are multiplied, each
    probability times its token's scale is rounded, a probability of 1 too.
    """
    dtype = arithmetic(query.dtype).type
    work = query.size * key.shape[-2] * (key.shape[-1] + value.shape[-1]) // max(query.shape[-1], 1)
    exact = np.longdouble if dtype == np.float64 and work <= MOST_LONG else np.float64
    pairs = in_pairs(query, query if int8 else key)
    probs_eps = float(finfo(query.dtype).eps) if pairs else 0.0
    truth = Formula(query, key, value, options, exact, bound_of=probs_eps, **more)
    with np.errstate(all="ignore"):
        return truth, Formula(query, key, value, options, dtype, probs_eps=probs_eps, **more)


def near(name, got, truth, bound, rough, eps, size=None):
    """Assert that a result is right, element by element and as the accuracy gate says.

    The gate is FlashAttention's: the largest error is at most twice that of the plain formula in
    the same precision, plus rounding. The plain formula's error counts as no less than what one
    rounding in each intermediate number causes: in a small problem it may escape that.
    """
    assert got.shape == truth.shape, f"{name} has shape {got.shape}, not {truth.shape}"
    if not got.size:
        return
    limits = finfo(got.dtype)
    got = wide(got, truth.dtype)
    gone = truth == -np.inf
    assert (got[gone] == -np.inf).all(), f"{name} is not -inf where it should be"
    half_ulp = float(limits.eps) / 2 * np.where(gone, 0, abs(truth) if size is None else size)
    half_ulp = half_ulp + float(limits.smallest_subnormal)
    least = np.finfo(np.float32 if eps == np.finfo(np.float32).eps else np.float64).tiny
    half_ulp = half_ulp + UNDERFLOW * least
    allowed = ROUNDINGS * eps * bound + 1.01 * half_ulp
    inside = ~gone & (abs(np.where(gone, 0, truth)) + allowed < float(limits.max))
    error = abs(np.where(inside, got, 0) - np.where(inside, truth, 0))
    if not (error <= allowed).all():  # NaN too
        at = np.unravel_index(np.argmax(np.where(error <= allowed, -1, error / allowed)), got.shape)
        raise AssertionError(
            f"{name}{[int(i) for i in at]} is {got[at]:.9g}, by definition {truth[at]:.9g}: "
            f"error {error[at]:.2g}, allowed {allowed[at]:.2g}"
        )
    if truth.dtype == np.float64 and eps == np.finfo(np.float64).eps:
        return  # the plain formula is as good as the truth: the bounds are all there is
    where = np.where(inside, 1, 0)
    rough_error = abs(np.where(inside, rough, 0) - np.where(inside, truth, 0))
    rough_error = np.where(np.isfinite(rough_error), rough_error, 0).max()
    most = 2 * max(rough_error, eps * (bound * where).max())
    most += (half_ulp * where).max() + EXTRA_ULPS * eps * abs(np.where(inside, truth, 0)).max()
    assert error.max() <= most, f"{name}: largest error {error.max():.2g}, gate {most:.2g}"


def same(name, got, expected):
    """Assert that arrays, or tuples of them, have the same bits; NaN equals NaN."""
    if isinstance(expected, tuple):
        assert len(got) == len(expected), f"{name}: {len(got)} results, not {len(expected)}"
        for g, e in zip(got, expected, strict=True):
            same(name, g, e)
        return
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, not {expected.shape}"
    assert got.dtype == expected.dtype, f"{name}: dtype {got.dtype}, not {expected.dtype}"
    if np.array_equal(bits(got), bits(expected)):
        return
    a, b = wide(got, np.float64), wide(expected, np.float64)
    alike = ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))
    if not alike.all():
        wrong = np.argwhere(~alike)
        at = tuple(wrong[0])
        raise AssertionError(
            f"{name}: {len(wrong)} of {alike.size} differ, first at {[int(i) for i in at]}: "
            f"{a[at]:.9g}, not {b[at]:.9g}"
        )


def bits(x):
    """Return the bytes of an array."""
    return np.ascontiguousarray(x).view(f"u{x.itemsize}") if x.size else np.zeros(0, np.uint8)
