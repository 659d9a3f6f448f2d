#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The first call: attention of NumPy arrays, its error, and what the kernel does for it.

    pip install .
    python examples/first_call.py

Four query heads share a key head, and nothing is repeated for it.
"""

import numpy as np

import fastattn

BATCH, Q_HEADS, KV_HEADS, LENGTH, HEAD_DIM = 1, 8, 2, 1024, 64

rng = np.random.default_rng(0)
query = rng.standard_normal((BATCH, Q_HEADS, LENGTH, HEAD_DIM), np.float32)
key = rng.standard_normal((BATCH, KV_HEADS, LENGTH, HEAD_DIM), np.float32)
value = rng.standard_normal((BATCH, KV_HEADS, LENGTH, HEAD_DIM), np.float32)

out = fastattn.attention(query, key, value, is_causal=True)  # query i sees the keys 0..i
print(f"query {query.shape}, key and value {key.shape} -> {out.shape} {out.dtype}")

exact = fastattn.reference.attention(query, key, value, is_causal=True)  # plain NumPy, in float64
print(f"largest error against the definition: {abs(out - exact).max():.1e}\n")

print(fastattn.explain(query, key, value, is_causal=True))  # says it without computing
