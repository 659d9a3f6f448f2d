# SPDX-License-Identifier: Apache-2.0
"""Thousands of short problems in one call: each is right and has the bits that it has alone.

The memory of a call does not grow with their number.
"""

import itertools

import numpy as np
import pytest

import fastattn
from fastattn import _core, attention
from tests.attention.problems import every_arithmetic, with_lse
from tests.support.child import run
from tests.support.correctness import assert_same_bits, assert_within_gate, attend_within_gate
from tests.support.gradients import gradient_errors, grads_of
from tests.support.memory import peak_so_far, status
from tests.support.problems import make_problem

pytestmark = pytest.mark.usefixtures("isa")

MIB = 2**20
# Around vectors, the border of the few-queries form, and what problems of real models have.
LENGTHS = [(1, 1), (2, 9), (12, 12), (16, 16), (16, 33), (17, 16), (24, 24), (49, 49), (64, 65)]
each_length = pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)


def everything(count, q_len, kv_len, dtype):
    """Return problems, and options of which some are each problem's own."""
    operands = make_problem(
        q_len, kv_len, 20, 12, heads=4, kv_heads=2, batch=(count,), dtype=dtype, mean=1.0
    )
    rng = np.random.default_rng(6)
    options = {
        "mask": rng.random((count, 1, 1, kv_len)) < 0.8,
        "bias": rng.normal(size=(1, 4, q_len, kv_len)).astype(np.float32),
        "kv_lengths": rng.integers(0, kv_len + 1, count),
        "alibi_slopes": rng.random((count, 4)),
        "query_offset": rng.integers(-1, kv_len, count),
        "window": (kv_len // 2 + 1, 5),
        "sinks": rng.normal(size=4),
        "softcap": 8.0,
    }
    return operands, options


def in_turn(options):
    """Return no option, each alone, and all."""
    yield {}
    for name in options:
        positions = ("query_offset",) if name in ("alibi_slopes", "window") else ()
        yield {x: options[x] for x in (name, *positions)}
    yield options


@pytest.mark.promise("bitwise-batch-neighbours", "accuracy-gate")
@every_arithmetic
@each_length
def test_a_problem_is_right_and_as_it_is_alone(q_len, kv_len, dtype):
    count = 20
    operands, every = everything(count, q_len, kv_len, dtype)
    for options in in_turn(every):
        together = attend_within_gate(*operands, **options)
        for i in (0, 1, count - 1):
            own = {
                name: x[i : i + 1] if np.shape(x)[:1] == (count,) else x
                for name, x in options.items()
            }
            alone = with_lse(*(x[i : i + 1] for x in operands), **own)
            assert_same_bits(alone, tuple(x[i : i + 1] for x in together))
    attend_within_gate(*operands, **every, dropout_p=0.3, seed=5)


@pytest.mark.promise("bitwise-threads")
@each_length
def test_threads_change_no_bit(q_len, kv_len, threads):
    operands, options = everything(500, q_len, kv_len, np.float32)
    threads(1)
    expected = with_lse(*operands, **options)
    for count in (2, 7):
        threads(count)
        assert_same_bits(with_lse(*operands, **options), expected)


@pytest.mark.promise("bitwise-strides", "nothing-is-expanded")
@each_length
def test_strides_over_the_batch_change_no_bit(q_len, kv_len):
    """Steps of 0, backward and over gaps, of inputs and of the result."""
    operands, options = everything(60, q_len, kv_len, np.float32)

    def repeated(x):
        return np.broadcast_to(x[3:4], x.shape)

    def backward(x):
        return x[::-1].copy()[::-1]

    def apart(x):
        return x.repeat(2, axis=0)[::2]

    kinds = (repeated, backward, apart, np.copy)
    for shift in range(len(kinds)):
        turn = itertools.cycle((*kinds[shift:], *kinds[:shift]))
        laid = [make(x) for make, x in zip(turn, operands, strict=False)]
        mask = next(turn)(options["mask"])
        given = options | {
            "mask": mask,
            "bias": np.broadcast_to(options["bias"], (60, *options["bias"].shape[1:])),
        }
        copies = [np.ascontiguousarray(x) for x in laid]
        expected = attention(*copies, **options | {"mask": mask.copy()})
        out = np.full_like(expected, np.nan)[::-1]
        assert attention(*laid, **given, out=out) is out
        assert_same_bits(out, expected)


@pytest.mark.promise("masked-pair-contributes-nothing", "bitwise-padding")
@each_length
def test_lengths_of_their_own(q_len, kv_len):
    """Problems of unlike lengths; what lies behind an end is NaN."""
    count = 3000
    operands = make_problem(q_len, kv_len, 8, heads=2, batch=(count,))
    lengths = np.random.default_rng(1).integers(0, kv_len + 1, count)
    result = attend_within_gate(*operands, kv_lengths=lengths)
    hidden = np.arange(kv_len) >= lengths[:, None]
    filled = [operands[0], *(x.copy() for x in operands[1:])]
    for x in filled[1:]:
        x.swapaxes(1, 2)[hidden] = np.nan
    assert_same_bits(with_lse(*filled, kv_lengths=lengths), result)
    empty = lengths == 0
    assert not result[0][empty].any()
    assert (result[1][empty] == -np.inf).all()


@pytest.mark.promise("nothing-is-expanded")
@pytest.mark.parametrize("q_len", [3, 18])
def test_a_bias_for_a_hundred_thousand(q_len):
    count = 100_000
    operands = make_problem(q_len, 5, 4, batch=(count,))
    bias = np.random.default_rng(2).standard_normal((1, q_len, 5), np.float32)
    expected = attention(*operands, bias=bias)
    assert_within_gate(expected, *operands, bias=bias)
    for same in (bias[None], np.broadcast_to(bias, (count, *bias.shape))):
        assert_same_bits(attention(*operands, bias=same), expected)
    with pytest.raises(ValueError, match="bias"):
        attention(*operands, bias=np.broadcast_to(bias, (count - 1, *bias.shape)))


@pytest.mark.promise("gradients-are-the-definitions")
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (12, 12), (24, 24), (49, 49)])
def test_gradients(q_len, kv_len):
    operands, options = everything(300, q_len, kv_len, np.float32)
    del options["window"], options["alibi_slopes"]
    for given in ({}, {"bias": options["bias"]}, options):
        errors = gradient_errors(grads_of(operands, given), operands, given)
        assert all(error <= most for error, most in errors)


def peak_of_many(isa, count, length, head_dim):
    """Return the most bytes that a call needs beside its arrays."""
    _core.set_isa(isa)
    fastattn.set_num_threads(2)
    rng = np.random.default_rng(0)
    query, key, value = rng.random((3, count, 3, length, head_dim), np.float32)
    bias = np.ones((1, 3, length, length), np.float32)
    mask = rng.random((count, 1, 1, length)) < 0.9
    out = np.full_like(query, np.nan)
    attention(query[:1], key[:1], value[:1])
    before = peak_so_far()
    attention(query, key, value, mask=mask, bias=bias, out=out)
    return status("VmHWM") - before


@pytest.mark.promise("forward-memory", "nothing-is-expanded")
@pytest.mark.parametrize(("length", "head_dim"), [(12, 64), (24, 16), (49, 32)])
def test_memory_does_not_grow_with_the_problems(isa, length, head_dim):
    assert run(peak_of_many, isa, 10_000, length, head_dim) < 2 * MIB


def attend_to_a_million(isa):
    """Return the most bytes that a call needs beside its arrays, for 2^20 problems of 1 x 1."""
    _core.set_isa(isa)
    fastattn.set_num_threads(2)
    count = 2**20
    rng = np.random.default_rng(0)
    query, key, value = (rng.random((count, 1, 1, 4), np.float32) for _ in range(3))
    out = np.full_like(value, np.nan)
    lengths = np.arange(count) % 2
    most = 0
    for options in (
        {},
        {
            "bias": np.ones((1, 1, 1, 1), np.float32),
            "mask": np.broadcast_to(True, (count, 1, 1, 1)),
        },
        {"kv_lengths": lengths},
    ):
        attention(query[:64], key[:64], value[:64])
        before = peak_so_far()
        attention(query, key, value, out=out, **options)
        most = max(most, status("VmHWM") - before)
        seen = lengths if "kv_lengths" in options else np.ones(count)
        assert np.array_equal(out, value * seen[:, None, None, None].astype(np.float32))
    return most


@pytest.mark.promise("forward-memory", "nothing-is-expanded")
def test_a_million_problems_of_one_key(isa):
    assert run(attend_to_a_million, isa, timeout=120) < 4 * MIB
