# SPDX-License-Identifier: Apache-2.0
"""The kernels in plain Numba CUDA: the definition's results in Numba's simulator, and compiling.

What runs here are the functions that run on a GPU, thread by thread, in processes that simulate
(simt_calls.py); what does not run here is the machine code.
"""

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import fastattn
from fastattn import _core, reference
from tests.cuda import simt_calls
from tests.cuda.cases import spilled
from tests.support.correctness import assert_same_bits, assert_within_gate
from tests.support.gradients import gradient_errors, grads_of
from tests.support.problems import (
    DTYPES,
    HALVES,
    both_dtypes,
    covering_cases,
    every_dtype,
    make_problem,
)

pytest.importorskip("numba_cuda")

INF, NAN = np.inf, np.nan


@contextlib.contextmanager
def simulators(*arguments):
    """Start processes that simulate."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        2, spawn, initializer=simt_calls.start, initargs=arguments
    ) as executor:
        yield executor
        executor.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def pool():
    """Simulate the kernels as they are."""
    with simulators() as executor:
        yield executor


@pytest.fixture(scope="module")
def pool_of_small_tiles():
    """Simulate kernels whose tiles have 16 rows, in less time."""
    with simulators(16) as executor:
        yield executor


@pytest.fixture(autouse=True, scope="module")
def plain_cpu():
    """Let the gates' plain formula round as no variant of the CPU's kernel does."""
    usual = _core.isa()
    _core.set_isa("generic")
    yield
    _core.set_isa(usual)


@contextlib.contextmanager
def about(*what):
    """Say what an error is about."""
    try:
        yield
    except AssertionError as error:
        error.add_note(repr(what))
        raise


def described(operands, options):
    """Return what tells a problem from others."""
    return [(x.shape, x.dtype.name) for x in operands], options


def assert_all_within_gate(pool, problems):
    """Simulate the problems (operands, options) and assert that out and lse are right."""
    futures = [pool.submit(simt_calls.attention, *problem) for problem in problems]
    for (operands, options), future in zip(problems, futures, strict=True):
        with about(*described(operands, options)):
            assert_within_gate(future.result(), *operands, **options)


class Backward:
    """A problem of gradients, with random grad_out and grad_lse, sent off to be simulated."""

    def __init__(self, pool, operands, options):
        self.operands, self.options = operands, options
        grads_of(operands, options, backward=self.send, pool=pool)

    def send(self, grad_out, query, key, value, out, lse, *, pool, grad_lse, **_):
        self.future = pool.submit(
            simt_calls.attention_backward,
            grad_out,
            (query, key, value),
            out,
            lse,
            self.options,
            grad_lse,
        )
        return ()

    def assert_within_gate(self):
        for error, allowed in gradient_errors(self.future.result(), self.operands, self.options):
            assert error <= allowed


def assert_all_gradients_within_gate(pool, problems):
    """Simulate the gradients of the problems (operands, options) and assert that they are right."""
    for backward in [Backward(pool, *problem) for problem in problems]:
        with about(*described(backward.operands, backward.options)):
            backward.assert_within_gate()


# --- Every argument with every other -------------------------------------------------------------

LEVELS = {
    "dtype": (*DTYPES, *HALVES, (np.float32, HALVES[0]), (np.float32, HALVES[1])),
    "q_len": (4, 18),
    "kv_len": (31, 66),
    "head_dims": ((8, 1), (35, 16), (16, 40)),
    "heads": ((1, 1), (2, 1), (2, 2)),
    "batch": (1, 2),
    "mask": (None, "pairs", "float", "float16", "bfloat16"),
    "bias": (None, "heads", "float64", "row", "hiding"),
    "scale": (None, -0.5),
    "is_causal": (False, True),
    "query_offset": (None, "end", "each"),
    "window": (None, (3, 2), (None, 0), (9, None)),
    "softcap": (None, 1.5),
    "alibi_slopes": (None, "heads", "each"),
    "sinks": (None, "heads", "some"),
    "kv_lengths": (None, "one", "each"),
    "dropout_p": (0.0, 0.4),
    "key_offset": (0, -3, "each"),
    "counters": ((0, 0), (3, 2**32 - 1)),
}

# Gradients take longer, and read their arguments by the same functions.
GRADIENT_LEVELS = LEVELS | {
    "dtype": (np.float32, np.float64, HALVES[1], (np.float32, HALVES[0])),
    "mask": (None, "pairs", "float16"),
    "bias": (None, "float64", "hiding"),
    "head_dims": ((35, 16), (16, 40)),
    "kv_len": (31, 40),
    "heads": ((1, 1), (2, 1)),
}


def problem_of(case, seed):
    """Return the operands and options that a case stands for."""
    rng = np.random.default_rng(seed)
    heads, kv_heads = case["heads"]
    batch, q_len, kv_len = case["batch"], case["q_len"], case["kv_len"]
    dtype = case["dtype"]
    dtype, key_dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    query, key, value = make_problem(
        q_len, kv_len, *case["head_dims"], heads=heads, kv_heads=kv_heads, batch=(batch,), seed=seed
    )
    operands = query.astype(dtype), key.astype(key_dtype), value.astype(key_dtype)

    pairs = (batch, heads, q_len, kv_len)
    seen = rng.random(pairs) < 0.7
    added = np.where(seen, rng.normal(size=pairs), -INF)
    masks = {
        "pairs": seen,
        "float": added.astype(np.float32),
        "float16": added[:1].astype(np.float16),
        "bfloat16": added[:, :1].astype(HALVES[1]),
    }
    biases = {
        "heads": rng.normal(size=(heads, q_len, kv_len)).astype(dtype),
        "float64": rng.normal(size=(batch, 1, q_len, 1)),
        "row": rng.normal(size=kv_len).astype(np.float16),
        "hiding": added[:, :1].astype(np.float32),
    }
    slopes = {"heads": rng.random(heads), "each": rng.random((batch, heads)).astype(np.float16)}
    sinks = rng.normal(size=heads)
    sinks = {"heads": sinks.astype(np.float32), "some": np.where(sinks > 0, -INF, sinks)}
    positional = case["is_causal"] or case["window"] or case["alibi_slopes"]
    offsets = {
        None: kv_len - q_len if positional and q_len != kv_len else None,
        "end": kv_len - q_len,
        "each": rng.integers(-q_len, kv_len + 2, batch),
    }
    lengths = {"one": kv_len // 2 + 1, "each": rng.integers(0, kv_len + 1, batch)}
    options = {
        "mask": masks.get(case["mask"]),
        "bias": biases.get(case["bias"]),
        "alibi_slopes": slopes.get(case["alibi_slopes"]),
        "sinks": sinks.get(case["sinks"]),
        "query_offset": offsets[case["query_offset"]],
        "kv_lengths": lengths.get(case["kv_lengths"]),
        **{name: case[name] for name in ("scale", "window", "softcap")},
    }
    options = {name: x for name, x in options.items() if x is not None}
    options["is_causal"] = case["is_causal"]
    first = rng.integers(-9, 9, batch) if case["key_offset"] == "each" else case["key_offset"]
    options["key_offset"] = first
    if "query_offset" in options:
        options["query_offset"] = options["query_offset"] + first
    if case["dropout_p"]:
        options |= {"dropout_p": case["dropout_p"], "seed": 2**63 + seed}
        options["head_offset"], options["batch_offset"] = case["counters"]
    return operands, options


@pytest.mark.promise("gpu-means-the-same")
def test_every_argument_with_every_other(pool_of_small_tiles):
    cases = enumerate(covering_cases(LEVELS))
    assert_all_within_gate(pool_of_small_tiles, [problem_of(case, n) for n, case in cases])


@pytest.mark.promise("gpu-means-the-same")
def test_gradients_of_every_argument_with_every_other(pool_of_small_tiles):
    cases = enumerate(covering_cases(GRADIENT_LEVELS))
    problems = [problem_of(case, n) for n, case in cases]
    assert_all_gradients_within_gate(pool_of_small_tiles, problems)


# --- Sizes and layouts ---------------------------------------------------------------------------

# (q_len, kv_len, head_dim, value_head_dim): both sides of a tile's edges, and of shared memory's.
SIZES = [(1, 1, 1, 1), (65, 33, 33, 65), (3, 70, 64, 130)]


@every_dtype
def test_sizes(pool, dtype):
    problems = [(make_problem(*size, heads=1, batch=(1,), dtype=dtype), {}) for size in SIZES]
    assert_all_within_gate(pool, problems)


@both_dtypes
def test_sizes_of_gradients(pool, dtype):
    problems = [(make_problem(*size, heads=1, batch=(1,), dtype=dtype), {}) for size in SIZES]
    assert_all_gradients_within_gate(pool, problems)


def test_more_keys_than_a_group_of_tiles(pool):
    operands = make_problem(2, 1100, 4, 3, heads=1, batch=(1,), mean=5.0)
    rising = np.linspace(-30, 30, 1100, dtype=np.float32)
    assert_all_within_gate(pool, [(operands, {}), (operands, {"bias": rising})])


@pytest.mark.parametrize("shape", [(), (2, 1, 1, 40)], ids=str)
def test_bias_is_summed_over_what_it_repeats(pool_of_small_tiles, shape):
    operands = make_problem(18, 40, 3, heads=2, batch=(2,), dtype=np.float64)
    options = {"bias": np.random.default_rng(0).normal(size=shape), "kv_lengths": [40, 5]}
    assert_all_gradients_within_gate(pool_of_small_tiles, [(operands, options)])


def test_windows_leave_out_tiles(pool_of_small_tiles):
    operands = make_problem(50, 70, 3, heads=1, batch=(1,))
    problems = [(operands, {"window": side, "query_offset": 10}) for side in ((5, 3), (None, 0))]
    assert_all_within_gate(pool_of_small_tiles, problems)
    assert_all_gradients_within_gate(pool_of_small_tiles, problems)


# --- Bits ----------------------------------------------------------------------------------------


def everything(pool, operands, options, **more):
    """Send a problem off to be simulated: out, lse and the gradients for grad_out = out."""
    return pool.submit(simt_calls.everything, operands, options, **more)


def assert_all_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.promise("gpu-bitwise")
def test_strides_change_no_bit(pool):
    query, key, value = make_problem(9, 40, 6, heads=2, batch=(1,), dtype=HALVES[0])
    key[...] = key[:, :1, :1]
    bias = np.random.default_rng(0).normal(size=(1, 2, 9, 40)).astype(HALVES[1])
    problem = (query, key, value), {"bias": bias}
    expected = everything(pool, *problem)
    again = everything(pool, *problem, other_strides=True)
    assert_all_same_bits(again.result(), expected.result())


@pytest.mark.promise("gpu-bitwise")
def test_other_rows_and_batch_elements_change_no_bit(pool):
    query, key, value = make_problem(70, 40, 6, 5, heads=1, batch=(2,))
    whole = everything(pool, (query, key, value), {"window": (9, 9), "query_offset": 0})
    part = everything(
        pool, (query[1:, :, 60:], key[1:], value[1:]), {"window": (9, 9), "query_offset": 60}
    )
    for a, b in zip(part.result()[:3], whole.result()[:3], strict=True):
        assert_same_bits(a, b[1:, :, 60:])


def test_the_simulators_own_order_of_threads(pool):
    operands = make_problem(3, 35, 4, heads=1, batch=(1,))
    options = {"mask": np.arange(35) % 3 > 0}
    unordered = pool.submit(simt_calls.attention, operands, options, threads=contextlib.nullcontext)
    assert_all_within_gate(pool, [(operands, options)])
    assert_within_gate(unordered.result(), *operands, **options)


@pytest.mark.promise("gpu-numbers-are-clamped")
def test_lengths_and_offsets_are_clamped(pool):
    operands = make_problem(5, 40, 4, heads=1, batch=(2,))
    beyond = {"kv_lengths": [-5, 10**12], "query_offset": [2**62, -(2**62)], "is_causal": True}
    within = {"kv_lengths": [0, 40], "query_offset": [2**61, -(2**61)], "is_causal": True}
    lengths = [{"kv_lengths": x["kv_lengths"]} for x in (beyond, within)]
    for a, b in ((beyond, within), lengths):
        given, clamped = (everything(pool, operands, options) for options in (a, b))
        assert_all_same_bits(given.result(), clamped.result())


# --- What is hidden, and what is seen ------------------------------------------------------------

HIDING = {
    "mask": {"mask": np.arange(40) < 20},
    "float mask": {"mask": np.where(np.arange(40) < 20, 0.5, -INF), "softcap": 2.0},
    "bias": {"bias": np.where(np.arange(40) < 20, 0.5, -INF).astype(np.float16)},
    "lengths": {"kv_lengths": [20, 20], "sinks": np.ones(1, np.float32)},
    "causal": {"is_causal": True, "query_offset": 11, "dropout_p": 0.2, "seed": 1},
}


@pytest.mark.promise("gpu-masked-pair-contributes-nothing")
@pytest.mark.parametrize("options", HIDING.values(), ids=list(HIDING))
def test_hidden_keys_may_hold_anything(pool, options):
    query, key, value = make_problem(9, 40, 6, heads=1, batch=(2,))
    expected = everything(pool, (query, key, value), options)
    key, value = key.copy(), value.copy()
    key[:, :, 20:30], key[:, :, 30:], value[:, :, 20:30], value[:, :, 30:] = NAN, INF, -INF, NAN
    result = everything(pool, (query, key, value), options).result()
    assert_all_same_bits(result, expected.result())
    dk, dv = result[3:5]
    assert not dk[:, :, 20:].any()
    assert not dv[:, :, 20:].any()


def test_rows_are_spoilt_by_what_they_see_alone(pool):
    query, key, value = make_problem(9, 40, 6, heads=1, batch=(1,))
    seen = np.random.default_rng(1).random((9, 40)) < 0.4
    expected = pool.submit(simt_calls.attention, (query, key, value), {"mask": seen})
    key, value = key.copy(), value.copy()  # those may still be on their way
    key[..., 3, 0], value[..., 35, :] = NAN, NAN
    spoilt = seen[:, 3] | seen[:, 35]
    assert 0 < spoilt.sum() < 9
    out, lse = pool.submit(simt_calls.attention, (query, key, value), {"mask": seen}).result()
    assert np.isnan(out[:, :, spoilt]).all()
    assert_array_equal(np.isnan(lse[0, 0]), seen[:, 3])
    assert_same_bits(out[:, :, ~spoilt], expected.result()[0][:, :, ~spoilt])
    assert_same_bits(lse[:, :, ~spoilt], expected.result()[1][:, :, ~spoilt])


def test_a_probability_of_0_hides_no_nan(pool):
    query, key, value = make_problem(2, 40, 6, heads=1, batch=(1,))
    value[..., 5, 2] = NAN
    low = np.where(np.arange(40) == 5, -1e4, 0).astype(np.float32)
    out, lse = pool.submit(simt_calls.attention, (query, key, value), {"bias": low}).result()
    assert_array_equal(np.isnan(out[0, 0]), [[False, False, True, False, False, False]] * 2)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("scores", [(INF, 1), (NAN, 1), (-INF, -INF), (NAN, NAN)], ids=str)
def test_scores_that_are_not_finite_make_rows_nan(pool, scores):
    query, value = np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 2, 1), np.float32)
    key = np.array(scores, np.float32).reshape(value.shape)
    for sinks in ({}, {"sinks": np.ones(1, np.float32)}):
        result = pool.submit(simt_calls.attention, (query, key, value), sinks).result()
        assert np.isnan(result[0]).all()
        assert np.isnan(result[1]).all()


@pytest.mark.promise("gpu-empty-row-is-zero")
def test_rows_that_see_nothing(pool):
    query, key, value = make_problem(9, 40, 6, heads=2, batch=(2,))
    mask = np.ones((9, 40), bool)
    mask[2] = False
    options = {"mask": mask, "kv_lengths": [0, 40], "sinks": np.zeros(2, np.float32)}
    expected = everything(pool, (query, key, value), options)
    query = query.copy()
    query[0], query[1, :, 2] = NAN, NAN
    result = everything(pool, (query, key, value), options).result()
    assert_all_same_bits(result, expected.result())
    out, lse, dq = result[:3]
    for x, empty in ((out, 0), (lse, -INF), (dq, 0)):
        assert (x[0] == empty).all()
        assert (x[1, :, 2] == empty).all()
    assert np.isfinite(np.delete(lse[1], 2, axis=1)).all()


def test_no_keys(pool):
    query, key, value = make_problem(3, 0, 4, heads=1, batch=(1,))
    out, lse, dq, dk, _ = everything(pool, (query, key, value), {}).result()
    assert not out.any()
    assert (lse == -INF).all()
    assert not dq.any()
    assert dk.size == 0


def test_dropping_everything(pool):
    operands = make_problem(3, 40, 4, heads=1, batch=(1,))
    options = {"dropout_p": 1.0, "seed": 3}
    out, lse, *grads = everything(pool, operands, options).result()
    assert_within_gate((out, lse), *operands, **options)
    assert not np.any([out.any(), *(x.any() for x in grads)])


def test_sinks_far_from_the_scores(pool_of_small_tiles):
    operands = make_problem(3, 5, 4, heads=5, batch=(1,))
    options = {"sinks": np.array([-INF, -1000, 30, 100, 1000])}
    out, lse = pool_of_small_tiles.submit(simt_calls.attention, operands, options).result()
    assert_within_gate((out, lse), *operands, **options)
    rng = np.random.default_rng(1)
    grad_out, grad_lse = (rng.normal(size=x.shape).astype(np.float32) for x in (out, lse))
    for given in (None, grad_lse):
        got = pool_of_small_tiles.submit(
            simt_calls.attention_backward, grad_out, operands, out, lse, options, given
        )
        expected = reference.attention_backward(
            grad_out, *operands, out, lse, grad_lse=given, return_dsinks=True, **options
        )
        for a, b in zip(got.result(), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# --- Rows computed anew --------------------------------------------------------------------------


def test_flagged_rows_that_are_not_finite_are_computed_anew(pool):
    operands = make_problem(140, 3, 2, 35, heads=1, batch=(1,))
    expected, expected_lse = pool.submit(simt_calls.attention, operands, {}).result()
    out, lse = np.full_like(expected, 7), np.full_like(expected_lse, 7)
    rows = [3, 63, 70, 130]
    for row, x in zip(rows, (NAN, INF, -INF, NAN), strict=True):
        out[0, 0, row, row % 35] = x
    flags = np.zeros((1, 1, 9), np.int32)  # of 16 rows each
    flags[0, 0, [3, 8]] = 1  # in the first tile of 64 rows and in the last
    result, result_lse = pool.submit(
        simt_calls.attention, operands, {}, out, lse, flags, rows_per_flag=16
    ).result()
    anew = [3, 63, 130]
    out[:, :, anew], lse[:, :, anew] = expected[:, :, anew], expected_lse[:, :, anew]
    assert_same_bits(result, out)
    assert_same_bits(result_lse, lse)


def test_flagged_gradients_that_are_not_finite_are_computed_anew(pool):
    operands = make_problem(70, 70, 2, 3, heads=1, batch=(1,))
    out, lse = fastattn.attention(*operands, return_lse=True)
    problem = out, operands, out, lse, {}
    expected = pool.submit(simt_calls.attention_backward, *problem).result()
    given = [np.full_like(x, 7) for x in expected]
    for x, rows in zip(given, ([3, 65], [4, 40], [5, 41]), strict=True):
        x[:, :, rows, 1] = NAN
    flags = np.array([[[1, 0, 0, 0, 0]]], np.int32)  # of 16 rows each
    key_flags = np.array([[[0, 0, 1, 0, 0]]], np.int32)  # in the second tile of 32 keys
    result = pool.submit(
        simt_calls.attention_backward,
        *problem,
        given=given,
        flags=(flags, key_flags),
        rows_per_flag=16,
    ).result()
    for x, row, anew in zip(given, (3, 40, 41), expected, strict=True):
        x[:, :, row] = anew[:, :, row]
    assert_all_same_bits(result, given)


# --- Machine code --------------------------------------------------------------------------------

EVERY_ARGUMENT = {
    "mask": "bool",
    "bias": "bfloat16",
    "alibi_slopes": "float16",
    "softcap": True,
    "dropout": True,
    "lengths": True,
    "offsets": True,
    "key_offsets": True,
}
SHARED_BYTES = 48 * 1024  # that a block may have without asking for more


def built(kernel, record_property):
    """Compile for sm_75 and assemble it for that and later GPUs; return the PTX."""
    from fastattn.cuda import _build

    with _build._compiler() as cuda, _build._compiling_for((7, 5)):
        ptx, _ = cuda.compile(
            kernel.function,
            kernel.signature,
            device=False,
            cc=(7, 5),
            abi="numba",
            abi_info={"abi_name": kernel.name},
            launch_bounds=(kernel.threads, kernel.blocks_per_sm),
        )
    for architecture in ("sm_75", "sm_90"):
        cubin, log = _build.assemble(ptx, architecture)
        assert cubin
        report = _build.report(log)
        record_property(f"{kernel.name} {architecture}", report)
        assert report["static_shared_bytes"] <= SHARED_BYTES
    return ptx


GIVEN = {
    "float16": EVERY_ARGUMENT | {"mask": "float64"},
    "bfloat16": EVERY_ARGUMENT,
    "float32": {},
    "float64": EVERY_ARGUMENT | {"bias": "float64"},
}


@pytest.mark.parametrize(
    ("dtype", "part"),
    [(dtype, "forward") for dtype in GIVEN]
    + [
        (dtype, part) for dtype in ("float16", "float32", "float64") for part in ("dq", "dk and dv")
    ],
)
def test_kernels_compile(dtype, part, record_property):
    from fastattn.cuda.kernels import simt, simt_backward, simt_tiles

    given = simt_tiles.Given(dtype, dtype, **GIVEN[dtype])
    anew = {"flags": bool(GIVEN[dtype])}
    if part == "forward":
        kernel = simt.forward(given, 64, sinks="float64" if GIVEN[dtype] else None, **anew)
    elif part == "dq":
        kernel = simt_backward.query_gradient(given, 64, **anew)
    else:
        kernel = simt_backward.key_value_gradients(given, 64, 64, **anew)
    # Local arrays have become registers: NVVM has unrolled all loops over them.
    assert ".local" not in built(kernel, record_property)


def test_smaller_kernels_compile(record_property):
    from fastattn.cuda.kernels import simt, simt_backward, simt_tiles

    beside = simt_tiles.Given("float32", "bfloat16", **EVERY_ARGUMENT)
    for kernel in (
        simt.forward(simt_tiles.Given("float32", "bfloat16"), 32, lse=False),
        simt_backward.prepare("float16", sinks="bfloat16", grad_lse=True, dsinks=True),
        simt_backward.prepare("float64"),
        simt_backward.sinks_gradient("float16", "float64"),
        simt_backward.bias_gradient(beside),
    ):
        assert ".local" not in built(kernel, record_property)


def test_large_head_dims_compile(record_property):
    from fastattn.cuda.kernels import simt, simt_tiles

    ptx = built(simt.forward(simt_tiles.Given("float32", "float32"), 128), record_property)
    assert ".local" not in ptx
    assert spilled(ptx, "sm_80") == 0
    built(simt.forward(simt_tiles.Given("float32", "float32"), 300), record_property)
