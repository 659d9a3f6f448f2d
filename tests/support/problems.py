# SPDX-License-Identifier: Apache-2.0
"""What is attended to in tests: dtypes, and random operands."""

import ml_dtypes
import numpy as np

DTYPES = (np.float32, np.float64)
HALVES = (np.float16, ml_dtypes.bfloat16)


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
