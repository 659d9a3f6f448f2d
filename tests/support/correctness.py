# SPDX-License-Identifier: Apache-2.0
"""When is a result right? By the definition to FlashAttention's rule, or to the bit."""

import inspect

import ml_dtypes
import numpy as np

import fastattn
from fastattn import _core, reference
from fastattn._options import AttentionOptions, Options, WeightOptions
from tests.support.problems import HALVES
from tests.support.remembering import remembering

EXTRA_ULPS = 4  # of the largest result: what rounding the result itself may cost


def without_dropout(options):
    """Return the options that decide the probabilities, before some are dropped."""
    dropout = AttentionOptions.__annotations__.keys() - WeightOptions.__annotations__.keys()
    return {name: x for name, x in options.items() if name not in dropout}


def of_dropout(options):
    """Return the options that decide which pairs are dropped."""
    names = inspect.signature(reference.dropout_mask).parameters
    return {name: x for name, x in options.items() if name in names}


@remembering
def truth_of(query, key, value, **options):
    """Return out and lse by definition, in more precision than the query has."""
    wide = np.longdouble if query.dtype == np.float64 else np.float64
    query, key, value = (np.asarray(x).astype(wide) for x in (query, key, value))
    out = reference.attention(query, key, value, compute_dtype=wide, **options)
    # Not reference.attention's lse, which has at most float64.
    lse = reference._softmax(query, key, np.dtype(wide), Options(**without_dropout(options)))[2]
    return out, np.broadcast_to(lse.reshape(lse.shape[lse.ndim - out.ndim + 1 :]), out.shape[:-1])


def in_pairs(query, key):
    """Tell whether the kernel in use multiplies pairs of bfloat16, as bfloat16."""
    bfloat16 = query.dtype == key.dtype == HALVES[1]
    return bfloat16 and _core.isa() == "avx512_bf16" and query.shape[-1] % 2 == 0


@remembering
def plain_of(query, key, value, pairs, **options):
    """Return out and lse of the plain formula, as a program in the query's precision computes it.

    Half precision is computed in float32, and the result rounded. Where the kernel multiplies
    pairs of bfloat16, the probabilities are rounded too.
    """
    arithmetic = np.promote_types(query.dtype, np.float32)
    plain = reference.attention(
        query, key, value, compute_dtype=arithmetic, return_lse=True, **options
    )
    if not pairs:
        return plain
    wide = [x.astype(np.float32) for x in (query, key)]
    probs = reference.attention_weights(*wide, compute_dtype=np.float32, **without_dropout(options))
    values = np.where(np.isfinite(value), value.astype(np.float32), 0)
    if values.ndim > 2:
        values = values.repeat(probs.shape[-3] // values.shape[-3], axis=-3)
    rounded = probs.astype(query.dtype).astype(np.float32)
    if options.get("dropout_p"):
        kept = reference.dropout_mask(query, key, **of_dropout(options))
        rounded = rounded * kept / (1 - options["dropout_p"])
    return (rounded @ values).astype(query.dtype), plain[1]


def assert_within_gate(actual, query, key, value, **options):
    """Assert that out, or out and lse, is right to FlashAttention's rule.

    The largest error is at most twice that of the plain formula in the same precision, beside what
    rounding the result costs. The plain formula's error counts as no less than what rounding a
    score once causes, or a probability, where these are: in a small problem it may escape that.
    What is not finite is the same.
    """
    pair, pairs = isinstance(actual, tuple), in_pairs(query, key)
    arithmetic = np.promote_types(query.dtype, np.float32)
    plain = plain_of(query, key, value, pairs, **options)
    truth = truth_of(query, key, value, **options)
    eps = np.finfo(arithmetic).eps
    score = np.abs(truth[1][np.isfinite(truth[1])]).max(initial=0)
    if pairs:
        score = max(score, ml_dtypes.finfo(query.dtype).eps / eps)
    for got, rough, expected, relative, dtype in zip(
        actual if pair else (actual,),
        plain,
        truth,
        (score, 1),
        (query.dtype, arithmetic),
        strict=False,
    ):
        assert got.shape == rough.shape
        assert got.dtype == dtype
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(got[~finite], expected[~finite].astype(got.dtype))
        got, rough = got[finite].astype(expected.dtype), rough[finite].astype(expected.dtype)
        expected = expected[finite]
        if got.size == 0:
            continue
        ulp = eps * max(np.abs(expected).max(), np.finfo(arithmetic).tiny)
        least = relative / 2 * ulp
        allowed = 2 * max(np.abs(rough - expected).max(), least) + EXTRA_ULPS * ulp
        assert np.abs(got - expected).max() <= allowed


def attend_within_gate(query, key, value, **options):
    """Call attention, assert that it is right, and return (out, lse)."""
    result = fastattn.attention(query, key, value, return_lse=True, **options)
    assert_within_gate(result, query, key, value, **options)
    return result


def assert_same_bits(actual, expected):
    """Assert that two arrays, or pairs of them, have the same bits; NaN equals NaN."""
    if isinstance(expected, tuple):
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)
        return
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))
