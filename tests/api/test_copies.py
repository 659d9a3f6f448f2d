# SPDX-License-Identifier: Apache-2.0
"""What people copy, save and send is right afterwards, and nothing is shared by accident."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn import KVCache, PagedKVCache
from tests.support.correctness import assert_same_bits

BFLOAT16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)
TOKENS = RNG.standard_normal((2, 3, 2, 150, 8)).astype(np.float32)  # keys and values of three
QUERIES = RNG.standard_normal((3, 4, 3, 8)).astype(np.float32)


# What there is.


def batch(dtype, **options):
    cache = KVCache(3, 2, 8, dtype=dtype, **options)
    given = np.float32 if dtype == np.int8 else dtype
    cache.append(*TOKENS.astype(given), [150, 130, 7])
    cache.evict([150, 20, 150])
    cache.reorder([0, 1, 1])
    return cache


def sequences(dtype, **options):
    """Return a cache whose sequences share beginnings, and do not lie as they were added."""
    cache = PagedKVCache(2, 8, dtype=dtype, **options)
    return shared(cache, np.float32 if dtype == np.int8 else dtype)


def shared(cache, given):
    for _ in range(2):
        cache.add()
    cache.append(*TOKENS[:, :2].astype(given), [150, 140])
    cache.free(0)
    cache.add(1, 135)
    cache.add(1)
    return cache


def foreign(dtype):
    """Return a cache over pages that are the caller's."""
    pages = [np.zeros((9, 2, 128, 8), dtype) for _ in range(2)]
    return shared(PagedKVCache.from_pages(*pages, np.zeros((0, 0), int), 0), dtype)


class Subclass(KVCache):
    """A cache that somebody has added to."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.layers = [1, 2]


def subclass():
    cache = Subclass(3, 2, 8)
    cache.append(*TOKENS)
    cache.name = "given later"
    return cache


def results():
    return fastattn.attention(QUERIES, *TOKENS, return_lse=True)


OBJECTS = {
    "KVCache": lambda: batch(np.float32),
    "KVCache of bfloat16": lambda: batch(BFLOAT16),
    "KVCache of int8": lambda: batch(np.int8),
    "KVCache of a capacity": lambda: batch(np.float16, capacity=200),
    "KVCache, subclass": subclass,
    "PagedKVCache": lambda: sequences(np.float32),
    "PagedKVCache of int8": lambda: sequences(np.int8),
    "PagedKVCache of so many pages": lambda: sequences(BFLOAT16, pages=12),
    "PagedKVCache over the caller's pages": lambda: foreign(np.float32),
    "PagedKVCache, empty": lambda: PagedKVCache(2, 8),
    "info": fastattn.info,
    "explain": lambda: fastattn.explain(QUERIES, *TOKENS),
    "out, lse": results,
}


# What is done to it.


def pickled(protocol):
    return lambda x: pickle.loads(pickle.dumps(x, protocol))


def out_of_band(x):
    """Pickle it with its arrays beside, and let the receiver have them in memory that is gone."""
    buffers = []
    data = pickle.dumps(x, 5, buffer_callback=buffers.append)
    memory = [bytearray(buffer.raw()) for buffer in buffers]
    y = pickle.loads(data, buffers=memory)
    if isinstance(x, KVCache | PagedKVCache):
        for space in memory:
            space[:] = b"\xff" * len(space)
    return y


def read_only_buffers(x):
    buffers = []
    data = pickle.dumps(x, 5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])


def saved_by_torch(x, weights_only=False):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def weights_only(x):
    return saved_by_torch(x, weights_only=True)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {protocol}": pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
    "pickle, out of band": out_of_band,
    "pickle, read-only buffers": read_only_buffers,
    "torch.save": saved_by_torch,
    "torch.save, weights only": weights_only,
}
RIGHT = "an object of its own"
# All else is RIGHT.
PROMISED = {
    (name, "torch.save, weights only"): pickle.UnpicklingError  # no code but torch's may run there
    for name in OBJECTS
}


# Whether it is right.


def attended(cache):
    """Return what the cache attends to, whatever its dtype, of all its sequences."""
    queries = QUERIES[: len(cache.lengths)]
    return cache.attend(queries, return_lse=True) if len(queries) else ()


def appended(cache, seed):
    """Append other tokens to each sequence, and one more to those that share a page."""
    given = np.float32 if cache.dtype == np.int8 else cache.dtype
    x = np.random.default_rng(seed).standard_normal((2, len(cache.lengths), 2, 9, 8)).astype(given)
    cache.append(*x)
    return attended(cache)


def facts(cache):
    names = ("batch", "capacity", "kv_heads", "head_dim", "value_head_dim", "dtype", "page_size")
    pool = getattr(cache, "_cache", cache)
    return {
        "lengths": cache.lengths.tolist(),
        "begins": cache.begins.tolist(),
        "sequences": pool.sequences,
        "used": pool.used_pages,
        "fixed": pool._pool.fixed and (pool.free_pages, pool.nbytes),
        **{name: getattr(cache, name) for name in names if hasattr(cache, name)},
        **{name: getattr(cache, name) for name in ("layers", "name") if hasattr(cache, name)},
    }


def assert_is_a_cache_of_its_own(x, y):
    assert type(y) is type(x)
    assert facts(y) == facts(x)
    before = attended(x)
    assert_same_bits(attended(y), before)
    after = appended(y, 1)
    assert_same_bits(attended(x), before)
    assert facts(x)["lengths"] != facts(y)["lengths"] or not before
    other = appended(x, 2)
    assert_same_bits(attended(y), after)
    if before:
        assert not np.array_equal(other[1], after[1])
    again = copy.copy(x)  # of what has been changed since
    assert_same_bits(attended(again), other)


def assert_right(x, y):
    if isinstance(x, KVCache | PagedKVCache):
        assert_is_a_cache_of_its_own(x, y)
    elif isinstance(x, tuple):
        assert_same_bits(y, x)
    else:
        assert (type(y), y, str(y)) == (type(x), x, str(x))
        y["isa"] = "another"
        assert x["isa"] != "another"


@pytest.mark.promise("copies-are-their-own")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OBJECTS)
def test_copies(name, way):
    x = OBJECTS[name]()
    promised = PROMISED.get((name, way), RIGHT)
    if promised is RIGHT:
        assert_right(x, WAYS[way](x))
        return
    with pytest.raises(promised):
        WAYS[way](x)


def test_every_public_class_is_in_the_table():
    made = {type(make()) for make in OBJECTS.values()}
    public = {name: getattr(fastattn, name) for name in fastattn.__all__}
    missing = {x for x in public.values() if isinstance(x, type)} - made
    assert not missing
    # All else has no state: functions, the module of the definition, and the version.
    stateless = types.FunctionType | types.ModuleType | str
    for name, x in public.items():
        assert isinstance(x, type | stateless), f"{name} is an object, and needs a row"
        if isinstance(x, types.FunctionType):
            assert pickle.loads(pickle.dumps(x)) is x


# Other processes.


def echoed(objects):
    """Attend in another process, and send back what came and what came of it."""
    return [(x, attended(x)) if hasattr(x, "attend") else (x, None) for x in objects]


@pytest.mark.promise("copies-are-their-own")
def test_sent_to_another_process():
    objects = [make() for name, make in OBJECTS.items()]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answers = pool.apply(echoed, (objects,))
    for x, (y, there) in zip(objects, answers, strict=True):
        if there is not None:
            assert_same_bits(there, attended(x))
        assert_right(x, y)


def test_a_process_need_not_have_imported_the_dtype():
    """The pickle of a cache of bfloat16 brings ml_dtypes along."""
    data = pickle.dumps(batch(BFLOAT16))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).dtype)"
    result = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True)
    assert result.stdout == b"bfloat16\n", result.stderr


# What a pickle holds.


def test_a_pickle_holds_what_is_used():
    cache = KVCache(1, 2, 64, capacity=100_000)
    x = RNG.standard_normal((1, 2, 5, 64)).astype(np.float32)
    cache.append(x, x)
    page = cache.nbytes // (cache._cache.free_pages + 1)
    assert page < len(pickle.dumps(cache)) < 1.1 * page + 2000
    again = pickle.loads(pickle.dumps(cache))
    assert again.nbytes == cache.nbytes
    assert again.capacity == 100_000


def test_equal_caches_have_equal_pickles():
    """As programs that hash what they keep expect, whatever happened before."""
    at_once, by_tokens = KVCache(3, 2, 8), KVCache(3, 2, 8, capacity=None)
    at_once.append(*TOKENS)
    by_tokens.append(*TOKENS[:, :, :, :149] * 7)
    by_tokens.truncate(0)
    for token in range(150):
        by_tokens.append(*TOKENS[:, :, :, token : token + 1])
    assert pickle.dumps(at_once) == pickle.dumps(by_tokens) == pickle.dumps(copy.copy(at_once))


@pytest.mark.promise("copies-are-their-own")
def test_one_pickle_may_be_read_twice():
    """From the same buffers, too: each cache has its own memory."""
    buffers = []
    cache = batch(np.float32)
    data = pickle.dumps(cache, 5, buffer_callback=buffers.append)
    first, second = (pickle.loads(data, buffers=buffers) for _ in range(2))
    assert_is_a_cache_of_its_own(first, second)
    assert_is_a_cache_of_its_own(cache, pickle.loads(data, buffers=buffers))


@pytest.mark.promise("copies-are-their-own")
def test_the_pages_of_a_caller_stay_the_callers():
    pages = [np.zeros((4, 2, 128, 8), np.float32) for _ in range(2)]
    cache = PagedKVCache.from_pages(*pages, [[2]], [3])
    for way in (copy.copy, copy.deepcopy, pickled(5)):
        other = way(cache)
        assert other.free_pages == cache.free_pages
        other.append(*TOKENS[:, :1])
        assert not any(x.any() for x in pages)


def test_copies_within_other_objects():
    """One cache in two places is one cache in two places of the copy, with what refers to it."""
    cache = subclass()
    cache.layers.append(cache)
    for way in (copy.deepcopy, pickled(5)):
        first, second = way([cache, cache])
        assert first is second
        assert first is not cache
        assert first.layers[:2] == [1, 2]
        assert first.layers[2] is first
        assert first.layers is not cache.layers
    assert copy.copy(cache).layers is cache.layers  # as a copy that is not deep does


def test_a_report_that_is_copied_is_a_report():
    report = fastattn.info()
    other = report.copy()
    assert str(other) == str(report)
    other["isa"] = "another"
    assert report["isa"] != "another"
