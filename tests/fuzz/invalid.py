# SPDX-License-Identifier: Apache-2.0
"""Calls that break one rule: they raise TypeError or ValueError, and change nothing.

A valid problem is drawn, and one of its arguments made wrong. Each fault is a function of what is
right, which returns the changed arguments, or None where it would not be wrong.
"""
# ruff: noqa: E501 - the tables have a line per case

import copy
import io

import numpy as np

import fastattn
from tests.fuzz import problem
from tests.fuzz.compare import same
from tests.fuzz.problem import Problem, chance, choice, number

NAN, INF = np.nan, np.inf
CALLS = (*("attention",) * 4, *("varlen", "backward", "merge", "cache", "explain"))
NO_NUMBERS = (NAN, INF, -INF, "1", True, 1j, [1.0])
NO_INTEGERS = (1.5, "1", True, [1], 1j)
NO_FLAGS = (1, 0, "yes", None, [True])


def draw(rng):
    """Draw a problem, the call that it is for, and a number that says what is wrong."""
    spec = problem.draw(rng, dropout=False)
    while spec["q_len"] * spec["kv_len"] > 10_000 or not spec["q_len"] or not spec["kv_len"]:
        spec["q_len"], spec["kv_len"] = (choice(rng, (1, 2, 17, 40)) for _ in range(2))
    spec["call"] = choice(rng, CALLS)
    spec["wrong"] = number(rng)
    spec["out"] = chance(rng, 0.7)
    return spec


class Right:
    """The arguments of a call that is right, by name; and what the faults need to know."""

    def __init__(self, p, rng):
        self.p, self.rng = p, rng
        self.given = dict(zip(("query", "key", "value"), p.operands, strict=True)) | p.options
        query, key, value = p.operands
        self.shape = (*np.shape(fastattn.attention(query, key, value, **p.options)),)
        self.batch, (self.heads, self.q_len, self.kv_len) = p.batch, p.pairs[-3:]

    def one(self, *values):
        """Return one of the values."""
        return choice(self.rng, values)

    def operand(self):
        """Return the name of an operand and the array."""
        name = self.one("query", "key", "value")
        return name, self.given[name]


def resized(axis, by):
    """Return a fault: an operand with more along an axis."""

    def fault(r):
        name, x = r.operand()
        if x.ndim < -axis or (axis == -2 and name == "query") or (axis == -1 and name == "value"):
            return None
        if not x.shape[axis]:
            return None
        return {name: np.concatenate([x, np.take(x, [0] * by, axis)], axis)}

    return fault


def operand_is(make):
    """Return a fault: an operand made something else, which may be no fault (None)."""

    def fault(r):
        name, x = r.operand()
        other = make(x)
        return None if other is None else {name: other}

    return fault


def option_is(name, *values):
    """Return a fault: an option with one of the values, each of which is wrong."""
    return lambda r: {name: r.one(*values)}


def heads_apart(r):
    """Let the query heads be no multiple of the key heads."""
    query = r.given["query"]
    kv_heads = r.given["key"].shape[-3] if r.given["key"].ndim > 2 else 1
    heads = query.shape[-3] if query.ndim > 2 else 1
    if kv_heads < 2 or not heads:
        return None
    extra = np.concatenate([query, query[..., :1, :, :]], axis=-3)
    return {"query": extra}


def batch_apart(r):
    """Give an operand batch axes that do not broadcast."""
    name, x = r.operand()
    others = (
        y for other, y in r.given.items() if other in ("query", "key", "value") and y is not x
    )
    whole = any(y.ndim >= 4 and y.shape[-4] == r.batch[-1] for y in others)
    if x.ndim < 4 or r.batch[-1] in (0, 1) or not whole:
        return None
    return {name: np.zeros((*x.shape[:-4], r.batch[-1] + 1, *x.shape[-3:]), x.dtype)}


def pairs_apart(r):
    """Give a mask or bias that does not broadcast."""
    name = r.one("mask", "bias")
    wrong = r.one((r.q_len, r.kv_len + 1), (r.q_len + 1, r.kv_len), (r.kv_len + 2,), (1,) * 9)
    whole = (r.q_len, r.kv_len)[-len(wrong) :]
    if len(wrong) < 9 and all(n in (1, m) for n, m in zip(wrong, whole, strict=True)):
        return None
    return {name: np.zeros(wrong, np.float32)}


def pairs_dtype(r):
    """Give a mask or bias of a dtype that it cannot have."""
    name = r.one("mask", "bias")
    dtype = r.one(
        np.int32, np.uint8, np.complex64, "U3", object, *((bool,) if name == "bias" else ())
    )
    return {name: np.zeros((r.q_len, r.kv_len), dtype)}


def offset_wrong(r):
    """Give a query_offset that is none."""
    return {
        "query_offset": r.one(
            1.5, "2", True, 2**62, -(2**62), np.zeros((5, 5, 5, 5), int), np.zeros(r.batch), 1j
        )
    }


def more_offsets_wrong(r):
    """Give a key_offset, or what dropout counts from, that is none."""
    name = r.one("key_offset", "head_offset", "batch_offset")
    wrong = r.one(1.5, "2", True, None, 2**62, -(2**62), np.zeros((5, 5, 5, 5), int), 1j)
    return {name: wrong}


def offset_missing(r):
    """Leave out query_offset where a positional option needs it."""
    if r.q_len == r.kv_len:
        return None
    return {"query_offset": None, "is_causal": True}


def lengths_wrong(r):
    """Give kv_lengths that are none."""
    return (
        {
            "kv_lengths": r.one(
                -1,
                r.kv_len + 1,
                1.0,
                "3",
                True,
                np.zeros((5, 5, 5, 5), int),
                np.full(r.batch, -1),
                np.zeros(r.batch, bool),
            )
        }
        if 0 not in r.batch
        else None
    )


def per_head_wrong(r):
    """Give sinks or slopes that are none."""
    name = r.one("sinks", "alibi_slopes")
    heads = r.heads
    values = [
        np.zeros(heads + 1),
        np.zeros((heads, 3, 3, 3)),
        np.zeros(heads, int),
        "a",
        np.zeros(heads, bool),
    ]
    if heads:
        values += [np.full(heads, NAN), np.full(heads, INF)]
        values += [np.full(heads, -INF)] if name == "alibi_slopes" else []
    given = {name: r.one(*values)}
    return given | ({"query_offset": 0} if name == "alibi_slopes" else {})


def out_wrong(r):
    """Give an out that cannot be written to."""
    dtype, shape = r.p.dtype, r.shape
    right = np.zeros(shape, dtype)
    fixed = right.copy()
    fixed.flags.writeable = False
    other = np.float64 if dtype != np.float64 else np.float32
    values = [
        np.zeros((*shape, 1), dtype),
        right.astype(other),
        right.tolist(),
        right.astype(int),
        "a",
    ]
    if right.size:
        values += [fixed]
        if shape[-1] > 1:
            values += [np.zeros((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]]
        if shape[-2] > 1:
            once = np.zeros((*shape[:-2], 1, shape[-1]), dtype)
            values += [
                np.lib.stride_tricks.as_strided(
                    once, shape, (*once.strides[:-2], 0, once.strides[-1])
                )
            ]
        query = r.given["query"]
        if query.shape == shape and query.dtype == dtype and query.flags.writeable:
            values += [query] * 2
    return {"out": r.one(*values)}


OPERANDS = (
    resized(-1, 1),
    resized(-2, 2),
    operand_is(lambda x: x.reshape(-1)),
    operand_is(lambda x: np.zeros(x.shape, int)),
    operand_is(lambda x: np.zeros(x.shape, complex)),
    operand_is(lambda x: np.zeros(x.shape, bool)),
    operand_is(lambda x: np.full(x.shape, "a")),
    operand_is(lambda x: np.full(x.shape, None, object)),
    operand_is(lambda x: None if x.dtype.itemsize == 8 else np.zeros(x.shape, np.float64)),
    operand_is(lambda x: np.ma.array(np.zeros(x.shape, np.float32))),
    option_is("query", None, 1.0, "a", {}, [[1.0], [1.0, 2.0]]),
    option_is("key", None, 1.0, "a", {}),
    option_is("value", None, 1.0, "a", {}),
    heads_apart,
    batch_apart,
)
OPTIONS = (
    pairs_apart,
    pairs_dtype,
    option_is("scale", *NO_NUMBERS),
    option_is("is_causal", *NO_FLAGS),
    offset_wrong,
    more_offsets_wrong,
    offset_missing,
    option_is(
        "window", (1,), (-1, 2), (1.5, 2), 5, "ab", (1, 2, 3), (True, 1), (None, -1), [], ("1", 2)
    ),
    option_is("softcap", *NO_NUMBERS, 0, -1.0),
    per_head_wrong,
    lengths_wrong,
)
RESULTS = (
    option_is("dropout_p", -0.1, 1.1, NAN, None, "x", [0.1], True),
    lambda r: {"dropout_p": 0.5, "seed": r.one(None, -1, 2**64, 1.5, "1", True)},
    option_is("return_lse", *NO_FLAGS),
    out_wrong,
)


def faulty(r, faults):
    """Return arguments of which one is wrong, and what was changed."""
    while True:
        changed = r.one(*faults)(r)
        if changed is not None:
            if {"alibi_slopes", "is_causal", "window"} & {*changed}:
                r.given.setdefault("query_offset", 0)
            return r.given | changed, changed


def check(spec):
    """Raise if a wrong call is accepted, raises something else, or changes what it was given."""
    fastattn.set_num_threads(spec["threads"])
    rng = np.random.default_rng(spec["wrong"])
    globals()[f"check_{spec['call']}"](Right(Problem(spec), rng), spec)


def refused(call, arguments, changed, keep=()):
    """Assert that a call raises as it should, and that arrays stay what they were."""
    before = [x.copy() for x in keep]
    told = {
        name: x if np.ndim(x) == 0 else f"{type(x).__name__} {np.shape(x)}"
        for name, x in changed.items()
        if not isinstance(x, list)
    }
    error = None
    try:
        call(**arguments)
    except Exception as raised:
        error = raised
    assert error is not None, f"accepted: {told}"
    assert isinstance(error, TypeError | ValueError), f"{error!r} for {told}"
    assert str(error), f"no message about {told}"
    for x, was in zip(keep, before, strict=True):
        same(f"what a refused call was given, with {told}", x, was)


def check_attention(r, spec):
    """Refuse a call of attention."""
    arguments, changed = faulty(r, (*OPERANDS, *OPTIONS, *RESULTS))
    keep = [x for x in r.p.operands]
    if spec["out"] and "out" not in arguments:
        arguments["out"] = np.full(r.shape, 7, r.p.dtype)
        keep.append(arguments["out"])
    refused(fastattn.attention, arguments, changed, keep)


def check_explain(r, spec):
    """Refuse a call of explain."""
    arguments, changed = faulty(r, (*OPERANDS, *OPTIONS))
    refused(fastattn.explain, arguments, changed, r.p.operands)


def check_backward(r, spec):
    """Refuse a call of attention_backward."""
    query, key, value = r.p.operands
    out, lse = fastattn.attention(query, key, value, return_lse=True, **r.p.options)
    r.given |= {"grad_out": np.ones_like(out), "out": out, "lse": lse}
    wide = np.float64 if lse.dtype == np.float32 else np.float32
    own = (
        lambda r: {"grad_out": out[..., None]},
        lambda r: {r.one("lse", "grad_lse"): lse.astype(wide)},
        lambda r: {r.one("lse", "grad_lse"): lse[..., None]},
        lambda r: {"out": out.astype(int)},
        lambda r: {r.one("grad_out", "out", "lse"): None},
        lambda r: {"return_dbias": True, "bias": None},
        lambda r: {"return_dsinks": True, "sinks": None},
        lambda r: {r.one("return_dbias", "return_dsinks"): r.one(1, "x", None)},
        lambda r: {"cu_seqlens_q": [0, 1]},
    )
    arguments, changed = faulty(r, (*own, *OPTIONS))
    refused(fastattn.attention_backward, arguments, changed, [query, key, value, out, lse])


def check_varlen(r, spec):
    """Refuse a call of varlen_attention."""
    operands = [np.zeros((n, h, 4), np.float32) for n, h in ((9, 4), (11, 2), (11, 2))]
    out = np.full((9, 4, 4), 7, np.float32)
    given = dict(zip(("query", "key", "value"), operands, strict=True))
    given |= {
        "cu_seqlens_q": np.array([0, 4, 9]),
        "cu_seqlens_kv": np.array([0, 5, 11]),
        "out": out,
    }
    name = r.one("cu_seqlens_q", "cu_seqlens_kv")
    wrong = r.one(
        {name: [0, 5]},
        {name: [0, 5, 4]},
        {name: [-1, 4, 9]},
        {name: [0, 4, 12]},
        {name: [0, 4, 2**63 - 1]},
        {name: np.array([0, 4, 2**63], np.uint64)},
        {name: [0.0, 4.0, 9.0]},
        {name: []},
        {name: [[0, 4, 9]]},
        {name: None},
        {name: 3},
        {"query": operands[0][None]},
        {"key": operands[1][:, :, :3]},
        {"value": operands[2][:-1]},
        {"value": operands[2][:, :1]},
        {"query": operands[0][:, :3]},
        {"is_causal": True},
        {"kv_lengths": 6},
        {"kv_lengths": [5, 7]},
        {"query_offset": [1, 2, 3]},
        {"alibi_slopes": np.zeros((3, 4)), "query_offset": 0},
        {"mask": np.ones((9, 7), bool)},
        {"sinks": np.zeros(2)},
        {"out": np.zeros((9, 4, 5), np.float32)},
        {"return_lse": 1},
    )
    refused(fastattn.varlen_attention, given | wrong, wrong, [out])


def check_merge(r, spec):
    """Refuse a call of merge."""
    out, lse = np.ones((2, 3, 4), np.float32), np.ones((2, 3), np.float32)
    right = (out, lse)
    parts = r.one(
        [],
        [out],
        [(out,)],
        [(out, lse, lse)],
        [(out, lse[0])],
        [(out, lse[..., None])],
        [right, (out[:1], lse[:1])],
        [right, (out.astype(float), lse)],
        [right, (out, lse.astype(float))],
        [(out.astype(int), lse)],
        [(out, lse.astype(np.float16))],
        [right, None],
        [right, "ab"],
        None,
    )
    sinks = None
    if parts is None:
        parts = [right, right]
        sinks = r.one(np.zeros(3), np.zeros(2, int), np.full(2, NAN), np.full(2, INF), "a", 1.0)
    refused(
        lambda: fastattn.merge(*parts, sinks=sinks),
        {},
        {"parts": parts, "sinks": sinks},
        [out, lse],
    )


def check_cache(r, spec):
    """Refuse what is asked of a cache, which then is what it was."""
    paged = r.one(False, True)
    pool = (
        fastattn.PagedKVCache(2, 4, pages=6) if paged else fastattn.KVCache(2, 2, 4, capacity=200)
    )
    if paged:
        pool.add()
        pool.add()
    rng = r.rng
    key = rng.normal(size=(2, 2, 130, 4)).astype(np.float32)
    pool.append(key, key, [130, 5])
    pool.evict([100, 3])
    query = np.ones((2, 4, 3, 4), np.float32)
    calls = [
        ("append", {"key": key[:1], "value": key[:1]}),
        ("append", {"key": key, "value": key[:, :, :5]}),
        ("append", {"key": key[..., :3], "value": key}),
        ("append", {"key": key.astype(float), "value": key}),
        (
            "append",
            {"key": key, "value": key, "lengths": r.one(-1, 131, 1.5, [1, 2, 3], True, "a")},
        ),
        (
            "attend",
            {
                "query": r.one(
                    query[0], query[:1], query[..., :3], query[:, :3], query.astype(float), None
                )
            },
        ),
        ("attend", {"query": query, "window": (-1, 0)}),
        ("attend", {"query": query, "mask": np.ones((3, 131), bool)}),
        ("attend", {"query": query, "sinks": np.zeros(3)}),
        ("attend", {"query": query, "out": np.zeros((2, 4, 3, 5), np.float32)}),
        ("truncate", {"lengths": r.one(-1, 0, 131, [130, 6], 1.5, [1, 2, 3], None)}),
        ("evict", {"keep": r.one(-1, 1.5, "a", [1, 2, 3], 2**62, None)}),
        ("evict", {"keep": 3, "keep_first": r.one(-1, 6, 1.5, "a", [1, 2, 3], 2**62, None)}),
        ("evict", {"keep": 3, "renumber": r.one(0, None, "a")}),
        ("attend", {"query": query, "return_column_sums": r.one(1, None, "a")}),
    ]
    if paged:
        calls += [
            ("add", {"prefix": r.one(7, -1, 1.5, "a", True)}),
            ("add", {"prefix": 0, "length": r.one(-1, 29, 131, 1.5)}),
            ("add", {"length": 3}),
            ("free", {"sequence": r.one(7, -1, None, 0.5)}),
            ("attend", {"query": query, "sequences": r.one([0], [0, 0], [0, 7], 5, ["a", 0])}),
            ("append", {"key": key, "value": key, "sequences": r.one([0], [1, 1], [0, 9], 1)}),
        ]
    else:
        calls += [("reorder", {"indices": r.one(-1, 2, [0, 1, 1], 0.5, [0, 2])})]
    name, arguments = r.one(*calls)
    before = saved(pool)
    refused(getattr(pool, name), copy.copy(arguments), {name: str(arguments)[:200]})
    assert saved(pool) == before, f"a refused {name} changed the cache: {str(arguments)[:200]}"  # fmt: skip


def saved(cache):
    """Return the bytes of all that a cache is."""
    file = io.BytesIO()
    cache.save(file)
    with np.load(io.BytesIO(file.getvalue())) as arrays:
        return {name: arrays[name].tobytes() for name in arrays}
