# SPDX-License-Identifier: Apache-2.0
"""Is this installation right on this machine? Checks of every kernel that the CPU can run.

Called by `fastattn selftest`; takes less than a minute and needs NumPy alone, so that it runs where
a wheel was just installed. The test suite of the repository goes much further.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import fastattn
from fastattn import _core, reference

# (q_heads, kv_heads, q_len, kv_len, head_dim, value_head_dim): around the edges of every tile, and
# more keys than are added to one sum (kKeysPerSum).
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 3, 5, 7, 9),
    (4, 4, 1, 129, 64, 64),
    (4, 2, 12, 65, 59, 40),
    (2, 2, 13, 128, 64, 64),
    (3, 1, 25, 127, 33, 65),
    (8, 2, 49, 130, 128, 128),
    (2, 1, 97, 257, 80, 17),
    (6, 2, 2, 1100, 40, 24),
    (1, 1, 48, 8321, 16, 16),
]
EXTRA_ULPS = 4.0  # of the largest output: what rounding the result itself may cost
CHILD_SECONDS = 20
Options = dict[str, Any]


def main() -> int:
    """Run the checks and print them; return 0 if all hold, else 1."""
    begin = time.perf_counter()
    _say(str(fastattn.info()))
    failures = 0
    default = _core.isa()
    for name, check in _checks():
        try:
            detail = check()
        except Exception as error:  # whatever is wrong here, the other checks still say something
            failures += 1
            detail = f"FAILED: {error}"
        _say(f"  {name:32}  {detail}")
    _core.set_isa(default)
    seconds = time.perf_counter() - begin
    _say(f"{'all is well' if not failures else f'{failures} checks FAILED'}, {seconds:.0f} s")
    return int(failures > 0)


def _checks() -> Iterator[tuple[str, Callable[[], str]]]:
    for dtype in (np.float16, np.float32, np.float64):
        calls = list(_calls(dtype))
        for isa in _core.supported_isas():
            yield f"{isa}, {np.dtype(dtype).name}", functools.partial(_accuracy, isa, calls)
    for isa in _core.supported_isas():
        yield f"{isa}, caches", functools.partial(_caches, isa)
    yield "packed sequences", _packed
    yield "threads change no bit", _threads
    yield "a forked process", _fork


class Call(NamedTuple):
    """A call, what is true, and how far from it the accuracy gate allows a result to be."""

    what: str
    operands: list[Any]
    options: Options
    truth: Any
    allowed: float


def _calls(dtype: type[np.floating[Any]]) -> Iterator[Call]:
    """Make the calls of every size with each pair of features."""
    rng = np.random.default_rng(0)
    arithmetic = np.promote_types(dtype, np.float32)
    wider = np.longdouble if dtype is np.float64 else np.float64
    for sizes in SIZES:
        operands = _operands(rng, sizes, dtype)
        features = _features(rng, sizes, dtype)
        picks = [(), *itertools.combinations_with_replacement(features, 2)]
        if sizes[3] > 8000:
            picks = [(), ("mask",), ("is_causal",)]
        for pick in picks:
            options: Options = {"query_offset": sizes[3] - sizes[2]}
            for name in pick:
                options |= features[name]
            wide = [x.astype(wider) for x in operands]
            truth: Any = reference.attention(*wide, compute_dtype=wider, **options)
            plain: Any = reference.attention(*operands, compute_dtype=arithmetic, **options)
            rounding = EXTRA_ULPS * np.finfo(arithmetic).eps * np.abs(truth).max()
            allowed = float(2 * np.abs(plain - truth).max() + rounding)
            what = f"{' and '.join(pick) or 'no feature'} at {sizes}"
            yield Call(what, operands, options, truth, allowed)


def _accuracy(isa: str, calls: list[Call]) -> str:
    """Check that each result of the instruction set is within what is allowed."""
    _core.set_isa(isa)
    largest = 0.0
    for call in calls:
        result = fastattn.attention(*call.operands, **call.options)
        error = float(np.abs(result - call.truth).max())
        if not error <= call.allowed:
            raise AssertionError(f"{call.what}: error {error:.2g}, allowed {call.allowed:.2g}")
        largest = max(largest, error / call.allowed if call.allowed else 0.0)
    return f"{len(calls)} calls, largest error {largest:.0%} of what is allowed"


def _operands(rng: np.random.Generator, sizes: tuple[int, ...], dtype: Any) -> list[Any]:
    q_heads, kv_heads, q_len, kv_len, head_dim, value_head_dim = sizes
    shapes = (
        (2, q_heads, q_len, head_dim),
        (2, kv_heads, kv_len, head_dim),
        (2, kv_heads, kv_len, value_head_dim),
    )
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _features(rng: np.random.Generator, sizes: tuple[int, ...], dtype: Any) -> dict[str, Options]:
    q_heads, _, q_len, kv_len, _, _ = sizes
    pairs = (2, 1, q_len, kv_len)
    return {
        "alibi_slopes": {"alibi_slopes": rng.uniform(0, 1, q_heads).astype(dtype)},
        "bias": {"bias": rng.standard_normal((q_heads, q_len, kv_len)).astype(dtype)},
        "dropout": {"dropout_p": 0.3, "seed": 5},
        "is_causal": {"is_causal": True},
        "kv_lengths": {"kv_lengths": rng.integers(0, kv_len + 1, 2)},
        "mask": {"mask": rng.random(pairs) < 0.7},
        "scale": {"scale": -0.3},
        "sinks": {"sinks": rng.standard_normal(q_heads).astype(dtype)},
        "softcap": {"softcap": 2.0},
        "window": {"window": (kv_len // 3, 2)},
    }


def _caches(isa: str) -> str:
    """Check that a cache of shared pages gives what arrays give, and int8 nearly so."""
    _core.set_isa(isa)
    rng = np.random.default_rng(3)
    largest = 0.0
    for dtype, held in ((np.float32, np.float32), (np.float16, np.float16), (np.float32, np.int8)):
        query, key, value = _operands(rng, (8, 2, 1, 1300, 64, 40), dtype)
        key[1, :, :900], value[1, :, :900] = key[0, :, :900], value[0, :, :900]
        cache = fastattn.PagedKVCache(2, 64, dtype=held, value_head_dim=40)
        first = cache.add()
        cache.append(key[:1, :, :900], value[:1, :, :900])
        cache.add(first)
        cache.append(key[:, :, 900:], value[:, :, 900:])
        result = cache.attend(query)
        expected = fastattn.attention(query, key, value)
        error = float(np.abs(result - expected).max())
        if error > 0 and held is not np.int8:
            raise AssertionError(f"{np.dtype(held).name}: pages differ from arrays by {error:.2g}")
        largest = max(largest, error)
    if largest > 0.02:
        raise AssertionError(f"int8 differs from float32 by {largest:.2g}")
    return f"as arrays; int8 to {largest:.1g}"


def _packed() -> str:
    """Check that packed sequences give what each gives alone."""
    rng = np.random.default_rng(4)
    lengths = (3, 200, 0, 17)
    starts = np.cumsum([0, *lengths])
    x = rng.standard_normal((starts[-1], 4, 32), np.float32)
    result = fastattn.varlen_attention(x, x, x, starts, starts, is_causal=True)
    for first, last in itertools.pairwise(starts):
        alone = x[first:last].swapaxes(0, 1)
        expected = fastattn.attention(alone, alone, alone, is_causal=True).swapaxes(0, 1)
        if not np.array_equal(result[first:last], expected):
            raise AssertionError(f"rows {first}..{last} differ from what they are alone")
    return f"{len(lengths)} sequences"


def _threads() -> str:
    """Check that one thread and several give the same bits."""
    rng = np.random.default_rng(1)
    query, key, value = _operands(rng, (6, 2, 300, 700, 64, 64), np.float32)
    default = fastattn.get_num_threads()
    counts = sorted({1, 2, 3, default})
    try:
        results = []
        for threads in counts:
            fastattn.set_num_threads(threads)
            results.append(fastattn.attention(query, key, value, is_causal=True, query_offset=400))
    finally:
        fastattn.set_num_threads(default)
    if any(not np.array_equal(results[0], result) for result in results):
        raise AssertionError(f"the results of {counts} threads differ")
    return f"{', '.join(map(str, counts))} threads"


def _fork() -> str:
    """Check that a process forked after use computes the same, and ends."""
    rng = np.random.default_rng(2)
    operands = _operands(rng, (8, 8, 256, 256, 64, 64), np.float32)
    expected = fastattn.attention(*operands)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(CHILD_SECONDS)
            os._exit(int(not np.array_equal(fastattn.attention(*operands), expected)))
        finally:  # whatever it raised, it must not go on with the parent's work
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM:
        raise AssertionError(f"the child hung for {CHILD_SECONDS} s")
    if code != 0:
        raise AssertionError("the child computed something else" if code == 1 else f"status {code}")
    return "computes the same"


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
