# SPDX-License-Identifier: Apache-2.0
"""What is true of attention for any input: hypothesis looks for one of which it is not.

Shapes are drawn around the edges of the tiles; tests/attention/test_attention.py says where they
are. Two correct results may differ by Problem.tolerance: the accuracy gate compares largest errors,
which needs many numbers.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import fastattn
from fastattn import _core, attention, merge
from tests.support.correctness import assert_same_bits, truth_of
from tests.support.problems import DTYPES, make_problem

pytestmark = pytest.mark.usefixtures("isa")

LENGTHS = (1, 2, 11, 12, 13, 24, 25, 48, 49, 99, 127, 128, 129, 259)
HEAD_DIMS = (1, 7, 8, 64, 80, 128, 256)


@dataclasses.dataclass
class Problem:
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    options: dict

    @property
    def operands(self):
        return self.query, self.key, self.value

    @property
    def tolerance(self):
        size = max(1.0, np.abs(self.value).max(initial=0))
        return 64 * np.finfo(self.query.dtype).eps * size

    def attend(self, **changes):
        operands = [changes.pop(name, getattr(self, name)) for name in ("query", "key", "value")]
        return attention(*operands, return_lse=True, **(self.options | changes))


@st.composite
def problems(draw, q_len=None, mask=True):
    """Draw a problem with up to three options; mask=False: no mask and nothing positional."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    q_len = draw(st.sampled_from(LENGTHS[:-4])) if q_len is None else q_len
    kv_len = draw(st.sampled_from(LENGTHS))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    operands = make_problem(
        q_len,
        kv_len,
        draw(st.sampled_from(HEAD_DIMS)),
        draw(st.sampled_from(HEAD_DIMS[:4])),
        heads=heads,
        kv_heads=kv_heads,
        batch=batch,
        dtype=draw(st.sampled_from(DTYPES)),
        mean=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = (*batch, heads, q_len, kv_len)
    features = {
        "scale": 0.3,
        "softcap": 3.0,
        "sinks": rng.normal(size=heads),
        "bias": rng.normal(size=(heads, q_len, kv_len)),
    }
    if mask:
        features |= {
            "mask": rng.random(pairs) < rng.random(),
            "is_causal": True,
            "window": (int(rng.integers(0, kv_len + 1)), int(rng.integers(0, 9))),
            "alibi_slopes": rng.random(heads),
            "kv_lengths": rng.integers(0, kv_len + 1, batch),
        }
    chosen = draw(st.sets(st.sampled_from(sorted(features)), max_size=3))
    options = {name: features[name] for name in chosen}
    options["query_offset"] = int(rng.integers(-q_len, kv_len + 1))
    return Problem(*operands, options)


@pytest.mark.promise("result-is-the-definition")
@given(problems())
def test_the_definition(problem):
    truth = truth_of(*problem.operands, **problem.options)
    for got, expected in zip(problem.attend(), truth, strict=True):
        assert_allclose(got, expected, atol=problem.tolerance, rtol=64 * np.finfo(got.dtype).eps)


@pytest.mark.promise("result-is-the-definition", "dropout-scales-what-stays", "lse-is-over-keys")
@given(problems(), st.floats(0, 0.75), st.integers(0, 2**64 - 1))
def test_the_definition_with_dropout(problem, dropout_p, seed):
    dropout = {"dropout_p": dropout_p, "seed": seed}
    out, lse = problem.attend(**dropout)
    truth, _ = truth_of(*problem.operands, **problem.options, **dropout)
    eps = np.finfo(out.dtype).eps
    assert_allclose(out, truth, atol=4 * problem.tolerance, rtol=64 * eps)
    assert_same_bits(lse, problem.attend()[1])


@given(problems(mask=False), st.integers(0, 2**32 - 1))
def test_order_of_the_keys(problem, seed):
    order = np.random.default_rng(seed).permutation(problem.key.shape[-2])
    changes = {"key": problem.key[..., order, :], "value": problem.value[..., order, :]}
    if "bias" in problem.options:
        changes["bias"] = problem.options["bias"][..., order]
    for got, expected in zip(problem.attend(**changes), problem.attend(), strict=True):
        assert_allclose(got, expected, atol=problem.tolerance, rtol=64 * np.finfo(got.dtype).eps)


@given(problems(mask=False), st.integers(0, 2**32 - 1))
def test_order_of_the_queries(problem, seed):
    order = np.random.default_rng(seed).permutation(problem.query.shape[-2])
    changes = {"query": problem.query[..., order, :]}
    if "bias" in problem.options:
        changes["bias"] = problem.options["bias"][..., order, :]
    out, lse = problem.attend()
    assert_same_bits(problem.attend(**changes), (out[..., order, :], lse[..., order]))


@pytest.mark.promise("bitwise-batch-neighbours")
@given(problems(), st.data())
def test_a_batch_element_alone(problem, data):
    if len(problem.query.shape) < 4:
        return
    index = data.draw(st.integers(0, problem.query.shape[0] - 1))
    own = {
        name: problem.options[name][index] for name in {"mask", "kv_lengths"} & {*problem.options}
    }
    alone = Problem(*[x[index] for x in problem.operands], problem.options | own)
    assert_same_bits(alone.attend(), tuple(x[index] for x in problem.attend()))


@pytest.mark.promise("float-mask-is-added")
@given(problems(), st.floats(-8, 8))
def test_a_constant_in_the_mask(problem, constant):
    """Added to each score of a row, it adds to lse and leaves out alone."""
    if isinstance(problem.options.get("mask"), np.ndarray):
        problem.options["mask"] = np.where(problem.options["mask"], 0, -np.inf)
    problem.options.pop("sinks", None)
    out, lse = problem.attend()
    shifted = np.asarray(problem.options.get("mask", 0.0)) + constant
    moved, moved_lse = problem.attend(mask=shifted)
    eps = np.finfo(out.dtype).eps
    score = 64 * eps * (16 + np.abs(lse[np.isfinite(lse)]).max(initial=0))
    assert_allclose(moved, out, atol=score * max(1, np.abs(problem.value).max()))
    assert_allclose(moved_lse, lse + constant, atol=score)


@given(problems())
def test_a_result_is_between_its_values(problem):
    problem.options.pop("sinks", None)
    out, lse = problem.attend()
    slack = problem.tolerance
    seen = np.isfinite(lse)[..., None]
    group = problem.query.shape[-3] // problem.key.shape[-3]
    low = problem.value.min(axis=-2, keepdims=True).repeat(group, axis=-3) - slack
    high = problem.value.max(axis=-2, keepdims=True).repeat(group, axis=-3) + slack
    assert ((low <= out) | ~seen).all()
    assert ((out <= high) | ~seen).all()
    ones, _ = problem.attend(value=np.ones_like(problem.value))
    assert_allclose(ones, np.broadcast_to(seen, ones.shape), atol=problem.tolerance)


@given(problems(), st.floats(-4, 4), st.integers(0, 2**32 - 1))
def test_linear_in_the_values(problem, factor, seed):
    other = np.random.default_rng(seed).normal(size=problem.value.shape)
    other = other.astype(problem.value.dtype)
    mixed, _ = problem.attend(value=problem.value + problem.value.dtype.type(factor) * other)
    apart = problem.attend()[0] + factor * problem.attend(value=other)[0]
    assert_allclose(mixed, apart, atol=8 * problem.tolerance)


@pytest.mark.promise("weights-are-the-definition")
@given(problems())
def test_identity_as_values_gives_the_weights(problem):
    kv_len = problem.key.shape[-2]
    eye = np.eye(kv_len, dtype=problem.key.dtype)
    out, _ = problem.attend(value=np.broadcast_to(eye, (*problem.key.shape[:-1], kv_len)))
    probs = fastattn.attention_weights(problem.query, problem.key, **problem.options)
    assert_allclose(out, probs, atol=problem.tolerance)


@pytest.mark.promise("merge-is-the-whole", "sinks-join-the-denominator")
@given(problems(mask=False), st.lists(st.integers(0, 259), max_size=4), st.randoms())
def test_split_and_merge(problem, cuts, random):
    sinks = problem.options.pop("sinks", None)
    kv_len = problem.key.shape[-2]
    bias = problem.options.get("bias", np.zeros((1, kv_len)))
    edges = [0, *sorted(min(cut, kv_len) for cut in cuts), kv_len]
    parts = [
        problem.attend(
            key=problem.key[..., begin:end, :],
            value=problem.value[..., begin:end, :],
            bias=bias[..., begin:end],
        )
        for begin, end in itertools.pairwise(edges)
    ]
    random.shuffle(parts)
    out, lse = merge(*parts, sinks=sinks)
    whole, whole_lse = problem.attend(sinks=sinks)
    assert_allclose(out, whole, atol=problem.tolerance)
    assert_allclose(lse, whole_lse, atol=problem.tolerance, rtol=1e-5)


@pytest.mark.promise("masked-pair-contributes-nothing", "causal-sees-up-to-its-position")
@given(problems(), st.data(), st.sampled_from([np.nan, np.inf, 1e30]))
def test_the_future_changes_no_bit(problem, data, poison):
    problem.options["is_causal"] = True
    q_len, kv_len = problem.query.shape[-2], problem.key.shape[-2]
    cut = data.draw(st.integers(0, kv_len - 1))
    expected = problem.attend()
    earlier = np.arange(q_len) + problem.options["query_offset"] < cut
    for name in ("key", "value"):
        changed = getattr(problem, name).copy()
        changed[..., cut:, :] = poison
        out, lse = problem.attend(**{name: changed})
        assert_same_bits(out[..., earlier, :], expected[0][..., earlier, :])
        assert_same_bits(lse[..., earlier], expected[1][..., earlier])


@pytest.mark.promise("heads-share-keys-in-groups")
@given(problems())
def test_a_group_is_repeated_heads(problem):
    """The very bits, where a head alone and a group of them take the same form."""
    group = problem.query.shape[-3] // problem.key.shape[-3]
    key, value = (x.repeat(group, axis=-3) for x in (problem.key, problem.value))
    repeated = problem.attend(key=key, value=value)
    if problem.query.shape[-2] > 16:
        assert_same_bits(repeated, problem.attend())
    else:
        assert_allclose(repeated[0], problem.attend()[0], atol=problem.tolerance)


@given(problems(), st.floats(-3, 3))
def test_scale_is_a_factor_of_the_query(problem, scale):
    scaled = problem.query * problem.query.dtype.type(scale)
    assert_allclose(
        problem.attend(query=scaled, scale=1.0)[0],
        problem.attend(scale=float(problem.query.dtype.type(scale)))[0],
        atol=64 * problem.tolerance,  # a score rounds in proportion to its size
    )


@given(problems())
def test_equal_keys_give_the_mean(problem):
    problem.options = {}
    key = np.broadcast_to(problem.key[..., :1, :], problem.key.shape)
    out, _ = problem.attend(key=key)
    group = problem.query.shape[-3] // problem.key.shape[-3]
    mean = problem.value.astype(float).mean(axis=-2, keepdims=True).repeat(group, axis=-3)
    assert_allclose(out, np.broadcast_to(mean, out.shape), atol=problem.tolerance)


@pytest.mark.promise("short-chunks-within-gate")
@given(problems())
def test_the_last_query_alone(problem):
    """A step of decoding is the last row of the whole."""
    whole, whole_lse = problem.attend()
    last = {"query": problem.query[..., -1:, :]}
    last["query_offset"] = problem.options["query_offset"] + problem.query.shape[-2] - 1
    for name in {"mask", "bias"} & {*problem.options}:
        last[name] = problem.options[name][..., -1:, :]
    out, lse = problem.attend(**last)
    assert_allclose(out, whole[..., -1:, :], atol=problem.tolerance)
    assert_allclose(lse, whole_lse[..., -1:], atol=problem.tolerance, rtol=1e-5)


@pytest.mark.promise("instruction-sets-agree")
@given(problems())
def test_variants_agree(problem):
    usual = _core.isa()
    try:
        _core.set_isa("generic")
        generic, generic_lse = problem.attend()
    finally:
        _core.set_isa(usual)
    out, lse = problem.attend()
    assert_allclose(out, generic, atol=problem.tolerance)
    assert_allclose(lse, generic_lse, atol=problem.tolerance, rtol=1e-5)


@pytest.mark.promise("bitwise-query-chunks", "bitwise-threads")
@settings(max_examples=20)
@given(problems(q_len=99), st.integers(17, 82), st.integers(1, 7))
def test_chunks_and_threads_change_no_bit(problem, cut, count):
    usual = fastattn.get_num_threads()
    expected = problem.attend()
    try:
        fastattn.set_num_threads(count)
        for rows in (slice(None, cut), slice(cut, None)):
            part = {
                name: problem.options[name][..., rows, :]
                for name in {"mask", "bias"} & {*problem.options}
            }
            part["query_offset"] = problem.options["query_offset"] + (rows.start or 0)
            got = problem.attend(query=problem.query[..., rows, :], **part)
            assert_same_bits(got, (expected[0][..., rows, :], expected[1][..., rows]))
    finally:
        fastattn.set_num_threads(usual)
