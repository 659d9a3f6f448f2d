# SPDX-License-Identifier: Apache-2.0
"""Rollout, both ways, is the product of the layers' matrices, which it never makes."""
# ruff: noqa: E501 - the table of errors has a line per error

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fastattn import attention_weights, reference
from fastattn.maps import rollout
from tests.support.child import run
from tests.support.correctness import assert_same_bits
from tests.support.problems import both_dtypes, every_half, make_problem


def layers_of(count, tokens, *, heads=4, kv_heads=2, dtype=np.float64):
    """Return the queries and keys of layers."""
    problems = (
        make_problem(tokens, tokens, 8, heads=heads, kv_heads=kv_heads, dtype=dtype, seed=i)
        for i in range(count)
    )
    return [problem[:2] for problem in problems]


def by_matrices(layers, **options):
    """Return Abnar and Zuidema's rollout: what each token on top consists of."""
    tokens = layers[0][0].shape[1]
    whole = np.eye(tokens)
    for query, key in layers:
        exact = np.float64(query), np.float64(key)
        mean = reference.attention_weights(*exact, **options).mean(axis=0)
        whole = (0.5 * mean + 0.5 * np.eye(tokens)) @ whole
    return whole


OPTIONS = [
    {"is_causal": False},
    {"is_causal": True},
    {"is_causal": True, "window": (3, None), "softcap": 2.0, "sinks": np.zeros(4)},
    {"is_causal": False, "alibi_slopes": np.ones(4), "kv_lengths": 9, "scale": 1.0},
    {"is_causal": False, "mask": np.tri(17, 17, 2, dtype=bool), "bias": np.ones((4, 17, 1))},
]


@both_dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_both_ways_are_the_product_of_matrices(count, options, dtype):
    layers = layers_of(count, 17, dtype=dtype)
    expected = by_matrices(layers, **options)
    everything = range(-17, 0)
    tolerance = 10 * np.finfo(dtype).eps
    backward = rollout(layers, tokens=everything, **options)
    assert_allclose(backward, expected, atol=tolerance)
    forward = rollout(layers, tokens=everything, direction="forward", **options)
    assert_allclose(forward, expected.T, atol=tolerance)
    assert backward.dtype == forward.dtype == dtype
    if "sinks" not in options:
        assert_allclose(backward.sum(axis=1), 1, atol=tolerance)


@every_half
def test_half_precision(dtype):
    layers = layers_of(3, 17, dtype=dtype)
    expected = by_matrices(layers, is_causal=True)
    for direction, truth in (("backward", expected[-1]), ("forward", expected[:, 0])):
        shares = rollout(layers, direction=direction, is_causal=True)
        assert shares.dtype == np.float32
        assert_allclose(shares, truth, atol=2e-6)
    beside = [(query.astype(np.float32), key) for query, key in layers]
    assert_same_bits(rollout(beside, is_causal=True), rollout(layers, is_causal=True))


def test_which_tokens():
    layers = layers_of(2, 9)
    every = rollout(layers, tokens=range(9), is_causal=True)
    assert_same_bits(rollout(layers, is_causal=True), every[8])
    assert_same_bits(rollout(layers, tokens=np.int64(-2), is_causal=True), every[7])
    assert_same_bits(rollout(layers, tokens=(4, 0, 4), is_causal=True), every[[4, 0, 4]])
    assert rollout(layers, tokens=[5], is_causal=True).shape == (1, 9)
    assert rollout(layers, tokens=np.zeros(0, int), is_causal=True).shape == (0, 9)
    forward = rollout(layers, tokens=[0, 3], direction="forward", is_causal=True)
    assert_same_bits(rollout(layers, direction="forward", is_causal=True), forward[0])
    assert (forward[1, :3] == 0).all()  # no token looks ahead


def test_a_row_that_sees_nothing_keeps_its_own_half():
    layers = layers_of(3, 5)
    mask = np.ones((5, 5), bool)
    mask[2] = False
    assert_allclose(rollout(layers, tokens=2, is_causal=False, mask=mask), np.eye(5)[2] / 8)


def test_a_capture():
    query, key, _ = make_problem(12, 12, 8, heads=3, batch=(4,))
    pairs = list(zip(query, key, strict=True))
    given = [{"is_causal": True}] * 4
    upside_down = SimpleNamespace(
        query=query[::-1], key=key[::-1], layers=np.arange(4)[::-1], options=given
    )
    assert_same_bits(rollout(upside_down), rollout(pairs, is_causal=True))

    given = [{"is_causal": True, "scale": 0.1 * n, "window": (n, None)} for n in range(4)]
    captured = SimpleNamespace(query=query, key=key, layers=np.arange(4), options=given)
    expected = np.eye(12)
    for q, k, options in zip(query, key, given, strict=True):
        weights = attention_weights(q.astype(float), k.astype(float), **options)
        expected = (weights.mean(axis=0) + np.eye(12)) / 2 @ expected
    assert_allclose(rollout(captured), expected[-1], atol=1e-6)
    with pytest.raises(ValueError, match="window must not be given with a capture"):
        rollout(captured, window=(3, 0))


def test_an_iterator():
    query, key, _ = make_problem(12, 12, 8, heads=3, batch=(4,))
    pairs = list(zip(query, key, strict=True))
    assert_same_bits(rollout(iter(pairs), is_causal=True), rollout(pairs, is_causal=True))


def peak_of_long_layers():
    """Return how many bytes 32,768 tokens take beside the layers: less than 1 % of the pairs."""
    import resource

    layers = layers_of(2, 32768, heads=1, kv_heads=1, dtype=np.float32)
    rollout([(query[:, :64], key[:, :64]) for query, key in layers], is_causal=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for direction in ("backward", "forward"):
        rollout(layers, direction=direction, window=(500, None), is_causal=True)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.promise("no-array-of-pairs")
def test_memory_is_linear():
    assert run(peak_of_long_layers) < 32 * 2**20


X = np.zeros((4, 6, 8), np.float32)
RULE = 'layers must be pairs (query, key), or a capture with what=("query", "key")'
FLOATS = "an array of float16, bfloat16, float32 or float64"
ERRORS = [
    (dict(is_causal=None), ValueError, "is_causal must be given: True for a decoder, False for an encoder"),
    (dict(layers=3), TypeError, f"{RULE}, not int"),
    (dict(layers=None), TypeError, f"{RULE}, not NoneType"),
    (dict(layers=[]), ValueError, f"{RULE}, got none"),
    (dict(layers=[(X, X), 5]), TypeError, f"{RULE}, not list"),
    (dict(layers=[(X, X, X)]), ValueError, f"{RULE}, got 3 arrays in layer 0"),
    (dict(layers=X), ValueError, f"{RULE}, got 6 arrays in layer 0"),
    (dict(layers=SimpleNamespace(query=None, key=None)), ValueError, f"{RULE}, got a capture without query"),
    (dict(layers=SimpleNamespace(query=[X], key=None)), ValueError, f"{RULE}, got a capture without key"),
    (dict(layers=[("words", X)]), TypeError, f"query of layer 0 must be {FLOATS}, not str"),
    (dict(layers=[(X, X), (X, X.astype(int))]), TypeError, f"key of layer 1 must be {FLOATS}, not int64"),
    (dict(layers=[(X[0], X[0])]), ValueError, "query of layer 0 must have shape (heads, tokens, head_dim), without 0, got (6, 8)"),
    (dict(layers=[(X[:, :0], X)]), ValueError, "query of layer 0 must have shape (heads, tokens, head_dim), without 0, got (4, 0, 8)"),
    (dict(layers=[(X, X[:, 1:])]), ValueError, "key of layer 0 must have shape (kv_heads, 6, 8), like its query, with kv_heads a divisor of 4, got (4, 5, 8)"),
    (dict(layers=[(X, X[:3])]), ValueError, "key of layer 0 must have shape (kv_heads, 6, 8), like its query, with kv_heads a divisor of 4, got (3, 6, 8)"),
    (dict(layers=[(X, X), (X[:, 2:], X[:, 2:])]), ValueError, "layers must have equally many tokens, got 6 in layer 0 and 4 in layer 1"),
    (dict(direction="up"), ValueError, 'direction must be "backward" or "forward", got \'up\''),
    (dict(direction=None), ValueError, 'direction must be "backward" or "forward", got None'),
    (dict(tokens=6), ValueError, "tokens must be within -6..5, got 6"),
    (dict(tokens=[0, -7]), ValueError, "tokens must be within -6..5, got -7"),
    (dict(tokens=2**70), TypeError, None),
    (dict(tokens=1.0), TypeError, "tokens must be integers, or an int, not float64"),
    (dict(tokens=[True]), TypeError, "tokens must be integers, or an int, not bool"),
    (dict(tokens="he"), TypeError, "tokens must be an array of integers, or an int, not str"),
    (dict(tokens=[[0]]), ValueError, "tokens must be an int or have one axis, got tokens.shape=(1, 1)"),
    (dict(softcap=0.0), ValueError, "softcap must be > 0 (None: off), got softcap=0.0"),
    (dict(dropout_p=0.1), TypeError, "rollout() got an unexpected keyword argument 'dropout_p'"),
]  # fmt: skip


@pytest.mark.parametrize("direction", ["backward", "forward"])
@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message, direction):
    given = {"layers": [(X, X)], "is_causal": True, "direction": direction} | arguments
    with pytest.raises(error) as raised:
        rollout(given.pop("layers"), **given)
    assert type(raised.value) is error
    if message is not None:
        assert str(raised.value) == message


def test_bfloat16_by_its_bits():
    layers = layers_of(1, 6, dtype=ml_dtypes.bfloat16)
    assert rollout(layers, is_causal=True).sum() == pytest.approx(1, abs=1e-6)
