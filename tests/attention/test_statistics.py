# SPDX-License-Identifier: Apache-2.0
"""`attention_statistics`: the definition, what else says the same, what changes no bit, bad input.

Sizes lie around the edges of the tiles, 48 rows and 128 keys, and of spans of 512 keys.
"""

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import (
    attention,
    attention_backward,
    attention_statistics,
    attention_weights,
    reference,
)
from tests.attention.problems import (
    INF,
    LEVELS,
    arguments_of,
    every_arithmetic,
    laid_out,
    misaligned,
    problem_with_everything,
)
from tests.fuzz.statistics import assert_right
from tests.support.correctness import assert_same_bits
from tests.support.problems import both_dtypes, covering_cases, make_problem

pytestmark = pytest.mark.usefixtures("isa")

LENGTHS = (1, 2, 15, 16, 17, 47, 48, 49, 127, 128, 129, 257)
STATISTICS = LEVELS | {
    "q_len": LENGTHS,
    "kv_len": LENGTHS,
    "heads": ((1, 1), (2, 2), (3, 1), (4, 2)),
    "batch": (None, (), (2,), (2, 1, 2)),
    "value_head_dim": (1,),
    "dropout_p": (0.0,),
    "counters": ((0, 0),),
    "entropy": (False, True),
    "column_sums": (False, True),
    "row_weights": (None, "normal", "of each row", "one", "zero", "bfloat16"),
    "top": (None, 1, 8, 300),
    "blocks": (None, "one", "each", "ragged", "of keys"),
    "maximum": (False, True),
}
CASES = covering_cases(STATISTICS)
POISON = (np.nan, INF, -INF)


def ragged(length, rng):
    """Return starts of blocks, some of one row."""
    return np.flatnonzero((rng.random(length) < 0.3) | (np.arange(length) == 0))


def everything(q_len, kv_len, top=5):
    """Return the arguments that ask for all statistics."""
    rng = np.random.default_rng(8)
    return {
        "entropy": True,
        "column_sums": True,
        "row_weights": rng.normal(size=q_len),
        "top": top,
        "blocks": (ragged(q_len, rng), ragged(kv_len, rng)),
        "maximum": True,
    }


def asked_of(case, rng):
    """Return what a case asks for."""
    q_len, kv_len = case["q_len"], case["kv_len"]
    asked = {name: case[name] for name in ("entropy", "column_sums", "maximum") if case[name]}
    rows = (*(case["batch"] or ()), case["heads"][0], q_len)
    if case["batch"] is None and case["heads"][0] == 1:
        rows = rows[-1:]
    weights = rng.normal(size=rows)
    if case["column_sums"] and case["row_weights"]:
        asked["row_weights"] = {
            "normal": weights,
            "of each row": weights.astype(np.float32).reshape(-1, q_len)[0, ::-1],
            "one": np.float32(-2.0),
            "zero": np.zeros(1),
            "bfloat16": np.float32(weights).astype(ml_dtypes.bfloat16),
        }[case["row_weights"]]
    if case["top"]:
        asked["top"] = case["top"]
    if case["blocks"]:
        asked["blocks"] = {
            "one": ([0], np.zeros(1, np.uint8)),
            "each": (np.arange(q_len), range(kv_len)),
            "ragged": (ragged(q_len, rng).tolist(), ragged(kv_len, rng)),
            "of keys": (np.arange(1), ragged(kv_len, rng).astype(np.int32)),
        }[case["blocks"]]
    return asked or {"maximum": True}


@pytest.mark.promise("statistics-are-the-definition")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_argument_with_every_other(number):
    rng = np.random.default_rng(number)
    (query, key, _), options = arguments_of(CASES[number], rng)
    for name in ("dropout_p", "seed"):
        del options[name]
    asked = asked_of(CASES[number], rng)
    found = attention_statistics(query, key, **asked, **options)
    assert_right(found, query, key, asked, options)


@pytest.mark.parametrize("statistics", [reference.attention_statistics, attention_statistics])
@pytest.mark.parametrize("sinks", [None, np.array([0.5, -INF])])
def test_the_words_of_the_definition(sinks, statistics):
    """Each statistic is what its words say of the probabilities, pair by pair."""
    query, key, _ = make_problem(6, 9, 4, heads=2, dtype=np.float64)
    options = {"is_causal": True, "query_offset": -1, "sinks": sinks}  # the first row sees nothing
    probs = attention_weights(query, key, **options)
    weights = np.arange(-6.0, 6.0).reshape(2, 6)
    starts = [0, 1, 4], [0, 3]
    found = statistics(
        query,
        key,
        **{"entropy": True, "column_sums": True, "row_weights": weights, "top": 3},
        **{"blocks": starts, "maximum": True},
        **options,
    )
    for h in range(2):
        for i in range(6):
            row = probs[h, i]
            assert_allclose(found.entropy[h, i], -sum(p * np.log(p) for p in row if p), atol=1e-14)
            assert_allclose(found.maximum[h, i], max(row), atol=1e-15)
            strongest = sorted(range(min(i, 9)), key=lambda j: -row[j])[:3]
            missing = 3 - len(strongest)
            assert found.top_keys[h, i].tolist() == strongest + [-1] * missing
            assert_allclose(found.top_weights[h, i], [*row[strongest], *[0] * missing], atol=1e-15)
        for j in range(9):
            expected = sum(weights[h, i] * probs[h, i, j] for i in range(6))
            assert_allclose(found.column_sums[h, j], expected, atol=1e-14)
        for a, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
            for b, keys in enumerate((slice(0, 3), slice(3, 9))):
                assert_allclose(found.blocks[h, a, b], probs[h, rows, keys].sum(), atol=1e-14)


# What other calls say of the same.


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "query_offset": 150}])
def test_entropy_is_lse_less_the_mean_score(dtype, options):
    query, key, _ = make_problem(130, 280, 16, heads=2, batch=(2,), dtype=dtype)
    out, lse = attention(query, key, key, return_lse=True, **options)
    expected = lse - (query * out).sum(axis=-1) / 4
    entropy = attention_statistics(query, key, entropy=True, **options).entropy
    assert_allclose(entropy, expected, atol=40 * np.finfo(dtype).eps)


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "query_offset": 150, "softcap": 2.0}])
def test_column_sums_are_the_gradient_by_value(dtype, options):
    query, key, _ = make_problem(130, 280, 16, heads=3, dtype=dtype)
    weights = np.random.default_rng(0).normal(size=(3, 130)).astype(dtype)
    value = np.zeros((3, 280, 1), dtype)
    saved = attention(query, key, value, return_lse=True, **options)
    expected = attention_backward(weights[..., None], query, key, value, *saved, **options)[2]
    found = attention_statistics(query, key, column_sums=True, row_weights=weights, **options)
    assert_allclose(found.column_sums, expected[..., 0], atol=40 * np.finfo(dtype).eps)


@both_dtypes
def test_blocks_are_attention_to_one_hot_values(dtype):
    query, key, _ = make_problem(130, 280, 16, heads=4, kv_heads=2, dtype=dtype)
    rng = np.random.default_rng(1)
    options = {"sinks": rng.normal(size=4), "bias": rng.normal(size=(130, 280))}
    starts = ragged(130, rng), ragged(280, rng)
    block = np.searchsorted(starts[1], np.arange(280), side="right") - 1
    value = np.broadcast_to(np.eye(len(starts[1]), dtype=dtype)[block], (2, 280, len(starts[1])))
    mass = attention(query, key, value, **options)
    expected = np.add.reduceat(mass, starts[0], axis=1)
    found = attention_statistics(query, key, blocks=starts, **options)
    assert_allclose(found.blocks, expected, atol=40 * np.finfo(dtype).eps)


@both_dtypes
def test_blocks_of_one_row_and_one_key_are_the_probabilities(dtype):
    (query, key, _), options = problem_with_everything(dtype)
    found = attention_statistics(query, key, blocks=(range(70), range(300)), top=300, **options)
    probs = attention_weights(query, key, **options)
    assert_allclose(found.blocks, probs, atol=40 * np.finfo(dtype).eps)
    at_top = np.take_along_axis(found.blocks, np.maximum(found.top_keys, 0), axis=-1)
    assert_allclose(
        found.top_weights, np.where(found.top_keys < 0, 0, at_top), rtol=1e-5, atol=1e-37
    )


@both_dtypes
def test_sums_agree(dtype):
    """The same probabilities, added up in other ways."""
    (query, key, _), options = problem_with_everything(dtype)
    found = attention_statistics(
        query,
        key,
        **{"column_sums": True, "blocks": ([0], range(300)), "top": 1, "maximum": True},
        **options,
    )
    tolerance = 100 * np.finfo(dtype).eps
    assert_allclose(found.column_sums, found.blocks[..., 0, :], atol=tolerance)
    assert_array_equal(found.top_weights[..., 0], found.maximum)


def test_the_row_of_one_query():
    """A weight of 1 for one row, and of 0 for the others, gives its probabilities."""
    query, key, _ = make_problem(50, 200, 16, heads=2)
    rows = np.eye(50)[[17]][0]
    found = attention_statistics(query, key, column_sums=True, row_weights=rows)
    assert_allclose(found.column_sums, attention_weights(query, key)[:, 17], atol=1e-7)


# The strongest keys.


@every_arithmetic
@pytest.mark.parametrize("q_len", [1, 20, 60])
def test_ties_go_to_the_lower_key(q_len, dtype):
    """Equal keys, over the borders of tiles, come in their order, however late they are found."""
    rng = np.random.default_rng(0)
    key = rng.integers(0, 4, (1, 700)).repeat(8, axis=0).T[None].astype(dtype)
    query = np.ones((1, q_len, 8), dtype)
    found = attention_statistics(query, key, top=250, maximum=True)
    order = np.argsort(-key[0, :, 0].astype(np.float64), kind="stable")[:250]
    assert_array_equal(found.top_keys[0], np.broadcast_to(order, (q_len, 250)))
    same = np.zeros((1, 700, 8), dtype)
    for count in (1, 2, 129, 700, 701):
        keys = attention_statistics(query, same, top=count).top_keys[0]
        expected = [j if j < 700 else -1 for j in range(count)]
        assert_array_equal(keys, np.broadcast_to(expected, (q_len, count)))
    mask = np.arange(700) % 3 == 1
    keys = attention_statistics(query, same, top=300, mask=mask).top_keys[0]
    expected = [*np.flatnonzero(mask), *[-1] * (300 - mask.sum())]
    assert_array_equal(keys, np.broadcast_to(expected, (q_len, 300)))


@both_dtypes
def test_keys_without_a_share_are_ranked_too(dtype):
    """A score so low that its probability is 0 still has its place; -inf is not seen."""
    query = np.ones((1, 20, 1), dtype)
    score = np.array([-5e3, 0, -9e3, -INF, -7e3, -8e3])
    found = attention_statistics(query, score.astype(dtype)[None, :, None], top=7, maximum=True)
    assert (found.top_keys == [1, 0, 4, 5, 2, -1, -1]).all()
    assert (found.top_weights == [1, 0, 0, 0, 0, 0, 0]).all()
    assert (found.maximum == 1).all()


@both_dtypes
@pytest.mark.parametrize("score", [80.0, -80.0, 700.0, -700.0, 0.0])
def test_large_scores(score, dtype):
    """Equal scores give ln(n), whatever they are."""
    query, key = np.full((1, 20, 1), score, dtype), np.ones((1, 200, 1), dtype)
    found = attention_statistics(query, key, entropy=True, maximum=True, column_sums=True)
    eps = np.finfo(dtype).eps
    assert_allclose(found.entropy, np.log(200), atol=2 * abs(score) * eps + 10 * eps)
    assert_allclose(found.maximum, 1 / 200, rtol=2 * abs(score) * eps + 10 * eps)
    assert_allclose(found.column_sums, 0.1, rtol=2 * abs(score) * eps + 10 * eps)
    alone = attention_statistics(query, key[:, :1], entropy=True, maximum=True)
    assert (alone.entropy == 0).all()
    assert (alone.maximum == 1).all()


# What is not seen, and what is.


@pytest.mark.promise("empty-row-is-zero")
@every_arithmetic
def test_rows_that_see_nothing(dtype):
    query, key, _ = make_problem(60, 140, heads=2, dtype=dtype)
    mask = np.ones((60, 140), bool)
    mask[3] = mask[50:] = False
    blind = query.copy()
    blind[:, 3] = np.nan
    for sinks in (None, np.zeros(2)):
        asked = everything(60, 140) | {"row_weights": None}
        found = attention_statistics(blind, key, mask=mask, sinks=sinks, **asked)
        for x in (found.entropy, found.maximum, found.top_weights):
            assert (x[:, 3] == 0).all()
            assert (x[:, 50:] == 0).all()
        assert (found.top_keys[:, 50:] == -1).all()
        assert_same_bits(found, attention_statistics(query, key, mask=mask, sinks=sinks, **asked))
    nothing = attention_statistics(query, key, kv_lengths=0, **everything(60, 140))
    for name, x in nothing._asdict().items():
        assert (x == (-1 if name == "top_keys" else 0)).all()


@pytest.mark.promise("masked-pair-contributes-nothing")
@every_arithmetic
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("q_len", [1, 50])
def test_poison_of_keys_that_no_row_sees(q_len, poison, dtype):
    rng = np.random.default_rng(2)
    query, key, _ = make_problem(q_len, 300, heads=4, kv_heads=2, batch=(2,), dtype=dtype)
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
        expected = attention_statistics(query, key, **everything(q_len, 300), **options)
        poisoned = key.copy()
        poisoned[..., hidden, :] = poison
        found = attention_statistics(query, poisoned, **everything(q_len, 300), **options)
        assert_same_bits(found, expected)


@pytest.mark.promise("masked-pair-contributes-nothing", "visible-nan-reaches-its-rows")
@every_arithmetic
@pytest.mark.parametrize("poison", [np.nan, INF])
def test_poison_that_some_rows_see(poison, dtype):
    """It makes their statistics NaN, and the sums of what they see; no others."""
    query, key, _ = make_problem(60, 300, 8, heads=4, kv_heads=2, dtype=dtype)
    query = abs(query)  # so that an infinite key has an infinite score
    mask = np.random.default_rng(3).random((4, 60, 300)) < 0.1
    asked = everything(60, 300) | {"row_weights": None, "blocks": (range(60), range(300))}
    expected = attention_statistics(query, key, mask=mask, **asked)
    key[:, 200, 3] = poison
    found = attention_statistics(query, key, mask=mask, **asked)
    bad = mask[..., 200]
    assert 0 < bad.sum() < bad.size
    for name in ("entropy", "maximum", "top_weights"):
        assert np.isnan(getattr(found, name)[bad]).all(), name
        assert_same_bits(getattr(found, name)[~bad], getattr(expected, name)[~bad])
    assert (found.top_keys[bad] == -1).all()
    assert_array_equal(found.top_keys[~bad], expected.top_keys[~bad])
    reached = mask & bad[..., None]
    assert_array_equal(np.isnan(found.blocks), reached)
    assert_same_bits(found.blocks[~reached], expected.blocks[~reached])
    columns = reached.any(axis=-2)
    assert 0 < columns.sum() < columns.size
    assert_array_equal(np.isnan(found.column_sums), columns)
    assert_same_bits(found.column_sums[~columns], expected.column_sums[~columns])
    truth = reference.attention_statistics(query, key, mask=mask, **asked)
    for name, x in truth._asdict().items():
        assert_array_equal(np.isnan(getattr(found, name)), np.isnan(x), err_msg=name)


@pytest.mark.promise("visible-nan-reaches-its-rows")
@every_arithmetic
@pytest.mark.parametrize("poison", [np.nan, INF, -INF])
def test_poisoned_query(poison, dtype):
    """It reaches its row alone."""
    query, key, _ = make_problem(60, 140, heads=2, dtype=dtype)
    asked = everything(60, 140) | {"blocks": (range(60), range(140))}
    expected = attention_statistics(query, key, **asked)
    query[1, 7, 3] = poison
    found = attention_statistics(query, key, **asked)
    clean = np.ones((2, 60), bool)
    clean[1, 7] = False
    for name in ("entropy", "maximum", "top_keys", "top_weights", "blocks"):
        got, usual = getattr(found, name), getattr(expected, name)
        assert_same_bits(got[clean], usual[clean])
        if name == "top_keys":
            assert (got[~clean] == -1).all()
        else:
            assert np.isnan(got[~clean]).any()
    assert_same_bits(found.column_sums[0], expected.column_sums[0])
    assert np.isnan(found.entropy[1, 7])


# What changes no bit.


@pytest.mark.promise("bitwise-threads", "bitwise-runs")
@every_arithmetic
def test_threads_and_runs_change_no_bit(dtype, threads):
    (query, key, _), options = problem_with_everything(dtype)
    long = make_problem(300, 1700, 8, heads=2, dtype=dtype)[:2]
    for operands, how in (((query, key), options), ((query, key), {}), (long, {})):
        asked = everything(operands[0].shape[-2], operands[1].shape[-2])
        threads(1)
        expected = attention_statistics(*operands, **asked, **how)
        for count in (2, 3, 7):
            threads(count)
            for _ in range(3):
                assert_same_bits(attention_statistics(*operands, **asked, **how), expected)


@pytest.mark.promise("bitwise-strides", "inputs-are-not-written")
@every_arithmetic
def test_strides_change_no_bit(dtype):
    (query, key, _), options = problem_with_everything(dtype)
    asked = everything(70, 300)
    asked["row_weights"] = np.random.default_rng(0).normal(size=(3, 4, 70))
    expected = attention_statistics(query, key, **asked, **options)

    def frozen(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    for other in (
        lambda x: laid_out(x, "interleaved"),
        lambda x: laid_out(x, "reversed"),
        np.asfortranarray,
        lambda x: np.flip(np.flip(x).copy()),
        lambda x: x.repeat(3, axis=-1)[..., ::3],
        misaligned,
        frozen,
    ):
        given = asked | {"row_weights": other(asked["row_weights"])}
        same = {name: other(x) if name in ("mask", "bias") else x for name, x in options.items()}
        found = attention_statistics(other(query), other(key), **given, **same)
        assert_same_bits(found, expected)
    repeated = np.broadcast_to(key[:, :, :1], key.shape)
    assert_same_bits(
        attention_statistics(query, repeated, **asked),
        attention_statistics(query, repeated.copy(), **asked),
    )


@pytest.mark.promise("bitwise-batch-neighbours")
@every_arithmetic
def test_batch_neighbours_change_no_bit(dtype):
    (query, key, _), options = problem_with_everything(dtype)
    asked = everything(70, 300)
    found = attention_statistics(query, key, **asked, **options)
    poisoned = query.copy(), key.copy()
    poisoned[0][1] = poisoned[1][1] = np.nan
    again = attention_statistics(*poisoned, **asked, **options)
    assert_same_bits(tuple(x[::2] for x in again), tuple(x[::2] for x in found))
    for b in range(3):
        own = {
            name: x[b] if name in ("mask", "query_offset", "alibi_slopes", "kv_lengths") else x
            for name, x in options.items()
        }
        alone = attention_statistics(query[b], key[b], **asked, **own)
        assert_same_bits(tuple(alone), tuple(x[b] for x in found))


@every_arithmetic
def test_what_else_is_asked_changes_no_bit(dtype):
    (query, key, _), options = problem_with_everything(dtype)
    asked = everything(70, 300)
    whole = attention_statistics(query, key, **asked, **options)
    for names in (
        ("entropy",),
        ("column_sums", "row_weights"),
        ("top",),
        ("blocks",),
        ("maximum",),
    ):
        found = attention_statistics(query, key, **{name: asked[name] for name in names}, **options)
        for each, x in found._asdict().items():
            if x is not None:
                assert_same_bits(x, getattr(whole, each))


@pytest.mark.promise("bitwise-padding")
@every_arithmetic
def test_padding_changes_no_bit(dtype):
    query, key, _ = make_problem(60, 131, heads=4, kv_heads=2, dtype=dtype)
    asked = everything(60, 131)
    expected = attention_statistics(query, key, **asked)
    for padding in (1, 125, 126, 1000):
        fill = np.full((2, padding, 16), np.nan, dtype)
        longer = np.concatenate([key, fill], axis=1)
        found = attention_statistics(query, longer, kv_lengths=131, **asked)
        for name in ("entropy", "maximum", "top_keys", "top_weights"):
            assert_same_bits(getattr(found, name), getattr(expected, name))
        assert_same_bits(found.column_sums[..., :131], expected.column_sums)
        assert (found.column_sums[..., 131:] == 0).all()


# Sizes and shapes.


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@both_dtypes
def test_empty(shape, dtype):
    q_len, kv_len = shape
    query, key = np.ones((2, 4, q_len, 8), dtype), np.ones((2, 2, kv_len, 8), dtype)
    found = attention_statistics(
        query,
        key,
        **{"entropy": True, "column_sums": True, "top": 2, "blocks": ([0], [0]), "maximum": True},
    )
    for name, rest in (
        ("entropy", (q_len,)),
        ("maximum", (q_len,)),
        ("column_sums", (kv_len,)),
        ("top_keys", (q_len, 2)),
        ("top_weights", (q_len, 2)),
        ("blocks", (1, 1)),
    ):
        x = getattr(found, name)
        assert x.shape == (2, 4, *rest)
        assert (x == (-1 if name == "top_keys" else 0)).all()
        assert x.dtype == (np.int64 if name == "top_keys" else dtype)
    empty = attention_statistics(np.ones((0, 2, 3, 4)), np.ones((0, 2, 3, 4)), entropy=True)
    assert empty.entropy.shape == (0, 2, 3)


def test_shapes_follow_the_operands():
    query, key, _ = make_problem(5, 7, 8, heads=4, kv_heads=2, batch=(2, 3))
    for q, k, lead in (
        (query[0, 0, 0], key[0, 0, 0], ()),
        (query[0, 0], key[0, 0, :1], (4,)),
        (query[0, 0], key[0, 0, 0], (4,)),
        (query, key[0, 0], (2, 3, 4)),
        (query[0], key[:, :1], (2, 3, 4)),
    ):
        asked = everything(5, 7, top=9)
        found = attention_statistics(q, k, **asked)
        assert_right(found, q, k, asked, {})
        assert found.entropy.shape == found.maximum.shape == (*lead, 5)
        assert found.column_sums.shape == (*lead, 7)
        assert found.top_keys.shape == found.top_weights.shape == (*lead, 5, 9)
        assert found.blocks.shape == (*lead, *map(len, asked["blocks"]))


def test_many_rows_and_keys():
    """Spans, edges of blocks that reach over some of them, and many tiles."""
    query, key, _ = make_problem(200, 3000, 8, heads=2)
    for starts in ([0], [0, 511, 512, 513, 1700], [0, 2999], range(0, 3000, 7)):
        asked = everything(200, 3000) | {"blocks": ([0, 47, 48, 100], starts)}
        options = {"is_causal": True, "query_offset": 2500}
        found = attention_statistics(query, key, **asked, **options)
        assert_right(found, query, key, asked, options)


# Bad arguments.

QUERY, KEY, _ = make_problem(5, 7, 8, heads=4, kv_heads=2, batch=(2,))
PAIR = "blocks must be a pair (query_starts, key_starts), "
NEEDS = "attention_statistics needs at least one of entropy, column_sums, top, blocks and maximum"
ERRORS = [
    ({}, ValueError, NEEDS),
    ({"entropy": False, "top": None}, ValueError, NEEDS),
    ({"entropy": 1}, TypeError, "entropy must be a bool, not int"),
    ({"maximum": None}, TypeError, "maximum must be a bool, not NoneType"),
    ({"column_sums": "yes"}, TypeError, "column_sums must be a bool, not str"),
    (
        {"row_weights": np.ones(5), "entropy": True},
        ValueError,
        "row_weights must be given with column_sums alone",
    ),
    (
        {"column_sums": True, "row_weights": np.ones(4)},
        ValueError,
        "row_weights must broadcast to (batch, q_heads, q_len) = (2, 4, 5), "
        "got row_weights.shape=(4,)",
    ),
    (
        {"column_sums": True, "row_weights": np.ones((3, 2, 4, 5))},
        ValueError,
        "row_weights must broadcast to (batch, q_heads, q_len) = (2, 4, 5), "
        "got row_weights.shape=(3, 2, 4, 5)",
    ),
    (
        {"column_sums": True, "row_weights": [1.0, np.nan, 1, 1, 1]},
        ValueError,
        "row_weights must be finite, got nan",
    ),
    (
        {"column_sums": True, "row_weights": np.full(5, 1e300)},
        ValueError,
        "row_weights must be finite, got inf",
    ),
    (
        {"column_sums": True, "row_weights": [1, 1, 1, 1, 1]},
        TypeError,
        "row_weights must be an array of float16, bfloat16, float32 or float64, not int64",
    ),
    ({"top": 1.0}, TypeError, "top must be an int, not float"),
    ({"top": True}, TypeError, "top must be an int, not bool"),
    ({"top": 0}, ValueError, "top must be at least 1, and top x rows below 2**60, got top=0"),
    ({"top": -3}, ValueError, "top must be at least 1, and top x rows below 2**60, got top=-3"),
    (
        {"top": 2**60},
        ValueError,
        f"top must be at least 1, and top x rows below 2**60, got top={2**60}",
    ),
    ({"blocks": 3}, TypeError, PAIR + "not int"),
    ({"blocks": ([0],)}, TypeError, PAIR + "not tuple of 1"),
    ({"blocks": [[0], [0], [0]]}, TypeError, PAIR + "not list of 3"),
    (
        {"blocks": ([0.0, 1.0], [0])},
        TypeError,
        "blocks' query_starts must be an array of integers, not float64",
    ),
    (
        {"blocks": ([0], "words")},
        TypeError,
        "blocks' key_starts must be an array of integers, not str",
    ),
    (
        {"blocks": ([1, 2], [0])},
        ValueError,
        "blocks' query_starts must be one axis that begins with 0, got 1",
    ),
    (
        {"blocks": ([0], np.zeros(0, int))},
        ValueError,
        "blocks' key_starts must be one axis that begins with 0, got shape (0,)",
    ),
    (
        {"blocks": ([0], [[0]])},
        ValueError,
        "blocks' key_starts must be one axis that begins with 0, got shape (1, 1)",
    ),
    (
        {"blocks": ([0, 2, 2], [0])},
        ValueError,
        "blocks' query_starts must ascend, got 2 before 2 at 1",
    ),
    (
        {"blocks": ([0], np.array([0, 5, 3], np.uint8))},
        ValueError,
        "blocks' key_starts must ascend, got 5 before 3 at 1",
    ),
    (
        {"blocks": ([0], [0, 7])},
        ValueError,
        "blocks' key_starts must be below 7, the rows, got 7",
    ),
    (
        {"blocks": (np.array([0, 2**64 - 1], np.uint64), [0])},
        ValueError,
        f"blocks' query_starts must be below 5, the rows, got {2**64 - 1}",
    ),
    (
        {"entropy": True, "is_causal": True},
        ValueError,
        "query_offset must be given with is_causal if q_len differs from kv_len (0: the first "
        "query stands at the first key; kv_len - q_len: the last at the last), got q_len=5, "
        "kv_len=7",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    with pytest.raises(error) as raised:
        attention_statistics(QUERY, KEY, **arguments)
    assert type(raised.value) is error
    assert str(raised.value) == message


def test_errors_of_the_operands():
    with pytest.raises(ValueError, match=r"^key has head_dim 3 but query has head_dim 8"):
        attention_statistics(QUERY, KEY[..., :3], entropy=True)
    with pytest.raises(TypeError, match=r"^key must have the dtype of query, float32, not float64"):
        attention_statistics(QUERY, KEY.astype(np.float64), entropy=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout_p'"):
        attention_statistics(QUERY, KEY, entropy=True, dropout_p=0.1)


def test_too_large_results_are_memory_errors():
    for asked in ({"top": 2**50}, {"blocks": (range(5), range(7)), "top": 2**48}):
        with pytest.raises(MemoryError):
            attention_statistics(QUERY, KEY, **asked)
