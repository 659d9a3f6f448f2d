# SPDX-License-Identifier: Apache-2.0
"""The algorithms, on ranks that are threads: every case against one process."""

import ml_dtypes
import numpy as np
import pytest

import fastattn
import fastattn.distributed as fd
from fastattn.distributed._engine import Peers
from tests.distributed.cases import LAYOUTS, OPTIONS, Case, joined, worst
from tests.distributed.threads import World

TOTAL = 101
METHODS = ("ring", "gather", "heads")
SIZES = (1, 2, 3, 4)
DOCUMENTS = np.array([0, 13, 14, 14, 60, TOTAL])


def over_ranks(case, ranks, layout, kv_layout=None, **how):
    parts = World(ranks).run(lambda comm: case.rank(comm, layout, kv_layout, **how))
    return joined(parts, layout, kv_layout)


def assert_close(got, expected, tolerance=3e-6):
    errors = worst(got, expected)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.promise("ranks-are-one-process", "gather-and-heads-have-one-process-s-bits")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_process(method, name, options):
    case = Case(options, TOTAL)
    expected = case.one_process()
    for ranks in SIZES:
        layout = LAYOUTS[name](TOTAL, ranks)
        got = over_ranks(case, ranks, layout, method=method)
        assert_close(got, expected)
        if method != "ring":
            for x, y in zip(got[:2], expected[:2], strict=True):
                np.testing.assert_array_equal(x, y)
        if method == "heads" and ranks <= 2:  # as many as there are key heads
            for x, y in zip(got[2:5], expected[2:5], strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.promise("ranks-are-one-process")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, *(OPTIONS[name] for name in ("causal", "causal window", "alibi", "sinks", "dropout"))],
    ids=["full", "causal", "causal window", "alibi", "sinks", "dropout"],
)
def test_documents(method, options):
    case = Case(options, TOTAL, batch=(1,), documents=DOCUMENTS)
    expected = case.one_process()
    for ranks in SIZES:
        for layout_of in LAYOUTS.values():
            layout = layout_of(TOTAL, ranks)
            assert_close(over_ranks(case, ranks, layout, method=method), expected)


@pytest.mark.promise("ranks-are-one-process")
@pytest.mark.parametrize("method", METHODS)
def test_masks_and_biases(method):
    rng = np.random.default_rng(1)
    seen = rng.random((2, 1, TOTAL, TOTAL)) < 0.7
    of_keys = rng.random((2, 1, 1, TOTAL)) < 0.7
    bias = rng.standard_normal((4, TOTAL, TOTAL), np.float32)
    for options in (
        {"mask": seen},
        {"mask": of_keys},
        {"bias": bias},
        {"mask": of_keys, "bias": bias, "is_causal": True},
        {"mask": of_keys[0, 0, 0]},
    ):
        case = Case(options, TOTAL)
        expected = case.one_process()
        for ranks in (1, 3, 4):
            layout = fd.zigzag(TOTAL, ranks)
            assert_close(over_ranks(case, ranks, layout, method=method), expected)


@pytest.mark.parametrize("method", METHODS)
def test_other_lengths_of_keys(method):
    for options in (
        {},
        {"is_causal": True, "query_offset": 30},
        {"window": (9, 3), "query_offset": -5},
    ):
        case = Case(options, TOTAL, 150)
        expected = case.one_process()
        for ranks in SIZES:
            layout, kv_layout = fd.zigzag(TOTAL, ranks), LAYOUTS["uneven"](150, ranks)
            assert_close(over_ranks(case, ranks, layout, kv_layout, method=method), expected)


@pytest.mark.promise("ranks-are-one-process")
@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_ranks(method):
    case = Case({"is_causal": True}, 2)
    expected = case.one_process()
    for layout_of in (fd.contiguous, fd.zigzag):
        assert_close(over_ranks(case, 4, layout_of(2, 4), method=method), expected)
    assert_close(
        over_ranks(Case({}, 0), 3, fd.contiguous(0, 3), method=method), Case({}, 0).one_process()
    )


@pytest.mark.parametrize("method", METHODS)
def test_float64_and_heads_of_two_kinds(method):
    for how in (
        {"dtype": np.float64},
        {"kv_heads": 1},
        {"kv_heads": 4},
        {"batch": ()},
        {"batch": (2, 1)},
    ):
        case = Case({"is_causal": True}, TOTAL, **how)
        expected = case.one_process()
        for ranks in (2, 3, 4):
            layout = fd.zigzag(TOTAL, ranks)
            assert_close(over_ranks(case, ranks, layout, method=method), expected)


@pytest.mark.promise("ranks-round-once")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_rounded_once(dtype, method):
    """32 ranks have no more error than one call has."""
    case = Case({"is_causal": True}, 256, batch=(1,), dtype=dtype)
    operands = [x.astype(np.float32) for x in (case.query, case.key, case.value)]
    out, lse = fastattn.attention(*operands, is_causal=True, return_lse=True)
    grad_out = case.grad_out.astype(np.float32)
    exact = (
        out,
        lse,
        *fastattn.attention_backward(
            grad_out, *operands, out, lse, grad_lse=case.grad_lse, is_causal=True
        ),
    )
    alone = case.one_process()
    ranks = 32 if method != "heads" else 4
    got = over_ranks(case, ranks, fd.zigzag(256, ranks), method=method)
    for x, one, truth in zip(got, alone, exact, strict=True):
        assert x.dtype == one.dtype
        errors = [np.square(y.astype(np.float64) - truth).mean() ** 0.5 for y in (x, one)]
        assert errors[0] <= 1.25 * errors[1] + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_what_is_not_seen(method):
    case = Case({"is_causal": True, "kv_lengths": 80}, TOTAL)
    expected = case.one_process()
    case.key[..., 80:, :] = np.nan
    case.value[..., 80:, :] = np.inf
    case.grad_lse[...] = 0
    layout = fd.zigzag(TOTAL, 3)
    out, lse = over_ranks(case, 3, layout, method=method, backward=False)
    assert_close((out, lse), expected[:2])


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_what_is_seen(method):
    case = Case({"is_causal": True}, TOTAL)
    case.value[0, 0, 50] = np.nan
    layout = fd.contiguous(TOTAL, 3)
    out, _ = over_ranks(case, 3, layout, method=method, backward=False)
    assert np.isnan(out[0, :2, 50:]).all()
    assert np.isfinite(out[0, :2, :50]).all()
    assert np.isfinite(out[0, 2:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_see_nothing(method):
    mask = np.ones((TOTAL, TOTAL), bool)
    mask[7:60] = False
    case = Case({"mask": mask, "sinks": np.zeros(4, np.float32)}, TOTAL)
    layout = fd.zigzag(TOTAL, 3)
    got = over_ranks(case, 3, layout, method=method)
    assert (got[0][..., 7:60, :] == 0).all()
    assert (got[1][..., 7:60] == -np.inf).all()
    assert (got[2][..., 7:60, :] == 0).all()
    assert_close(got, case.one_process())


def test_a_ring_is_repeatable():
    case = Case({"is_causal": True}, 600)
    layout = fd.zigzag(600, 4)
    first = over_ranks(case, 4, layout)
    for _ in range(5):
        for x, y in zip(over_ranks(case, 4, layout), first, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.promise("gather-and-heads-have-one-process-s-bits")
def test_a_gather_has_the_bits_of_few_rows():
    """Ranks with fewer than 17 rows, a form of its own, have the bits of one process too."""
    for total in (5, 16, 40):
        case = Case({"is_causal": True}, total)
        for ranks in (2, 4):
            layout = fd.zigzag(total, ranks)
            got = over_ranks(case, ranks, layout, method="gather", backward=False)
            for x, y in zip(got, case.one_process(), strict=False):
                np.testing.assert_array_equal(x, y)


def test_more_queries_than_one_call_takes():
    case = Case({"is_causal": True}, 5000, batch=(1,))
    assert_close(over_ranks(case, 2, fd.contiguous(5000, 2)), case.one_process())


@pytest.mark.promise("windows-need-neighbours")
@pytest.mark.parametrize(
    ("options", "layout_of", "neighbours"),
    [
        ({"is_causal": True, "window": (20, None)}, fd.contiguous, lambda a, b: b - a == 1),
        ({"window": (20, 20)}, fd.contiguous, lambda a, b: abs(b - a) == 1),
        ({"is_causal": True}, fd.contiguous, lambda a, b: a < b),
        ({"is_causal": True}, fd.zigzag, lambda a, b: (b - a) % 8 == 1),
        ({}, fd.contiguous, lambda a, b: (b - a) % 8 == 1),
    ],
    ids=["causal window", "window", "causal contiguous", "causal zigzag", "full"],
)
def test_who_sends_keys_to_whom(options, layout_of, neighbours):
    case, world, layout = Case(options, 800), World(8), layout_of(800, 8)
    keys = set()
    start = Peers.start

    def started(self, step, sends=(), receives=(), tag=0):
        if "agreeing" not in step:
            keys.update((self.rank, to) for to, _ in sends)
        return start(self, step, sends, receives, tag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peers, "start", started)
        parts = world.run(lambda comm: case.rank(comm, layout, backward=False))
    assert_close(joined(parts, layout), case.one_process()[:2])
    assert keys == {(a, b) for a in range(8) for b in range(8) if a != b and neighbours(a, b)}


def test_out_and_tensors(torch):
    case, layout = Case({"is_causal": True}, TOTAL), fd.contiguous(TOTAL, 2)
    expected = case.one_process()[0]

    def rank(comm):
        operands = [layout.take(x, comm.rank) for x in (case.query, case.key, case.value)]
        how = {"comm": comm, "layout": layout, "is_causal": True}
        out = np.empty((2, 4, layout.lengths[comm.rank], 24), np.float32)
        assert fd.attention(*operands, out=out, **how) is out
        tensor = fd.attention(*map(torch.from_numpy, operands), **how)
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_array_equal(tensor.numpy(), out)
        return out

    np.testing.assert_allclose(layout.join(World(2).run(rank)), expected, rtol=0, atol=1e-6)
