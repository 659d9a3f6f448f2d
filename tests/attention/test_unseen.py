# SPDX-License-Identifier: Apache-2.0
"""What is not seen changes no bit; what is seen propagates, NaN and Inf too."""

import numpy as np
import pytest

from tests.attention.problems import INF, every_arithmetic, with_lse
from tests.support.correctness import assert_same_bits, assert_within_gate
from tests.support.problems import both_dtypes, make_problem

pytestmark = pytest.mark.usefixtures("isa")


POISON = (np.nan, INF, -INF)


@pytest.mark.promise("masked-pair-contributes-nothing")
@every_arithmetic
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("q_len", [1, 50])
def test_poison_of_keys_that_no_row_sees(q_len, poison, dtype):
    rng = np.random.default_rng(2)
    operands = make_problem(q_len, 300, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
    mask = rng.random(300) < 0.5
    mask[128:256] = False
    for options, hidden in [
        ({"mask": mask}, ~mask),
        ({"mask": np.where(mask, 0, -INF)}, ~mask),
        ({"bias": np.where(mask, 0.5, -INF).astype(np.float16)}, ~mask),
        ({"kv_lengths": 131}, np.arange(300) >= 131),
        ({"is_causal": True, "query_offset": 17}, np.arange(300) > q_len + 16),
        ({"window": (9, 4), "query_offset": 100}, np.abs(np.arange(300) - 100 - q_len / 2) > 100),
        ({"mask": mask, "softcap": 3.0, "alibi_slopes": np.ones(4), "query_offset": 0}, ~mask),
    ]:
        expected = with_lse(*operands, **options)
        for which in ((1,), (2,), (1, 2)):
            poisoned = [x.copy() for x in operands]
            for i in which:
                poisoned[i][..., hidden, :] = poison
            assert_same_bits(with_lse(*poisoned, **options), expected)


@pytest.mark.promise(
    "masked-pair-contributes-nothing", "visible-nan-reaches-its-rows", "visible-inf-is-not-hidden"
)
@every_arithmetic
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("kv_len", [30, 300, 8400])
def test_poison_that_some_rows_see(kv_len, poison, dtype):
    """A key or value that is not finite reaches the rows that see it and no others."""
    query, key, value = make_problem(60, kv_len, 8, 20, heads=4, kv_heads=2, dtype=dtype)
    rng = np.random.default_rng(3)
    mask = rng.random((4, 60, kv_len)) < 0.5
    distance = np.arange(kv_len) - np.arange(60)[:, None]
    for bad in (5, kv_len - 2):
        for options, seen in [
            ({"mask": mask}, mask[..., bad]),
            ({"bias": np.where(mask, rng.normal(size=mask.shape), -INF)}, mask[..., bad]),
            ({"is_causal": True, "query_offset": bad - 30}, np.arange(60) >= 30),
            ({"window": (7, 2), "query_offset": bad - 30}, np.abs(np.arange(60) - 32.5) < 5),
            ({"window": (7, 2), "mask": mask, "query_offset": bad - 30, "softcap": 2.0}, None),
        ]:
            if seen is None:
                seen = mask[..., bad] & (np.abs(distance[:, 0] + 32.5) < 5)
            seen = np.broadcast_to(seen, (4, 60))
            expected = with_lse(query, key, value, **options)
            poisoned = value.copy()
            poisoned[:, bad, 13] = poison
            out, lse = with_lse(query, key, poisoned, **options)
            assert_same_bits(lse, expected[1])
            assert_same_bits(out[~seen], expected[0][~seen])
            others = np.arange(20) != 13
            assert_same_bits(out[..., others], expected[0][..., others])
            assert not np.isfinite(out[seen][:, 13]).any()
            if np.isnan(poison):
                assert np.isnan(out[seen][:, 13]).all()
            poisoned = key.copy()
            poisoned[:, bad, 3] = poison
            out, lse = with_lse(query, poisoned, value, **options)
            assert_same_bits((out[~seen], lse[~seen]), (expected[0][~seen], expected[1][~seen]))
            if np.isnan(poison):
                assert np.isnan(out[seen]).all()
                assert np.isnan(lse[seen]).all()


@pytest.mark.promise("minus-inf-score-is-unseen", "visible-inf-is-not-hidden")
@both_dtypes
def test_infinite_key(dtype):
    """A score of +inf makes the row NaN; one of -inf is a probability of 0, as by definition."""
    query, key, value = make_problem(30, 300, dtype=dtype)
    key[:, 7, 2] = INF
    up = query[0, :, 2] > 0
    for mask in (np.ones((30, 300), bool), np.tri(30, 300, 100, dtype=bool)):
        out, lse = with_lse(query, key, value, mask=mask)
        assert np.isnan(out[0, up]).all()
        assert not np.isfinite(lse[0, up]).any()
        finite = out[:, ~up], lse[:, ~up]
        assert_within_gate(finite, query[:, ~up], key, value, mask=mask[~up])


@pytest.mark.promise("minus-inf-score-is-unseen")
@every_arithmetic
@pytest.mark.parametrize("q_len", [1, 20])
def test_keys_whose_score_is_minus_infinity(q_len, dtype):
    """If they are all that a row sees, it sees none; beside others they change no bit."""
    query = np.ones((1, q_len, 2), dtype)
    key = np.full((1, 150, 2), -INF).astype(dtype)
    value = make_problem(1, 150, 2, 4, dtype=dtype)[2]
    for options in ({}, {"mask": np.arange(150) > 7}, {"sinks": np.zeros(1)}):
        out, lse = with_lse(query, key, value, **options)
        assert_same_bits(out, np.zeros_like(out))
        assert_same_bits(lse, np.full_like(lse, -INF))
    seen = np.arange(150) % 3 > 0
    key[:, seen] = 0.5
    assert_same_bits(with_lse(query, key, value), with_lse(query, key, value, mask=seen))


@pytest.mark.promise("visible-nan-reaches-its-rows", "empty-row-is-zero")
@every_arithmetic
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1)])
def test_poisoned_query(heads, poison, dtype):
    """It reaches its row alone."""
    query, key, value = make_problem(60, 140, heads=heads[0], kv_heads=heads[1], dtype=dtype)
    mask = np.ones((60, 140), bool)
    mask[11] = False
    for options in ({}, {"mask": mask}, {"is_causal": True, "query_offset": 80}):
        expected = with_lse(query, key, value, **options)
        bad = query.copy()
        bad[0, 7, 3] = poison
        out, lse = with_lse(bad, key, value, **options)
        assert np.isnan(out[0, 7]).all()
        assert not np.isfinite(lse[0, 7])
        clean = np.ones(lse.shape, bool)
        clean[0, 7] = False
        assert_same_bits((out[clean], lse[clean]), (expected[0][clean], expected[1][clean]))
        blind = query.copy()
        blind[0, 11] = poison
        if "mask" in options:  # a row that sees nothing is 0 whatever its query
            assert_same_bits(with_lse(blind, key, value, **options), expected)


@pytest.mark.promise("visible-nan-reaches-its-rows")
@every_arithmetic
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_poisoned_mask(name, dtype):
    """NaN or +inf in what is added reaches its row alone."""
    operands = make_problem(60, 140, heads=2, dtype=dtype)
    array = np.zeros((60, 140), dtype)
    expected = with_lse(*operands, **{name: array})
    array[7, 130] = np.nan
    array[50, 3] = INF
    out, lse = with_lse(*operands, **{name: array})
    bad = np.isin(np.arange(60), [7, 50])
    assert np.isnan(out[:, bad]).all()
    assert not np.isfinite(lse[:, bad]).any()
    assert_same_bits((out[:, ~bad], lse[:, ~bad]), (expected[0][:, ~bad], expected[1][:, ~bad]))
