# SPDX-License-Identifier: Apache-2.0
"""What changes no bit: strides, threads, neighbours, padding, chunks, tiles that are skipped."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from tests.attention.problems import (
    INF,
    assert_chunks_have_the_bits,
    every_arithmetic,
    laid_out,
    misaligned,
    problem_with_everything,
    with_lse,
)
from tests.support.correctness import assert_same_bits, attend_within_gate
from tests.support.problems import both_dtypes, make_problem

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.promise("bitwise-strides", "inputs-are-not-written")
@both_dtypes
def test_strides_change_no_bit(dtype, tmp_path):
    (query, key, value), options = problem_with_everything(dtype)
    expected = with_lse(query, key, value, **options)

    def mapped(x):
        path = tmp_path / f"{id(x)}.npy"
        np.save(path, x)
        return np.load(path, mmap_mode="r")

    def in_the_middle(x):
        wide = np.full([n + 3 for n in x.shape], np.nan, x.dtype)
        part = wide[tuple(slice(1, -2) for _ in x.shape)]
        part[...] = x
        return part

    def frozen(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    for other in (
        lambda x: laid_out(x, "interleaved"),
        lambda x: laid_out(x, "reversed"),
        np.asfortranarray,
        lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
        lambda x: np.flip(np.flip(x).copy()),
        lambda x: x.repeat(3, axis=-1)[..., ::3],
        in_the_middle,
        misaligned,
        lambda x: x.astype(x.dtype.newbyteorder(">")),
        frozen,
        mapped,
        lambda x: x.tolist() if dtype == np.float64 else memoryview(x),
        lambda x: x[None],
    ):
        same = [other(x) for x in (query, key, value)]
        got = with_lse(*same, **options) if np.ndim(same[0]) == 4 else None
        if got is None:
            wide = {
                n: x[None] for n, x in options.items() if n not in ("sinks", "window", "softcap")
            }
            got = [x[0] for x in with_lse(*same, **(options | wide))]
        assert_same_bits(tuple(got), expected)
    big_endian = {
        name: x.astype(x.dtype.newbyteorder(">")) if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }
    assert_same_bits(with_lse(query, key, value, **big_endian), expected)


@pytest.mark.promise("bitwise-strides")
@every_arithmetic
def test_stride_zero_operands(dtype):
    query, key, value = make_problem(20, 150, heads=2, batch=(2,), dtype=dtype)
    for axis in range(-4, 0):
        first = [x.take([0], axis) for x in (query, key, value)]
        repeated = [
            np.broadcast_to(a, x.shape) for a, x in zip(first, (query, key, value), strict=True)
        ]
        assert_same_bits(with_lse(*repeated), with_lse(*[x.copy() for x in repeated]))
    overlapping = as_strided(key, (2, 2, 100, 16), (*key.strides[:2], key.itemsize, key.itemsize))
    assert_same_bits(
        with_lse(query, overlapping, overlapping),
        with_lse(query, overlapping.copy(), overlapping.copy()),
    )
    same = query[..., :20, :]
    assert_same_bits(with_lse(same, same, same), with_lse(same, same.copy(), same.copy()))


@pytest.mark.promise("bitwise-threads", "bitwise-runs")
@every_arithmetic
def test_threads_and_runs_change_no_bit(dtype, threads):
    operands, options = problem_with_everything(dtype)
    for extra in (options, {}):
        threads(1)
        expected = with_lse(*operands, **extra)
        for count in (2, 3, 7):
            threads(count)
            for _ in range(3):
                assert_same_bits(with_lse(*operands, **extra), expected)


@pytest.mark.promise("bitwise-batch-neighbours")
@every_arithmetic
def test_batch_neighbours_change_no_bit(dtype):
    operands, options = problem_with_everything(dtype)
    out, lse = with_lse(*operands, **options)
    for b in range(3):
        alone = {
            name: x[b] if name in ("mask", "query_offset", "alibi_slopes", "kv_lengths") else x
            for name, x in options.items()
        }
        assert_same_bits((out[b], lse[b]), with_lse(*[x[b] for x in operands], **alone))
    poisoned = [x.copy() for x in operands]
    for x in poisoned:
        x[1] = np.nan
    again = with_lse(*poisoned, **options)
    assert_same_bits((again[0][::2], again[1][::2]), (out[::2], lse[::2]))
    # A key head and its group alone: the same rows in the same blocks.
    group = {
        name: x[..., 2:, :, :] if name == "bias" else x[..., 2:] if name in ("sinks",) else x
        for name, x in options.items()
    } | {"alibi_slopes": options["alibi_slopes"][:, 2:]}
    parts = [operands[0][:, 2:], operands[1][:, 1:], operands[2][:, 1:]]
    assert_same_bits(with_lse(*parts, **group), (out[:, 2:], lse[:, 2:]))


@pytest.mark.promise("bitwise-padding")
@every_arithmetic
def test_padding_changes_no_bit(dtype):
    operands = make_problem(60, 131, heads=4, kv_heads=2, dtype=dtype)
    expected = with_lse(*operands)
    rng = np.random.default_rng(5)
    for padding in (1, 125, 126, 1000, 9000):
        longer = [operands[0]]
        for x in operands[1:]:
            fill = rng.normal(size=(2, padding, 16)).astype(dtype) * 100
            longer.append(np.concatenate([x, fill], axis=1))
        assert_same_bits(with_lse(*longer, kv_lengths=131), expected)
        mask = np.arange(131 + padding) < 131
        assert_same_bits(with_lse(*longer, mask=mask), expected)
        more_queries = np.concatenate([operands[0], np.full((4, padding, 16), np.nan, dtype)], 1)
        out, lse = with_lse(more_queries, *operands[1:])
        assert_same_bits((out[:, :60], lse[:, :60]), expected)


@pytest.mark.promise("bitwise-query-chunks")
@every_arithmetic
@pytest.mark.parametrize("chunk", [17, 24, 25, 48, 63])
def test_query_chunks_change_no_bit(chunk, dtype):
    operands, options = problem_with_everything(dtype)
    options["mask"] = np.broadcast_to(options["mask"], (3, 4, 70, 300))
    expected = with_lse(*operands, **options)
    ends = (*range(chunk, 70 - 16, chunk), 70)  # the last chunk has more than 16 rows, too
    assert_chunks_have_the_bits(expected, operands, options, ends)


@pytest.mark.promise("bitwise-ways-to-mask")
def test_tiles_that_are_skipped_change_no_bit():
    """A mask that hides whole tiles gives what the keys that it leaves give alone."""
    query, key, value = make_problem(50, 700, heads=2)
    mask = np.zeros(700, bool)
    mask[128:256] = mask[512:640] = True
    expected = with_lse(query, key, value, mask=np.where(mask, 0, -INF))
    assert_same_bits(with_lse(query, key, value, mask=mask), expected)
    zeroed = np.where(mask[:, None], value, 0)
    assert_same_bits(with_lse(query, key, zeroed, mask=mask), expected)
    order = np.r_[128:256, 512:640]
    assert_same_bits(with_lse(query, key[:, order], value[:, order]), expected)


def biases(rng, dtype):
    """Return biases (2, 130, 150) of the kinds that passes tell apart."""
    bias = rng.normal(size=(2, 130, 150)).astype(dtype)
    hiding = np.where(rng.random(bias.shape) < 0.2, -INF, bias)
    hiding[0, 20:90, 128:] = hiding[1, 7] = -INF
    largest = np.finfo(dtype).max
    return {
        "plain": bias,
        "hiding": hiding,
        "one row hiding": np.where(np.arange(150) < 140, bias[:, :1], -INF).astype(dtype),
        "out of range": np.where(bias > 1, largest, np.where(bias < -1, -largest, bias)),
        "NaN": np.where(bias > 3, np.nan, bias).astype(dtype),
        "float16": bias.astype(np.float16),
    }


@pytest.mark.promise("bitwise-batch-neighbours")
@every_arithmetic
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "query_offset": 20},
        {"window": (30, 9), "query_offset": 5},
        {"softcap": 2.0},
        {"mask": "lengths"},
        {"mask": "columns"},
        {"kv_lengths": "each"},
        {"dropout_p": 0.3, "seed": 5},
    ],
    ids=lambda options: "-".join(options) or "alone",
)
def test_bias_that_the_batch_shares_changes_no_bit(options, dtype):
    """Many batch elements that have one bias give what each gives with a bias of its own."""
    rng = np.random.default_rng(11)
    batch, options = 20, dict(options)
    operands = [
        rng.normal(size=(batch, heads, length, 24)).astype(dtype)
        for heads, length in ((2, 130), (1, 150), (1, 150))
    ]
    operands[0][3, 0, 17] = INF
    operands[1][4, 0, 60, 3] = np.nan
    operands[2][5, 0, 149] = INF
    lengths = rng.integers(1, 151, batch)
    if options.get("mask") == "lengths":
        options["mask"] = (np.arange(150) < lengths[:, None])[:, None, None]
    elif options.get("mask") == "columns":
        options["mask"] = np.where(np.arange(150) % 7 == 3, -INF, np.arange(150) % 2)
    if "kv_lengths" in options:
        options["kv_lengths"] = lengths
    arithmetic = np.promote_types(dtype, np.float32)
    for bias in biases(rng, arithmetic).values():
        own = np.ascontiguousarray(np.broadcast_to(bias, (batch, *bias.shape[:2], 150)))
        shared = bias if bias.shape[1] == 130 else np.broadcast_to(bias, (2, 130, 150))
        got, expected = (
            tuple(x.astype(arithmetic) for x in with_lse(*operands, bias=each, **options))
            for each in (shared, own)
        )
        assert_same_bits(got, expected)


@pytest.mark.promise("bitwise-strides")
@every_arithmetic
@pytest.mark.parametrize("q_len", [3, 19, 49])
def test_what_lies_around_rows_changes_no_bit(q_len, dtype):
    """Rows that end within a vector, between numbers that are not theirs."""
    rng = np.random.default_rng(q_len)
    for columns in range(1, 66):
        operands = [rng.normal(size=(2, n, columns)).astype(dtype) for n in (q_len, 35, 35)]
        apart = []
        for x in operands:
            wide = np.full((*x.shape[:2], columns + 40), np.nan, dtype)
            wide[..., 3 : columns + 3] = x
            apart.append(wide[..., 3 : columns + 3])
        wide = np.full((2, q_len, columns + 40), 7, dtype)
        out = wide[..., 3 : columns + 3]
        expected = attend_within_gate(*operands)
        assert_same_bits(with_lse(*apart, out=out), expected)
        wide[..., 3 : columns + 3] = 7
        assert np.all(wide == 7)
