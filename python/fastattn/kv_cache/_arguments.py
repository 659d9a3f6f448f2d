# SPDX-License-Identifier: Apache-2.0
"""What may a cache be given? The rules about options of a call are those of `attention`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._arguments import (
    FARTHEST,
    MOST_DIM,
    MOST_ELEMENTS,
    as_array,
    integers,
    may_share_memory,
    of_dtypes,
    overlaps_itself,
    whole_number,
)
from fastattn.kv_cache._pool import slots_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastattn.kv_cache._pool import Array, PagePool

PAGE_TOKENS = 128  # kPageKeys of cpp/dtype.h: the kernel's tiles of keys lie within one page
DTYPES = ("float16", "bfloat16", "float32", "int8")
TOKEN_DTYPES = {  # by the cache's dtype: those of the keys and values that it is given
    name: ("float16", "bfloat16", "float32") if name == "int8" else (name,) for name in DTYPES
}
QUERY_DTYPES = {
    name: names if "float32" in names else (*names, "float32")
    for name, names in TOKEN_DTYPES.items()
}
ARRAYS = ("key", "value", "key_scale", "value_scale")  # of a pool, in this order


def at_least_one(name: str, x: Any) -> int:
    """Return x as an int, if it is 1 or more."""
    number = whole_number(name, x)
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {name}={x}")
    return number


def per_sequence(name: str, x: Any, n: int, low: Any, high: Any, rule: str) -> NDArray[np.int64]:
    """Return n integers of a number or of n numbers, if they are within low..high."""
    array, least, most = integers(name, x, (n,), 0)
    if least >= 0 and most <= FARTHEST:
        values = np.array(np.broadcast_to(array, (n,)), dtype=np.int64)
        if ((values >= low) & (values <= high)).all():
            return values
    raise ValueError(f"{name} must be within {rule} = {low}..{high}, got {x}")


def positions_of(query_offset: Any, n: int) -> NDArray[np.int64]:
    """Return the positions of n sequences' first queries, as they were given."""
    array, least, most = integers("query_offset", query_offset, (n,), 0)
    if least < -FARTHEST or most > FARTHEST:
        far = least if least < -FARTHEST else most
        raise ValueError(f"query_offset must be within -2**61..2**61, got {far}")
    return np.array(np.broadcast_to(array, (n,)), dtype=np.int64)


def rows_of_tables(
    pool: PagePool, tables: Any, lengths: Any, begins: Any = 0, parts: Any = None
) -> tuple[Array, Array, Array, Array, Array]:
    """Return what `PagePool.take_rows` takes, if the pool has the pages that the tables name."""
    table = as_array("tables", tables, "integers")
    if table.dtype.kind not in "iu":
        raise TypeError(f"tables must be an array of integers, not {table.dtype.name}")
    if table.ndim != 2:
        raise ValueError(f"tables must have shape (batch, columns), got tables.shape={table.shape}")
    table = table.copy()  # another thread may change what the caller has
    n, columns = table.shape
    most = columns * pool.page_size
    if parts is None:
        parts = np.zeros((n, 4), np.int64)
        ends = per_sequence("lengths", lengths, n, 0, most, "0..columns x page_size")
    else:
        ends = per_sequence("lengths", lengths, n, 0, FARTHEST, "0..2**61")
    firsts = per_sequence("begins", begins, n, 0, ends, "0..lengths")
    parts = _parts(parts, firsts, ends, most)
    pages = len(pool.counts)
    named = pool.named(firsts, ends, parts, columns)
    wrong = table[named & ((table < 0) | (table >= pages))]
    if wrong.size:
        raise ValueError(f"tables must be within 0..pages - 1 = 0..{pages - 1}, got {wrong[0]}")
    return table, named, firsts, ends, parts


def _parts(parts: Any, begins: Array, lengths: Array, most: int) -> Array:
    """Return the parts of sequences, if both lie in so many slots, the first before the newest."""
    shape = (len(begins), 4)
    if not isinstance(parts, np.ndarray) or parts.dtype != np.int64 or parts.shape != shape:
        raise ValueError(f"parts must be an int64 array of shape {shape}")
    near = (parts >= -FARTHEST).all() and (parts <= FARTHEST).all()
    (begin, end), (first_begin, first_end) = slots_of(begins, lengths, parts)
    ordered = (first_begin >= 0) & (first_begin <= first_end) & (first_end <= begin) & (end <= most)
    ordered &= (parts[:, 1] >= 0) & (parts[:, 2] <= begins)
    ordered &= (first_begin < first_end) | ~parts[:, 1:].any(axis=1)
    if not (near and ordered.all()):
        raise ValueError(
            f"parts must lie in 0..columns x page_size = 0..{most}, one after the other"
        )
    return parts


def new_arrays(
    kv_heads: Any, head_dim: Any, pages: Any, page_size: Any, dtype: Any, value_head_dim: Any
) -> list[Array]:
    """Return the arrays of a pool whose pages are allocated now; pages None: it has none yet."""
    kv_heads = at_least_one("kv_heads", kv_heads)
    dims = [at_least_one("head_dim", head_dim)]
    pages = 0 if pages is None else at_least_one("pages", pages)
    page_size = _page_size(at_least_one("page_size", page_size))
    held: np.dtype[Any] = np.dtype(dtype)
    if held.name not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or int8, not {held.name}")
    if value_head_dim is None:
        value_head_dim = head_dim
    dims.append(at_least_one("value_head_dim", value_head_dim))
    for name, dim in zip(("head_dim", "value_head_dim"), dims, strict=True):
        if dim >= MOST_DIM:
            raise ValueError(f"{name} must be below 2**31, got {name}={dim}")
    if max(pages, 1) * kv_heads * page_size * max(dims) >= MOST_ELEMENTS:
        raise ValueError(
            "pages x kv_heads x page_size x head_dim must be below 2**60, got "
            f"{pages} x {kv_heads} x {page_size} x {max(dims)}"
        )
    shape = (pages, kv_heads, page_size)
    arrays: list[Array] = [np.empty((*shape, dim), held.newbyteorder("=")) for dim in dims]
    if held == np.int8:
        arrays += [np.empty(shape, np.float32) for _ in dims]
    return arrays


def given_arrays(
    key: Any, value: Any, key_scale: Any = None, value_scale: Any = None
) -> list[Array]:
    """Return the arrays of a pool over pages that exist, if it can read and write them there."""
    key, value = _page_array("key", key, DTYPES, 4), _page_array("value", value, DTYPES, 4)
    if value.dtype != key.dtype:
        raise TypeError(f"value must have the dtype of key, {key.dtype}, not {value.dtype}")
    shape = key.shape[:3]
    scales = []
    for name, x in (("key_scale", key_scale), ("value_scale", value_scale)):
        if (x is None) == (key.dtype == np.int8):
            raise TypeError(f"{name} must be given with int8 and only then, got {key.dtype} pages")
        if x is not None:
            scales.append(_page_array(name, x, ("float32",), 3))
    for name, x in zip(ARRAYS[1:], (value, *scales), strict=False):
        if x.shape[:3] != shape:
            raise ValueError(
                f"{name} must have the pages, kv_heads and page_size of key, {shape}, "
                f"got {name}.shape={x.shape}"
            )
    for name, x in (("key", key), ("value", value)):
        if 0 in x.shape[1:] or x.shape[3] >= MOST_DIM:
            raise ValueError(
                f"{name} must have kv_heads, a page_size and a head_dim from 1 to below 2**31, "
                f"got {name}.shape={x.shape}"
            )
    _page_size(shape[2])
    arrays = [key, value, *scales]
    named = zip(ARRAYS, arrays, strict=False)
    for (name, x), (other, y) in itertools.combinations(named, 2):
        if may_share_memory(x, y):
            raise ValueError(f"{other} must not overlap {name}, got arrays that share memory")
    return arrays


def _page_size(page_size: int) -> int:
    """Return the page size, if no tile of keys crosses a page of it."""
    if page_size % PAGE_TOKENS:
        raise ValueError(
            f"page_size must be a multiple of {PAGE_TOKENS}, got page_size={page_size}"
        )
    return page_size


def _page_array(name: str, x: Any, dtypes: tuple[str, ...], ndim: int) -> Array:
    """Return an array that can be read and written in place."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(x).__name__}")
    array = of_dtypes(name, x, dtypes)
    if array.ndim != ndim:
        axes = (
            "(pages, kv_heads, page_size, head_dim)"
            if ndim == 4
            else "that of key without head_dim"
        )
        raise ValueError(f"{name} must have shape {axes}, got {name}.shape={array.shape}")
    if not array.flags.writeable or not array.flags.aligned or not array.dtype.isnative:
        raise ValueError(
            f"{name} must be writeable, aligned and in native byte order, got an array that is not"
        )
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(
            f"{name} must be contiguous along its last axis, got {name}.strides={array.strides}"
        )
    if array.size and overlaps_itself(array):
        raise ValueError(f"{name} must not overlap itself, got {name}.strides={array.strides}")
    return array
