# SPDX-License-Identifier: Apache-2.0
"""Memory: nothing read or written outside the operands, little of it used, its absence survived.

Each check runs in a process of its own, because what fails here kills the process.
"""

import ctypes
import mmap
import resource
from math import prod
from pathlib import Path

import pytest
from child import run

ISAS = ("generic", "avx2", "avx512")
DTYPES = ("float32", "float64")
MIB = 2**20


def require(isa):
    from fastattn import _core

    if isa not in _core.supported_isas():
        pytest.skip(f"this CPU or build has no {isa}")


# (heads, kv_heads, q_len, kv_len, head_dim, value_head_dim): around tile and register edges.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 3, 5, 7, 9),
    (4, 2, 16, 65, 59, 40),
    (2, 2, 17, 33, 64, 64),
    (1, 1, 49, 127, 8, 17),
    (3, 1, 67, 129, 40, 111),
    (2, 1, 97, 70, 128, 80),
    (1, 1, 5, 1027, 33, 65),
]
MASK_DTYPES = (None, "bool", "float16", "bfloat16", "float32", "float64")


def guarded(array, side):
    """Copy the array to memory whose neighbour page on that side, and far page, cannot be touched.

    On the side "end" its last byte is the last one of a page, on the side "start" its first byte the
    first one of a page; it is as misaligned as its size makes it.
    """
    import numpy as np

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    body = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    base = np.frombuffer(memory, np.uint8).ctypes.data
    for address in (base, base + page + body):
        assert libc.mprotect(address, page, 0) == 0
    offset = page + (body - array.nbytes if side == "end" else 0)
    raw = np.frombuffer(memory, np.uint8)[offset : offset + array.nbytes]
    copy = raw.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def strided(array, side, layout):
    """Return an equal array in guarded memory with other strides; the last axis stays contiguous."""
    if layout == "reversed":
        return guarded(array[..., ::-1, :], side)[..., ::-1, :]
    if (
        layout == "interleaved"
    ):  # rows of all heads side by side, as (batch, seq, heads, dim) has them
        return guarded(array.swapaxes(-2, -3), side).swapaxes(-2, -3)
    return guarded(array, side)


def masks(rng, dtype, heads, q_len, kv_len):
    """Give masks of that dtype: dense, transposed, one row for all, one column for all."""
    import ml_dtypes
    import numpy as np

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    for shape, transposed in [
        ((1, heads, q_len, kv_len), False),
        ((1, heads, kv_len, q_len), True),
        ((1, 1, 1, kv_len), False),
        ((q_len, 1), False),
    ]:
        seen = rng.random(shape) < 0.7
        mask = seen if dtype == "bool" else np.where(seen, rng.normal(size=shape), -np.inf)
        yield mask.astype(kind), transposed


def check_guarded(isa, dtype):
    """Compute everything between guard pages, and compare it with the definition."""
    import fastattn
    import numpy as np
    from fastattn import _core

    _core.set_isa(isa)
    fastattn.set_num_threads(2)
    rng = np.random.default_rng(0)
    gate = 1e-5 if dtype == "float32" else 1e-12
    for heads, kv_heads, q_len, kv_len, head_dim, value_head_dim in SIZES:
        query = rng.normal(size=(1, heads, q_len, head_dim)).astype(dtype)
        key = rng.normal(size=(1, kv_heads, kv_len, head_dim)).astype(dtype)
        value = rng.normal(size=(1, kv_heads, kv_len, value_head_dim)).astype(dtype)
        bias = rng.normal(size=(heads, q_len, kv_len)).astype(dtype)
        features = {
            "alibi_slopes": rng.random((1, heads)),
            "sinks": rng.normal(size=heads),
            "query_offset": np.array([kv_len - q_len]),
            "kv_lengths": np.array([kv_len - kv_len // 5]),
        }
        cases = [(None, False, features if every else {}) for every in (False, True)] + [
            (mask, transposed, features if mask.dtype == bool else {})
            for kind in MASK_DTYPES[1:]
            for mask, transposed in masks(rng, kind, heads, q_len, kv_len)
        ]
        for case, (mask, transposed, extra) in enumerate(cases):
            expected, expected_lse = fastattn.reference.attention(
                query,
                key,
                value,
                mask=mask.swapaxes(-1, -2) if transposed else mask,
                bias=bias if extra else None,
                window=(kv_len // 2, 3) if extra else None,
                softcap=20.0 if extra else None,
                query_offset=extra.get("query_offset", 0),
                alibi_slopes=extra.get("alibi_slopes"),
                sinks=extra.get("sinks"),
                kv_lengths=extra.get("kv_lengths"),
                return_lse=True,
            )
            layout = ("plain", "reversed", "interleaved")[case % 3]
            for side in ("end", "start"):
                out = strided(np.full(expected.shape, np.nan, dtype), side, layout)
                lse = guarded(np.full(out.shape[:-1], np.nan, dtype), side)
                mask_there = None if mask is None else guarded(mask, side)
                bias_there = guarded(bias, side) if extra else None
                there = {name: guarded(array, side) for name, array in extra.items()}
                _core.attention(
                    strided(query, side, layout),
                    strided(key, side, layout),
                    strided(value, side, layout),
                    out,
                    lse,
                    (1,),
                    mask_there.swapaxes(-1, -2) if transposed else mask_there,
                    bias_there,
                    there.get("alibi_slopes"),
                    there.get("sinks"),
                    there.get("query_offset"),
                    there.get("kv_lengths"),
                    head_dim**-0.5,
                    20.0 if extra else 0.0,
                    kv_len // 2 if extra else -1,
                    3 if extra else -1,
                )
                np.testing.assert_allclose(out, expected, rtol=gate, atol=gate)
                np.testing.assert_allclose(lse, expected_lse, rtol=gate, atol=gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_guard_pages(isa, dtype):
    pytest.importorskip("ml_dtypes")
    require(isa)
    run(check_guarded, isa, dtype, timeout=120)


def touch_a_guard_page(side):
    import numpy as np

    array = guarded(np.zeros(5, np.float32), side)
    ctypes.string_at(array.ctypes.data + (20 if side == "end" else -1), 1)


@pytest.mark.parametrize("side", ["start", "end"])
def test_guard_pages_guard(side):
    with pytest.raises(AssertionError, match="exit status -11"):
        run(touch_a_guard_page, side)


def status(field):
    """Return a line of /proc/self/status that gives a size, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak(case):
    """Return how many bytes a call needs at its peak beside the arrays that are there before it."""
    import fastattn
    import numpy as np

    fastattn.set_num_threads(2)
    tokens = 131072
    rng = np.random.default_rng(0)

    def array(heads, rows, head_dim):
        return rng.random((1, heads, rows, head_dim), np.float32)

    padding = np.arange(tokens) < tokens - 1000
    if case == "window":
        query, key, value = array(4, tokens, 64), array(2, tokens, 64), array(2, tokens, 64)
        arguments = {"window": (256, 0), "mask": padding, "bias": padding.astype(np.float32)}
    elif case == "causal":
        query, key, value = array(1, tokens, 8), array(1, tokens, 8), array(1, tokens, 8)
        arguments = {"is_causal": True}
    elif case == "few queries":
        query, key, value = array(8, 1, 128), array(2, tokens, 128), array(2, tokens, 128)
        arguments = {"mask": padding, "alibi_slopes": rng.random(8)}
        arguments["query_offset"] = tokens - 1
    else:
        query, key, value = array(2, tokens, 64), array(2, 300, 64), array(2, 300, 64)
        arguments = {"softcap": 30.0, "return_lse": True}
    out = np.ones((*query.shape[:-1], value.shape[-1]), np.float32)
    fastattn.attention(query[..., :64, :], query[..., :64, :], query[..., :64, :])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    fastattn.attention(query, key, value, out=out, **arguments)
    return status("VmHWM") - before


@pytest.mark.parametrize("case", ["window", "causal", "few queries", "few keys"])
def test_peak_memory_at_131072_tokens(case):
    assert run(peak, case, timeout=120) < 16 * MIB


def meet_a_limit(warm):
    """Call with no address space left: MemoryError or the right result, and the next call works."""
    import fastattn
    import numpy as np

    fastattn.set_num_threads(2)
    query = np.random.default_rng(0).random((1, 2, 96, 40000), np.float32)
    out = np.zeros_like(query)
    if warm:
        small = query[..., :64]
        fastattn.attention(small, small, small)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 64 * 1024, hard))
    try:
        with pytest.raises(MemoryError):
            fastattn.attention(query, query, query, out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    fastattn.attention(query, query, query, out=out)
    expected = fastattn.reference.attention(query, query, query)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("warm", [True, False], ids=["threads running", "first call"])
def test_no_memory(warm):
    run(meet_a_limit, warm)


def meet_a_limit_on_threads(megabytes):
    """Call, for the first time, with memory for the scratch but not for all the threads' stacks."""
    import fastattn
    import numpy as np

    fastattn.set_num_threads(4)
    query = np.random.default_rng(0).random((1, 8, 512, 64), np.float32)
    out = np.zeros_like(query)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + megabytes * MIB, hard))
    try:
        fastattn.attention(query, query, query, out=out)
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        fastattn.attention(query, query, query, out=out)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    fastattn.set_num_threads(1)
    assert np.array_equal(out, fastattn.attention(query, query, query))


@pytest.mark.parametrize("megabytes", [4, 12, 20, 28])
def test_no_memory_for_threads(megabytes):
    run(meet_a_limit_on_threads, megabytes)


def compute_with_small_stacks(isa):
    """Run wide heads and every feature on threads whose stacks are small."""
    import fastattn
    import numpy as np
    from fastattn import _core

    _core.set_isa(isa)
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for head_dim in (64, 257, 1024):
            query = rng.normal(size=(1, 4, 130, head_dim)).astype(dtype)
            mask = rng.random((130, 130)) < 0.8
            arguments = {"mask": mask, "is_causal": True, "softcap": 20.0}
            arguments["alibi_slopes"] = np.full(4, 0.1)
            out = fastattn.attention(query, query, query, **arguments)
            expected = fastattn.reference.attention(query, query, query, **arguments)
            gate = 1e-5 if dtype == "float32" else 1e-12
            np.testing.assert_allclose(out, expected, rtol=gate, atol=gate)


@pytest.mark.parametrize("isa", ISAS)
def test_small_thread_stacks(isa):
    require(isa)
    env = {"OMP_STACKSIZE": "96k", "FASTATTN_NUM_THREADS": "4"}
    run(compute_with_small_stacks, isa, env=env)
