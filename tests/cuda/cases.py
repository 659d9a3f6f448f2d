# SPDX-License-Identifier: Apache-2.0
"""What tests of tensor-core kernels share: problems, when a result is right, planted faults."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastattn import reference
from tests.support.problems import make_problem

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LSE_ULPS = 8  # of float32: what the approximations of exp2 and log2 may cost


def problem(q_len, kv_len, head_dim=64, dtype="float16", *, group=1, kv_heads=1, batch=1, seed=0):
    """Return random query, key and value; values of a mean that errors show in."""
    sizes = {"heads": group * kv_heads, "kv_heads": kv_heads, "batch": (batch,)}
    return make_problem(q_len, kv_len, head_dim, dtype=DTYPES[dtype], mean=0.5, seed=seed, **sizes)


def assert_right(out, lse, query, key, value, **options):
    """Assert FlashAttention's rule: at most twice the error of the plain formula, and a rounding.

    The plain formula in the same precision: float32, but probabilities and result are rounded.
    """
    wide = [x.astype(np.float64) for x in (query, key, value)]
    narrow = [x.astype(np.float32) for x in (query, key, value)]
    expected, expected_lse = reference.attention(*wide, return_lse=True, **options)
    float32 = {"compute_dtype": np.float32, **options}
    plain_lse = reference.attention(*narrow, return_lse=True, **float32)[1]
    probs = reference.attention_weights(*narrow[:2], **float32).astype(query.dtype)
    heads = query.shape[-3] // key.shape[-3] if query.ndim > 2 else 1
    values = narrow[2].repeat(heads, axis=-3) if query.ndim > 2 else narrow[2]
    plain = (probs.astype(np.float32) @ values).astype(query.dtype)

    rounding = float(ml_dtypes.finfo(query.dtype).eps) / 2 * np.abs(expected).max(initial=0)
    assert out.shape == expected.shape
    assert error(out, expected) <= 2 * error(plain, expected) + rounding
    seen = np.isfinite(expected_lse)
    np.testing.assert_array_equal(lse[~seen], expected_lse[~seen])
    ulp = np.finfo(np.float32).eps * max(1, np.abs(expected_lse[seen]).max(initial=0))
    plain_error = error(plain_lse[seen], expected_lse[seen])
    assert error(lse[seen], expected_lse[seen]) <= 2 * plain_error + LSE_ULPS * ulp


def error(x: Any, truth: Any) -> float:
    """Return the largest error; what is not finite is one."""
    off = np.abs(np.asarray(x).astype(np.float64) - truth)
    return float(np.where(np.isnan(off), np.inf, off).max(initial=0))


def spilled(ptx: str, architecture: str) -> int:
    """Return how many bytes of its registers a thread stores, or loads, in code for a GPU."""
    from fastattn.cuda import _build

    cubin, log = _build.assemble(ptx, architecture)
    if cubin is None:
        pytest.skip(log)
    report = _build.report(log)
    return max(report["spill_stores"], report["spill_loads"])


def with_fault(module: Any, old: str, new: str) -> Any:
    """Return a module in whose source a text is another one."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert old in source
    faulty = types.ModuleType(module.__name__ + "_with_a_fault")
    faulty.__file__ = module.__file__
    exec(compile(source.replace(old, new), module.__file__, "exec"), faulty.__dict__)
    return faulty
