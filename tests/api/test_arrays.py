# SPDX-License-Identifier: Apache-2.0
"""Every call answers in the kind of `query`; what is more than its numbers is refused."""

import array
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from fastattn import reference
from tests.api.arrays import (
    Exported,
    InNamespace,
    Unit,
    X,
    converted,
    dtype_of,
    numpy_of,
    options,
    problem,
    tensor,
)
from tests.support.correctness import assert_same_bits

# What is more than its numbers.


class Sub(np.ndarray):
    """Numbers, and nothing that NumPy would ask about."""


class Table:
    """Columns with names, which can be read as an array."""

    def __dataframe__(self):
        raise AssertionError

    def __array__(self, dtype=None, copy=None):
        return X


class Lazy:
    """Numbers that are still to be computed, by a library that overrides NumPy's functions."""

    def __array_function__(self, *given):
        raise AssertionError

    def __array__(self, dtype=None, copy=None):
        raise AssertionError


MORE = {
    "masked": np.ma.array(X, mask=X > 2),
    "matrix": X[0, 0].view(np.matrix),
    "unit": X.view(Unit),
    "table": Table(),
    "lazy": Lazy(),
    "in a list": [[X.view(Unit)[0, 0]] * 2],
    "masked number": [1.0, np.ma.masked],
}


@pytest.mark.promise("more-than-numbers-is-refused")
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("call", [fastattn.attention, reference.attention])
def test_what_is_more_than_its_numbers_is_refused(kind, call):
    x = MORE[kind]
    names = {"in a list": "Unit", "masked number": "MaskedConstant"}
    for name in ("query", "key", "value", "mask", "bias", "alibi_slopes", "sinks", "kv_lengths"):
        with pytest.raises(TypeError) as error:
            call(**{"query": X, "key": X, "value": X} | {name: x})
        assert str(error.value) == (
            f"{name} must be an array of numbers and nothing beside, not "
            f"{names.get(kind, type(x).__name__)}, whose mask, unit, labels or rules would be "
            f"lost: numpy.asarray({name}) is the numbers alone"
        )


class WithArray:
    __array_ufunc__ = None  # says who adds, not what is added

    def __array__(self, dtype=None, copy=None):
        return X


def test_what_is_its_numbers_is_read(tmp_path):
    expected = fastattn.attention(X, X, X)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    mapped[:] = X
    for x in (
        X.view(Sub),
        X.view(np.recarray),
        mapped,
        memoryview(X),
        SimpleNamespace(__array_interface__=X.__array_interface__),
        WithArray(),
        [[[array.array("f", row) for row in head] for head in X[0]]],
        [[Exported(head) for head in X[0]]],
    ):
        result = fastattn.attention(x, X, X)
        assert type(result) is np.ndarray
        assert_same_bits(result, expected)
        assert_same_bits(reference.attention(x, X, X), reference.attention(X, X, X))


# All of these, and every call.


@pytest.fixture(params=["torch", "jax", "namespace"])
def convert(request):
    """Return the function that makes arrays of one library."""
    if request.param == "namespace":
        return InNamespace
    module = pytest.importorskip(request.param, exc_type=ImportError)
    if request.param == "torch":
        return lambda x: tensor(module, x)
    return module.numpy.asarray


@pytest.mark.promise("answered-in-kind")
def test_the_result_is_of_the_kind_of_query(convert):
    query, key, value = problem()
    expected = fastattn.attention(query, key, value)
    assert_same_bits(fastattn.attention(query, convert(key), convert(value)), expected)
    result = fastattn.attention(convert(query), key, value)
    assert type(result) is type(convert(query))
    assert_same_bits(numpy_of(result), expected)


def test_out_is_of_the_kind_of_query(torch):
    query, key, value = problem()
    out = np.empty(query.shape, np.float32)
    with pytest.raises(TypeError, match=r"^out must be a tensor, as query is, not ndarray$"):
        fastattn.attention(tensor(torch, query), key, value, out=out)
    with pytest.raises(TypeError, match=r"^out must be a NumPy array, not Tensor$"):
        fastattn.attention(query, key, value, out=tensor(torch, out))


def test_varlen_attention(convert):
    query, key, value = (x[0].swapaxes(0, 1).copy() for x in problem(q_len=20, kv_len=20))
    starts = np.array([0, 5, 18], np.int32)
    given = {"is_causal": True, "kv_lengths": np.array([3, 9]), "return_lse": True}
    expected = fastattn.varlen_attention(query, key, value, starts, starts, **given)
    arrays = map(convert, (query, key, value, starts, starts))
    results = fastattn.varlen_attention(*arrays, **converted(convert, given))
    assert {type(x) for x in results} == {type(convert(query))}
    assert_same_bits(tuple(map(numpy_of, results)), expected)


def test_scaled_dot_product_attention(convert):
    query, key, value = problem()
    mask = options()["mask"]
    call = fastattn.scaled_dot_product_attention
    result = call(*map(convert, (query, key, value)), convert(mask), enable_gqa=True)
    assert type(result) is type(convert(query))
    assert_same_bits(numpy_of(result), call(query, key, value, mask, enable_gqa=True))
    result = call(convert(query), convert(key[:, :1]), convert(value[:, :1]), is_causal=True)
    assert_same_bits(numpy_of(result), call(query, key[:, :1], value[:, :1], is_causal=True))


def test_weights_statistics_merge_and_explain(convert):
    query, key, value = problem()
    weights = fastattn.attention_weights(
        convert(query), convert(key), **converted(convert, options())
    )
    assert_same_bits(numpy_of(weights), fastattn.attention_weights(query, key, **options()))
    asked = {"column_sums": True, "row_weights": np.ones((2, 1, 1)), "top": 3}
    asked |= {"blocks": (np.array([0, 2]), np.array([0, 9])), **options()}
    found = fastattn.attention_statistics(convert(query), convert(key), **converted(convert, asked))
    assert {type(x) for x in found} == {type(convert(query)), type(None)}
    expected = fastattn.attention_statistics(query, key, **asked)
    for x, y in zip(found, expected, strict=True):
        if y is not None:  # JAX has integers of 32 bits, unless it is told otherwise
            assert_same_bits(numpy_of(x), y.astype(numpy_of(x).dtype))
    parts = [
        fastattn.attention(query, key[:, :, s], value[:, :, s], return_lse=True)
        for s in (slice(20), slice(20, None))
    ]
    results = fastattn.merge(*(tuple(map(convert, part)) for part in parts))
    assert type(results[0]) is type(convert(query))
    assert_same_bits(tuple(map(numpy_of, results)), fastattn.merge(*parts))
    arrays = (query, key, value)
    assert fastattn.explain(*map(convert, arrays)) == fastattn.explain(*arrays)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_cache(convert, name):
    query, key, value = problem(name, q_len=3)
    caches = [fastattn.KVCache(2, 2, 16, dtype=dtype_of(name)) for _ in range(2)]
    caches[0].append(key, value)
    caches[1].append(convert(key), convert(value))
    expected = caches[0].attend(query, return_lse=True)
    results = caches[1].attend(convert(query), return_lse=True)
    assert {type(x) for x in results} == {type(convert(query))}
    assert_same_bits(tuple(map(numpy_of, results)), expected)


def test_empty_arrays(convert):
    query, key, value = problem(q_len=0)
    out, lse = fastattn.attention(*map(convert, (query, key, value)), return_lse=True)
    assert (tuple(numpy_of(out).shape), tuple(numpy_of(lse).shape)) == ((2, 4, 0, 16), (2, 4, 0))
    query, key, value = problem(kv_len=0)
    assert not numpy_of(fastattn.attention(*map(convert, (query, key, value)))).any()
