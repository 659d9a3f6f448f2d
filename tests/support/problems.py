# SPDX-License-Identifier: Apache-2.0
"""What is attended to in tests: dtypes, and random operands."""

import ml_dtypes
import numpy as np
import pytest

DTYPES = (np.float32, np.float64)
HALVES = (np.float16, ml_dtypes.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.__name__)
every_dtype = pytest.mark.parametrize("dtype", [*DTYPES, *HALVES], ids=lambda dtype: dtype.__name__)


def make_problem(
    q_len,
    kv_len,
    head_dim=16,
    value_head_dim=None,
    *,
    heads=1,
    kv_heads=None,
    batch=(),
    dtype=np.float32,
    mean=0.0,
    seed=0,
):
    """Return random query, key and value; the values have that mean."""
    rng = np.random.default_rng(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    return (
        rng.standard_normal((*batch, heads, q_len, head_dim)).astype(dtype),
        rng.standard_normal((*batch, kv_heads, kv_len, head_dim)).astype(dtype),
        (rng.standard_normal((*batch, kv_heads, kv_len, value_head_dim)) + mean).astype(dtype),
    )


def covering_cases(levels):
    """Return cases in which each level of a factor meets each level of every other factor."""
    names = list(levels)
    open_pairs = {
        (a, i, b, j)
        for a, first in enumerate(names)
        for b in range(a + 1, len(names))
        for i in range(len(levels[first]))
        for j in range(len(levels[names[b]]))
    }
    rng = np.random.default_rng(0)
    cases = []
    while open_pairs:
        a, i, b, j = min(open_pairs)
        case = {a: i, b: j}
        for factor in rng.permutation(len(names)):
            if factor in case:
                continue
            gains = [
                sum(
                    ((c, k, factor, level) if c < factor else (factor, level, c, k)) in open_pairs
                    for c, k in case.items()
                )
                for level in range(len(levels[names[factor]]))
            ]
            best = np.flatnonzero(np.array(gains) == max(gains))
            case[int(factor)] = int(rng.choice(best))
        open_pairs -= {(c, k, d, m) for c, k in case.items() for d, m in case.items() if c < d}
        cases.append({name: levels[name][case[c]] for c, name in enumerate(names)})
    return cases
