# SPDX-License-Identifier: Apache-2.0
"""What a key does to a row: by its value's length, and by what the output is without it."""
# ruff: noqa: E501 - the table of errors has a line per error

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fastattn import attention_weights, reference
from fastattn.maps import removal_effect, value_weighted
from tests.support.correctness import assert_same_bits
from tests.support.problems import both_dtypes, make_problem

SHAPES = [
    {"heads": 1, "kv_heads": 1, "batch": ()},
    {"heads": 4, "kv_heads": 2, "batch": ()},
    {"heads": 6, "kv_heads": 1, "batch": (2, 3)},
]


def moved(query, key, value, **options):
    """Return how far each row's output moves if a key is masked, key by key."""
    out = reference.attention(query, key, value, **options)
    result = np.zeros((*out.shape[:-1], key.shape[-2]))
    for j in range(key.shape[-2]):
        mask = np.arange(key.shape[-2]) != j
        without = reference.attention(query, key, value, mask=mask, **options)
        result[..., j] = np.linalg.norm(without - out, axis=-1)
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True, "query_offset": -1}, {"sinks": "each"}, {"scale": 9.0}],
    ids=str,
)
def test_removal_is_what_masking_the_key_does(options, shape):
    query, key, value = make_problem(7, 9, 5, 3, **shape, mean=2.0, dtype=np.float64)
    if "sinks" in options:
        options = {"sinks": np.linspace(-1, 1, shape["heads"])}
    weights = attention_weights(query, key, **options)
    effect = removal_effect(weights, value)
    assert effect.shape == weights.shape
    assert_allclose(effect, moved(query, key, value, **options), rtol=1e-7, atol=1e-12)


def test_a_key_that_is_nearly_all():
    """The closed form loses nothing where a weight is near 1."""
    value = np.array([[1.0, 2.0], [3.0, 5.0]])
    for rest in (1e-3, 1e-7, 1e-12):
        # Without the first key the output is the second value, whatever its weight.
        effect = removal_effect([[1 - rest, rest]], value)
        assert_allclose(effect[0, 0], (1 - rest) * np.hypot(2, 3), rtol=1e-12)
    assert_allclose(removal_effect([[1.0, 0.0]], value), [[np.hypot(1, 2), 0]])


def test_a_row_that_sees_nothing():
    assert (removal_effect(np.zeros((2, 3)), np.ones((3, 4))) == 0).all()
    assert (value_weighted(np.zeros((2, 3)), np.ones((3, 4))) == 0).all()


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_value_weighted(shape, dtype):
    query, key, value = make_problem(7, 9, 5, 3, **shape, dtype=dtype)
    weights = attention_weights(query, key)
    lengths = np.sqrt((value.astype(np.float64) ** 2).sum(axis=-1))
    lengths = lengths.repeat(shape["heads"] // shape["kv_heads"], axis=-2)
    found = value_weighted(weights, value)
    assert found.dtype == dtype
    assert_allclose(found, weights * lengths[..., None, :], rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize("call", [value_weighted, removal_effect])
def test_kinds_of_arrays(call, torch):
    query, key, value = make_problem(7, 9, 5, 3, heads=2, dtype=np.float32)
    weights = attention_weights(query, key)
    expected = call(weights, value)
    assert expected.dtype == np.float32
    assert_same_bits(call(torch.tensor(weights), torch.tensor(value)), expected)
    swapped = weights.astype(">f4"), value[::-1].copy()[::-1]
    assert_same_bits(call(*swapped), expected)
    for half in (np.float16, ml_dtypes.bfloat16):
        found = call(weights.astype(half), value)
        assert found.dtype == np.float32
        assert_allclose(found, expected, rtol=0.05, atol=0.02)
    assert_same_bits(call(weights[0], value[0]), expected[0])
    assert_same_bits(call(weights, value[0]), call(weights, value[:1]))
    layers = np.stack([weights, weights]), np.stack([value, value])
    assert_same_bits(call(*layers), np.stack([expected, expected]))
    assert_same_bits(call(layers[0], value), np.stack([expected, expected]))
    assert call(np.zeros((2, 0, 3)), np.zeros((2, 3, 4))).shape == (2, 0, 3)
    assert call(np.zeros((2, 3, 0)), np.zeros((2, 0, 4))).shape == (2, 3, 0)


P, V = np.full((4, 5, 6), 0.1), np.ones((2, 6, 3))
FLOATS = "an array of float16, bfloat16, float32 or float64"
FIT = (
    "value must have shape (..., kv_heads, kv_len, value_head_dim), with the kv_len of weights, "
    "kv_heads a divisor of their heads, and what is before to broadcast, got weights.shape={} and "
    "value.shape={}"
)
ERRORS = [
    (P.astype(int), V, TypeError, f"weights must be {FLOATS}, not int64"),
    ("words", V, TypeError, f"weights must be {FLOATS}, not str"),
    (P, None, TypeError, f"value must be {FLOATS}, not NoneType"),
    (P[0, 0], V, ValueError, "weights must have shape (..., heads, q_len, kv_len), got weights.shape=(6,)"),
    (P, V[0, 0], ValueError, "value must have shape (..., kv_heads, kv_len, value_head_dim), got value.shape=(3,)"),
    (P, V[:, :5], ValueError, FIT.format((4, 5, 6), (2, 5, 3))),
    (P[:3], V, ValueError, FIT.format((3, 5, 6), (2, 6, 3))),
    (P, V[:0], ValueError, FIT.format((4, 5, 6), (0, 6, 3))),
    (P, V[None], ValueError, FIT.format((4, 5, 6), (1, 2, 6, 3))),
    (np.stack([P] * 3), np.stack([V] * 2), ValueError, FIT.format((3, 4, 5, 6), (2, 2, 6, 3))),
    (-P, V, ValueError, "weights must be at least 0, got -0.1"),
    (P * np.nan, V, ValueError, "weights must be at least 0, got nan"),
    (P * np.inf, V, ValueError, "weights must add up to at most 1 in each row, got inf"),
    (np.full((4, 5, 6), 0.5), V, ValueError, "weights must add up to at most 1 in each row, got 3.0"),
    (P, V * np.nan, ValueError, "value must be finite, got nan"),
    (P, V * -np.inf, ValueError, "value must be finite, got -inf"),
]  # fmt: skip


@pytest.mark.parametrize("call", [value_weighted, removal_effect])
@pytest.mark.parametrize(("weights", "value", "error", "message"), ERRORS)
def test_errors(weights, value, error, message, call):
    with pytest.raises(error) as raised:
        call(weights, value)
    assert type(raised.value) is error
    assert str(raised.value) == message
