# SPDX-License-Identifier: Apache-2.0
"""Memory: nothing read or written outside the operands, little of it used, its absence survived.

What fails here kills the process, so each check runs in a process of its own (child.py).
"""

import ctypes
import hashlib
import itertools
import mmap
import os
import resource

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn import _core
from fastattn._quantised import BLOCKS, Quantised
from tests.support.child import run
from tests.support.memory import peak_so_far, status
from tests.support.threads import tasks

MIB = 2**20
each_isa = pytest.mark.parametrize("isa", _core.supported_isas())
each_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])

# Guard pages, around the edges of tiles and registers.
# (heads, kv_heads, q_len, kv_len, head_dim, value_head_dim)
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
MASK_DTYPES = ("bool", "float16", ml_dtypes.bfloat16, "float32", "float64")


def guarded(array, side):
    """Copy the array to memory whose neighbor page on that side, and far page, cannot be touched.

    On the side "end" its last byte is the last one of a page, on the side "start" its first byte
    the first one of a page; it is as misaligned as its size makes it.
    """
    page = mmap.PAGESIZE
    body = -(-max(array.nbytes, 1) // page) * page
    memory = np.frombuffer(mmap.mmap(-1, body + 2 * page), np.uint8)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for offset in (0, page + body):
        assert protect(memory.ctypes.data + offset, page, 0) == 0
    begin = page + (body - array.nbytes if side == "end" else 0)
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def laid_out(array, side, layout):
    """Copy the array to guarded memory with other strides; the last axis stays contiguous."""
    if layout == "reversed":
        return guarded(array[..., ::-1, :], side)[..., ::-1, :]
    if layout == "heads inside":  # as (batch, length, heads, head_dim)
        return guarded(array.swapaxes(-2, -3), side).swapaxes(-2, -3)
    return guarded(array, side)


def masks(rng, heads, q_len, kv_len):
    """Give masks of every dtype: dense, transposed, one row for all, one column for all."""
    for dtype in MASK_DTYPES:
        for shape in ((heads, q_len, kv_len), (heads, kv_len, q_len), (1, kv_len), (q_len, 1)):
            seen = rng.random(shape) < 0.7
            mask = seen if dtype == "bool" else np.where(seen, rng.normal(size=shape), -np.inf)
            yield mask.astype(dtype), shape == (heads, kv_len, q_len)


def compute_between_guards(isa, dtype):
    """Compute everything between guard pages, and compare it with the definition."""
    _core.set_isa(isa)
    fastattn.set_num_threads(2)
    rng = np.random.default_rng(0)
    gate = {"float16": 2e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    layouts = itertools.cycle(["plain", "reversed", "heads inside"])
    for heads, kv_heads, q_len, kv_len, head_dim, value_head_dim in SIZES:
        query = rng.normal(size=(1, heads, q_len, head_dim)).astype(dtype)
        key = rng.normal(size=(1, kv_heads, kv_len, head_dim)).astype(dtype)
        value = rng.normal(size=(1, kv_heads, kv_len, value_head_dim)).astype(dtype)
        features = {
            "bias": rng.normal(size=(heads, q_len, kv_len)).astype(dtype),
            "alibi_slopes": rng.random((1, heads)),
            "sinks": rng.normal(size=heads),
            "query_offset": np.array([kv_len - q_len]),
            "kv_lengths": np.array([kv_len - kv_len // 5]),
        }
        settings = {"window": (kv_len // 2, 3), "softcap": 20.0}
        for mask, transposed in [(None, False), *masks(rng, heads, q_len, kv_len)]:
            arrays = {} if mask is None else {"mask": mask}
            every = mask is None or mask.dtype == bool
            arrays |= features if every else {"query_offset": features["query_offset"]}
            layout = next(layouts)
            for side in ("end", "start"):
                there = {name: guarded(array, side) for name, array in arrays.items()}
                if transposed:
                    there["mask"] = there["mask"].swapaxes(-1, -2)
                operands = [laid_out(array, side, layout) for array in (query, key, value)]
                options = there | (settings if every else {})
                out = laid_out(
                    np.full((1, heads, q_len, value_head_dim), np.nan, dtype), side, layout
                )
                _, lse = fastattn.attention(*operands, **options, out=out, return_lse=True)
                expected = fastattn.reference.attention(*operands, **options, return_lse=True)
                wide = np.promote_types(lse.dtype, np.float32)
                out, right = out.astype(wide), expected[0].astype(wide)
                np.testing.assert_allclose(out, right, rtol=gate, atol=gate)
                np.testing.assert_allclose(lse, expected[1], rtol=gate, atol=gate)


@pytest.mark.promise("nothing-outside-the-arrays")
@each_isa
@each_dtype
def test_guard_pages(isa, dtype):
    run(compute_between_guards, isa, dtype, timeout=120)


def multiply_between_guards(isa):
    """Compute linear layers between guard pages, of every storage and around tiles and steps."""
    _core.set_isa(isa)
    fastattn.set_num_threads(2)
    rng = np.random.default_rng(0)
    storages = ("float32", "float16", "bfloat16", *BLOCKS)
    for storage, features, out in itertools.product(storages, (1, 7, 31, 32, 800, 801), (1, 9, 26)):
        if storage in BLOCKS:
            if features % 32:
                continue
            weight = np.zeros((out, features // 32), BLOCKS[storage])
            weight["scale"] = rng.normal(size=weight.shape)
            weight["quants"] = rng.integers(0, 128, weight["quants"].shape)
            numbers = Quantised(storage, weight).dequantised()
        else:
            weight = rng.normal(size=(out, features)).astype(storage)
            numbers = weight.astype(np.float32)
        bias = rng.random(out, np.float32)
        for side, rows in itertools.product(("end", "start"), (1, 2, 3, 4, 5, 9)):
            x = rng.random((rows, features), np.float32)
            there, held = guarded(x, side), guarded(weight, side)
            held = Quantised(storage, held) if storage in BLOCKS else held
            found = fastattn.linear(there, held, guarded(bias, side))
            np.testing.assert_allclose(found, x @ numbers.T + bias, rtol=1e-4, atol=1e-3)


@pytest.mark.promise("nothing-outside-the-arrays")
@each_isa
def test_guard_pages_of_linear_layers(isa):
    run(multiply_between_guards, isa, timeout=120)


def attend_pages_between_guards(isa, held):
    """Attend over pools of pages whose first and last page sequences use, in part."""
    _core.set_isa(isa)
    rng = np.random.default_rng(0)
    tables, pages = [[0, -1, -1], [4, 3, 2], [5, 1, -1]], 6
    for side in ("end", "start"):
        pool = [rng.integers(-9, 9, (pages, 2, 128, dim)).astype(held) for dim in (64, 40)]
        scales = [rng.random((pages, 2, 128), np.float32) for _ in pool] if held == "int8" else []
        pool, scales = ([guarded(x, side) for x in arrays] for arrays in (pool, scales))
        named = dict(zip(("key_scale", "value_scale"), scales, strict=False))
        for lengths, q_len in itertools.product([(128, 300, 129), (121, 257, 255)], (1, 3, 9, 20)):
            cache = fastattn.PagedKVCache.from_pages(*pool, tables, lengths, **named)
            query = rng.normal(size=(3, 4, q_len, 64)).astype(np.float32)
            for keep, window in ((400, None), (39, None), (30, (20, None)), (142, (122, None))):
                cache.evict(keep)
                assert np.isfinite(cache.attend(query, window=window)).all()


@pytest.mark.promise("nothing-outside-the-arrays")
@each_isa
@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
def test_guard_pages_of_a_cache(isa, held):
    run(attend_pages_between_guards, isa, held, timeout=120)


def touch_a_guard_page(side):
    array = guarded(np.zeros(5, np.float32), side)
    ctypes.string_at(array.ctypes.data + (20 if side == "end" else -1), 1)


@pytest.mark.parametrize("side", ["start", "end"])
def test_guard_pages_guard(side):
    with pytest.raises(AssertionError, match="exit status -11"):
        run(touch_a_guard_page, side)


def with_a_hole(array, begin, end):
    """Copy the array to memory of which the pages from begin to end cannot be touched."""
    memory = np.frombuffer(mmap.mmap(-1, array.nbytes), np.uint8)
    copy = memory.view(array.dtype).reshape(array.shape)
    copy[...] = array
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    assert protect(memory.ctypes.data + begin * page, (end - begin) * page, 0) == 0
    return copy


def attend_beside_a_hole(isa):
    """Attend to keys and values of which those of whole tiles, all hidden, cannot be touched."""
    _core.set_isa(isa)
    rng = np.random.default_rng(0)
    page = mmap.PAGESIZE // 4 // 8  # in keys
    keys = np.arange(32 * page)
    tiles = slice(9 * page, 13 * page)
    assert page % 128 == 0
    seen = (keys < tiles.start) | (keys >= tiles.stop)
    for q_len in (1, 50):
        query, key, value = (rng.random((n, 8), np.float32) for n in (q_len, *2 * [len(keys)]))
        for options in (
            {"mask": seen},
            {"bias": np.where(seen, 0, -np.inf)},
            {"kv_lengths": tiles.start},
            {"is_causal": True, "query_offset": tiles.start - q_len},
            {"window": (50, 50), "query_offset": tiles.stop + 50},
        ):
            expected = fastattn.attention(query, key, value, **options)
            holed = (with_a_hole(x, 9, 13) for x in (key, value))
            assert np.array_equal(fastattn.attention(query, *holed, **options), expected)


@pytest.mark.promise("hidden-tiles-cost-nothing")
@each_isa
def test_hidden_tiles_are_not_touched(isa):
    run(attend_beside_a_hole, isa)


# How much memory.


def peak(case):
    """Return how many bytes a call needs at its peak beside the arrays that are there before it."""
    fastattn.set_num_threads(2)
    tokens = 131072
    rng = np.random.default_rng(0)

    def arrays(*shapes):
        return [rng.random((1, *shape), np.float32) for shape in shapes]

    padding = np.arange(tokens) < tokens - 1000
    if case == "window":
        operands = arrays((4, tokens, 64), (2, tokens, 64), (2, tokens, 64))
        options = {"window": (256, 0), "mask": padding, "bias": padding.astype(np.float32)}
    elif case == "causal":
        operands = arrays((1, tokens, 8), (1, tokens, 8), (1, tokens, 8))
        options = {"is_causal": True}
    elif case == "decode":
        operands = arrays((8, 1, 128), (2, tokens, 128), (2, tokens, 128))
        options = {"mask": padding, "alibi_slopes": rng.random(8), "query_offset": tokens - 1}
    elif case in ("many heads", "most heads"):
        heads = 16 if case == "many heads" else 1024
        operands = arrays((heads, 16, 128), (1, tokens // 8, 128), (1, tokens // 8, 128))
        options = {"return_lse": True}
    elif case.startswith("every argument"):
        dtype = case.split()[-1]
        operands = [x.astype(dtype) for x in arrays(*[(heads, tokens, 16) for heads in (2, 1, 1)])]
        options = {"is_causal": True, "query_offset": [9], "window": (256, 3), "scale": 0.3}
        options |= {"mask": padding, "bias": padding.astype(np.float32), "kv_lengths": [tokens]}
        options |= {"softcap": 30.0, "sinks": np.zeros(2), "alibi_slopes": np.ones((1, 2))}
        options |= {"dropout_p": 0.1, "seed": 0, "return_lse": True}
    elif case == "interleaved":  # as (batch, length, heads, head_dim)
        operands = [x.swapaxes(1, 2) for x in arrays(*[(tokens, heads, 64) for heads in (4, 2, 2)])]
        options = {"window": (256, 0)}
    else:
        operands = arrays((2, tokens, 64), (2, 300, 64), (2, 300, 64))
        options = {"softcap": 30.0, "return_lse": True}
    out = np.ones((*operands[0].shape[:-1], operands[2].shape[-1]), operands[0].dtype)
    fastattn.attention(*[array[..., :64, :] for array in operands])
    before = peak_so_far()
    fastattn.attention(*operands, out=out, **options)
    return status("VmHWM") - before


CASES = ["window", "causal", "decode", "few keys", "many heads", "most heads", "interleaved"]


@pytest.mark.promise(
    "forward-memory", "no-array-of-pairs", "nothing-is-expanded", "arrays-are-read-where-they-lie"
)
@pytest.mark.parametrize(
    "case", [*CASES, *(f"every argument, {dtype}" for dtype in ("float32", "float16", "bfloat16"))]
)
def test_peak_memory_at_131072_tokens(case):
    assert run(peak, case, timeout=120) < 16 * MIB


def scratch_of_every_size(isa, dtype):
    """Return the most memory that calls of many queries would need in 1 to 256 threads."""
    _core.set_isa(isa)
    most = 0
    dims = ((8, 8), (33, 40), (64, 64), (128, 128), (192, 128), (256, 256), (576, 512), (576, 576))
    shapes = ((1, 17, 100_000), (2, 130, 5000), (8, 2000, 4096))
    for (heads, q_len, kv_len), (dim, value_dim) in itertools.product(shapes, dims):
        for kv_dtype in {dtype, "float16"} if dtype == "float32" else {dtype}:
            query = np.broadcast_to(np.zeros(dim, dtype), (heads, q_len, dim))
            key = np.broadcast_to(np.zeros(dim, kv_dtype), (heads, kv_len, dim))
            value = np.broadcast_to(np.zeros(value_dim, kv_dtype), (heads, kv_len, value_dim))
            masked = {"mask": np.ones(kv_len, bool), "bias": np.zeros((q_len, 1), np.float32)}
            for threads in (1, 2, 3, 16, 31, 64, 96, 128, 200, 255, 256):
                fastattn.set_num_threads(threads)
                causal = {"is_causal": True, "query_offset": kv_len - q_len}
                for options in ({}, causal, masked if q_len == 17 else {}):
                    report = fastattn.explain(query, key, value, **options)
                    most = max(most, report["scratch_bytes"])
                    assert report["threads"] >= min(threads, 12)
    return most


@pytest.mark.promise("forward-memory")
@each_isa
@each_dtype
def test_memory_stays_small_with_many_threads(isa, dtype):
    """Blocks narrow as threads grow; where the narrowest are too wide, the team is smaller."""
    assert 14 * MIB < run(scratch_of_every_size, isa, dtype) < 16 * MIB


def peak_of_shared_keys(threads):
    """Return what `peak` does where threads share the keys of one block."""
    fastattn.set_num_threads(threads)
    query, key = (np.ones((1, n, 64), np.float32) for n in (17, 262144))
    out = np.zeros_like(query)
    fastattn.attention(*[np.ones((1, 512, 64), np.float32)] * 3)
    before = peak_so_far()
    fastattn.attention(query, key, key, out=out)
    return status("VmHWM") - before


@pytest.mark.promise("forward-memory")
@pytest.mark.parametrize("threads", [2, 64])
def test_peak_memory_of_shared_keys(threads):
    assert run(peak_of_shared_keys, threads) < 16 * MIB


# (batch, heads, kv_heads, q_len, kv_len, head_dim, value_head_dim)
DECODED = [
    (1, 128, 1, 1, 65536, 576, 512),
    (64, 128, 1, 1, 8192, 576, 512),
    (1, 128, 1, 2, 65536, 576, 576),
    (16, 16, 1, 1, 16384, 576, 576),
    (64, 32, 8, 1, 8192, 128, 128),
    (64, 32, 32, 1, 65536, 128, 128),
    (1, 128, 128, 16, 131072, 128, 128),
    (1, 32, 8, 16, 8192, 128, 128),
    (1, 8, 8, 16, 300000, 8, 8),
    (4096, 8, 8, 1, 512, 64, 64),
]


def scratch_of_decoding(isa, dtype):
    """Return the most memory that calls of few queries would need in 1 to 256 threads."""
    _core.set_isa(isa)
    most = 0
    for batch, heads, kv_heads, q_len, kv_len, head_dim, value_head_dim in DECODED:
        shapes = (
            (batch, heads, q_len, head_dim),
            (batch, kv_heads, kv_len, head_dim),
            (batch, kv_heads, kv_len, value_head_dim),
        )
        operands = [np.broadcast_to(np.zeros((), dtype), shape) for shape in shapes]
        for threads in (1, 2, 3, 16, 32, 64, 96, 128, 255, 256):
            fastattn.set_num_threads(threads)
            report = fastattn.explain(*operands)
            most = max(most, report["scratch_bytes"])
            assert report["threads"] >= 2 / 3 * min(threads, 32)
    return most


@pytest.mark.promise("forward-memory")
@each_isa
@each_dtype
def test_memory_of_decoding_stays_small_with_many_threads(isa, dtype):
    """Rows are cut as threads grow, down to one vector of them; then the team is smaller."""
    assert 12 * MIB < run(scratch_of_decoding, isa, dtype) < 16 * MIB


def peak_of_statistics():
    """Return what `peak` does for all statistics of 131072 tokens at once, and their size."""
    fastattn.set_num_threads(2)
    tokens = 131072
    query, key = np.random.default_rng(0).random((2, 1, tokens, 8), np.float32)
    blocks = (np.arange(0, tokens, 512), np.arange(0, tokens, 512))
    asked = {"entropy": True, "maximum": True, "column_sums": True, "top": 8, "blocks": blocks}
    fastattn.attention_statistics(query[:, :300], key[:, :300], top=1)
    before = peak_so_far()
    found = fastattn.attention_statistics(query, key, is_causal=True, window=(9999, 0), **asked)
    return status("VmHWM") - before, sum(x.nbytes for x in found)


@pytest.mark.promise("statistics-memory", "no-array-of-pairs")
def test_peak_memory_of_statistics():
    needed, size = run(peak_of_statistics, timeout=120)
    assert needed - size < 64 * MIB
    assert size < 64 * MIB


def peak_of_packed_sequences():
    """Return what `peak` does for sequences that would be 4 GiB if they were padded."""
    fastattn.set_num_threads(2)
    starts = np.cumsum([0, *[64] * 1000, 65536])
    query = np.random.default_rng(0).random((starts[-1], 2, 8), np.float32)
    options = {"window": (256, 0), "out": np.ones_like(query)}
    fastattn.varlen_attention(*[query[:64]] * 3, [0, 64], [0, 64])
    before = peak_so_far()
    fastattn.varlen_attention(query, query, query, starts, starts, **options)
    return status("VmHWM") - before


@pytest.mark.promise("packed-needs-no-padding")
def test_peak_memory_of_packed_sequences():
    assert run(peak_of_packed_sequences) < 16 * MIB


def peak_of_gradients(heads, dtype):
    """Return what `peak` does for gradients, beside these, of 32768 queries in two threads."""
    fastattn.set_num_threads(2)
    shapes = [(1, n, 32768, 64) for n in (heads, 2, 2)]
    rng = np.random.default_rng(0)
    operands = [rng.random(shape, np.float32).astype(dtype) for shape in shapes]
    options = {"window": (256, 3), "softcap": 30.0}
    out, lse = fastattn.attention(*operands, return_lse=True, **options)
    few = [x[..., :64, :] for x in (out, *operands, out)]
    fastattn.attention_backward(*few, lse[..., :64], **options)
    before = peak_so_far()
    grads = fastattn.attention_backward(out, *operands, out, lse, **options)
    return status("VmHWM") - before - sum(x.nbytes for x in grads)


@pytest.mark.promise("gradient-memory", "no-array-of-pairs")
@pytest.mark.parametrize(
    ("heads", "dtype"), [(2, "float32"), (8, "float32"), (2, "float16"), (2, "bfloat16")]
)
def test_peak_memory_of_gradients(heads, dtype):
    """Each thread has 2 MiB, and sums for the queries of a key head: together at most 64 MiB."""
    sums_of_a_key_head = heads // 2 * 32768 * 64 * 4
    allowed = min(2 * sums_of_a_key_head, 64 * MIB) + 2 * 2 * MIB
    assert run(peak_of_gradients, heads, dtype) < allowed + 2 * MIB  # of the process's own


# No memory.


def meet_a_limit(warm):
    """Call with no address space left for the scratch memory, and again with enough."""
    fastattn.set_num_threads(2)
    query = np.random.default_rng(0).random((1, 2, 96, 80000), np.float32)
    out = np.full_like(query, np.nan)
    if warm:
        fastattn.attention(*[query[..., :64]] * 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 64 * 1024, hard))
    with pytest.raises(MemoryError):
        fastattn.attention(query, query, query, out=out)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert np.isnan(out).all()
    fastattn.attention(query, query, query, out=out)
    expected = fastattn.reference.attention(query, query, query)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.promise("no-memory-is-an-error")
@pytest.mark.parametrize("warm", [True, False], ids=["threads running", "first call"])
def test_no_memory(warm):
    run(meet_a_limit, warm)


def meet_a_limit_on_threads(megabytes):
    """Call, for the first time, with memory for the scratch but not for all the threads' stacks."""
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


@pytest.mark.promise("no-memory-is-an-error", "missing-threads-are-no-error")
@pytest.mark.parametrize("megabytes", [4, 12, 20, 28])
def test_no_memory_for_threads(megabytes):
    run(meet_a_limit_on_threads, megabytes)


@pytest.mark.parametrize("size", ["40M", "64 m", "many", "1G", "40000", "50000000B"])
def test_no_memory_for_large_stacks(size):
    run(meet_a_limit_on_threads, 100, env={"OMP_STACKSIZE": size})


def meet_a_limit_on_processes(most):
    """Call with more threads than the user may have; return how many there were."""
    query = np.random.default_rng(0).random((1, 16, 512, 64), np.float32)
    fastattn.set_num_threads(2)
    expected = fastattn.attention(query, query, query)
    if os.getuid() == 0:
        os.setuid(2**20 + os.getpid())  # a user without other processes; root has no such limit
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, hard))
    fastattn.set_num_threads(12)
    for _ in range(3):
        assert np.array_equal(fastattn.attention(query, query, query), expected)
    return tasks()


@pytest.mark.promise("missing-threads-are-no-error")
@pytest.mark.parametrize("most", range(1, 13))
def test_no_processes_for_threads(most):
    # This thread, the owner of the team and a first member are there before the limit.
    env = {"OPENBLAS_NUM_THREADS": "1"}
    assert run(meet_a_limit_on_processes, most, env=env) <= max(most, 3)


def compute_with_small_stacks(isa, dtype):
    """Run wide heads and many features on threads whose stacks are small."""
    _core.set_isa(isa)
    rng = np.random.default_rng(0)
    gate = {"float16": 2e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    for head_dim in (64, 257, 1024):
        query = rng.normal(size=(1, 4, 130, head_dim)).astype(dtype)
        options = {"mask": rng.random((130, 130)) < 0.8, "is_causal": True, "softcap": 20.0}
        options["alibi_slopes"] = np.full(4, 0.1)
        out = fastattn.attention(query, query, query, **options)
        expected = fastattn.reference.attention(query, query, query, **options)
        np.testing.assert_allclose(out.astype(float), expected.astype(float), rtol=gate, atol=gate)


@pytest.mark.promise("small-stacks-suffice")
@each_isa
@each_dtype
def test_small_thread_stacks(isa, dtype):
    env = {"OMP_STACKSIZE": "96k", "FASTATTN_NUM_THREADS": "4"}
    run(compute_with_small_stacks, isa, dtype, env=env)


def digest(isa):
    """Return a digest of results and gradients of few and of many queries in every dtype."""
    _core.set_isa(isa)
    seen = hashlib.sha256()
    for dtype in ("float16", ml_dtypes.bfloat16, "float32", "float64"):
        for heads, kv_heads, q_len, kv_len, dim, value_dim in SIZES:
            rng = np.random.default_rng(0)
            shapes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim))
            operands = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
            options = {"bias": rng.standard_normal((q_len, kv_len)), "softcap": 3.0}
            out, lse = fastattn.attention(*operands, **options, return_lse=True)
            grads = fastattn.attention_backward(
                np.ones_like(out), *operands, out, lse, **options, return_dbias=True
            )
            for x in (out, lse, *grads):
                seen.update(np.ascontiguousarray(x).view(np.uint8))
    return seen.hexdigest()


@pytest.mark.promise("bitwise-fresh-memory")
@each_isa
def test_no_memory_is_read_before_it_is_written(isa):
    """What malloc returns can be filled, by glibc, with any byte."""
    results = [run(digest, isa, env={"MALLOC_PERTURB_": byte}) for byte in ("0", "1", "170")]
    assert len(set(results)) == 1
