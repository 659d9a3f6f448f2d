# SPDX-License-Identifier: Apache-2.0
"""A call's arguments, checked, in the form that kernels take: four axes, addresses and strides.

Called by `_attention.py`. The rules are those of `fastattn/_arguments.py`, asked about stand-ins of
the same shapes and dtypes: what lies on the GPU is not looked at. Values that the host has are
checked, those that the device has are clamped by the kernels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastattn._arguments import (
    FARTHEST,
    FLOAT_NAMES,
    MASK_NAMES,
    WIDEST,
    Sizes,
    check,
    dropout,
    per_batch,
)
from fastattn._arrays import BFLOAT16_BITS, library_of
from fastattn._options import OFFSETS, CallOptions, Options
from fastattn.cuda import _choose
from fastattn.cuda._arrays import DeviceArray, device_array, item_bytes
from fastattn.cuda.kernels import MOST_LENGTH

Shape = tuple[int, ...]
MOST_HEAD_DIM = 2**16  # sums of a thread fit the 512 KiB of local memory that it may have
LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
INTEGERS = ("int64", "int32", "int16", "int8", "uint32", "uint16", "uint8")
PAIR_ARRAYS = {"mask": MASK_NAMES, "bias": FLOAT_NAMES}  # on the GPU, of these dtypes
SMALL_ARRAYS = {  # that the host may have; if not, of these dtypes
    "query_offset": INTEGERS,
    "kv_lengths": INTEGERS,
    "alibi_slopes": FLOAT_NAMES,
    "sinks": FLOAT_NAMES,
}


class DeviceOptions(NamedTuple):
    """The options of a call on a GPU, as they were checked; arrays with their batch axes."""

    shapes: Sizes
    mask: DeviceArray | None
    bias: DeviceArray | None
    alibi_slopes: Any  # from here: on the GPU, or NumPy arrays of the host's, or None
    sinks: Any
    lengths: Any  # one per batch element
    offsets: Any  # from the first key on
    key_offsets: Any  # for dropout
    length: int  # of all, where not one per batch element
    offset: int
    key_offset: int
    left: int  # WIDEST if unlimited
    right: int
    scale: float
    softcap: float  # 0: none
    dropout_p: float
    seed: int
    head_offset: int
    batch_offset: int

    @property
    def only_simt(self) -> tuple[str, ...]:
        """Return the options given that only the simt kernel knows."""
        names = ("mask", "bias", "alibi_slopes", "sinks")
        given = [name for name in names if getattr(self, name) is not None]
        return (*given, *(["dropout_p"] if self.dropout_p else []))

    @property
    def may_hide(self) -> bool:
        """Tell whether there may be a key that some row does not see."""
        sides = min(self.left, self.right) < WIDEST
        return sides or self.lengths is not None or self.length < self.shapes.kv_len


def device_options(
    query: DeviceArray, key: DeviceArray, value: DeviceArray, options: Options, stream: int
) -> DeviceOptions:
    """Check the options of a call on arrays of a GPU."""
    on_gpu = {
        name: device_array(name, x, stream, query, dtypes)
        for name, dtypes in (PAIR_ARRAYS | SMALL_ARRAYS).items()
        if (x := getattr(options, name)) is not None and (name in PAIR_ARRAYS or _is_on_gpu(x))
    }
    arrays = {"query": query, "key": key, "value": value, **on_gpu}
    facts = tuple((name, x.shape, x.dtype) for name, x in arrays.items())
    host = options._replace(dropout_p=0.0, seed=None, **dict.fromkeys(on_gpu))
    # An array of the host's may hold other numbers at the next call; in a pair, True is like 1.
    small = (getattr(host, name) for name in (*SMALL_ARRAYS, *OFFSETS))
    are_constant = all(x is None or isinstance(x, int | float) for x in small) and (
        not isinstance(host.window, tuple) or all(x is None or type(x) is int for x in host.window)
    )
    try:
        shapes, checked = (_remembered if are_constant else _checked)(facts, *host)
    except TypeError:  # something cannot be hashed, or is wrong, which is then said again
        shapes, checked = _checked(facts, *host)
    for name, array in (("query", query), ("value", value)):
        if array.shape[-1] > MOST_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head_dim of at most 2**16 on a GPU, got "
                f"{name}.shape={array.shape}: fastattn.attention computes it on the CPU"
            )
    dropout_p, seed = dropout(options.dropout_p, options.seed)
    lengths, offsets = checked.kv_lengths, checked.query_offset
    first_keys = per_batch("key_offset", options.key_offset, shapes, -FARTHEST, FARTHEST, 0)
    if first_keys is not None and "query_offset" in on_gpu:
        raise NotImplementedError(
            "key_offset beside a query_offset that is on the GPU has no kernel: subtract it there"
        )
    if dropout_p == 0:  # only its counters have positions, and not distances alone
        first_keys = None
    scale, softcap = checked.scale, checked.softcap
    if query.dtype != "float64":
        scale = within_float32(scale)
        softcap = max(softcap, LEAST) if softcap else softcap
    return DeviceOptions(
        shapes,
        on_gpu.get("mask"),
        on_gpu.get("bias"),
        on_gpu.get("alibi_slopes", checked.alibi_slopes),
        on_gpu.get("sinks", checked.sinks),
        on_gpu.get("kv_lengths", _unlike(lengths)),
        on_gpu.get("query_offset", _unlike(offsets)),
        _unlike(first_keys),
        shapes.kv_len if lengths is None or not lengths.size else int(lengths.flat[0]),
        0 if offsets is None or not offsets.size else int(offsets.flat[0]),
        0 if first_keys is None or not first_keys.size else int(first_keys.flat[0]),
        WIDEST if checked.left < 0 else checked.left,
        WIDEST if checked.right < 0 else checked.right,
        scale,
        softcap,
        dropout_p,
        seed,
        checked.head_offset,
        checked.batch_offset,
    )


def _is_on_gpu(x: Any) -> bool:
    return not isinstance(x, int | float | list | np.ndarray) and library_of(x).on_gpu


def _unlike(numbers: Any) -> Any:
    """Return numbers that are not all the same."""
    return None if numbers is None or (numbers == numbers.flat[0]).all() else numbers


def wide_dtype(dtype: str) -> str:
    """Return the dtype that a query's dtype is computed in: that of lse."""
    return "float64" if dtype == "float64" else "float32"


def within_float32(x: float) -> float:
    """Return the number nearest to x that float32 has in full precision, or 0."""
    return max(-MOST, min(x, MOST)) if abs(x) >= LEAST else 0.0


def stand_in(shape: Shape, dtype: str) -> Any:
    """Return an array of zeros that takes no memory."""
    kind = BFLOAT16_BITS if dtype == "bfloat16" else np.dtype(dtype)
    return np.broadcast_to(np.zeros((), kind), shape)


def _checked(arrays: tuple[tuple[str, Shape, str], ...], *host: Any) -> tuple[Sizes, CallOptions]:
    """Ask the rules about a call with these arrays on the GPU and these options of the host."""
    given = {name: stand_in(shape, dtype) for name, shape, dtype in arrays}
    query, key, value = (given.pop(name) for name in ("query", "key", "value"))
    return check(query, key, value, Options(*host)._replace(**given))[3:]


# typed: True is not 1 to the rules.
_remembered = functools.lru_cache(maxsize=1024, typed=True)(_checked)


def question(
    query: DeviceArray,
    key: DeviceArray,
    value: DeviceArray,
    options: DeviceOptions,
    capability: tuple[int, int],
) -> _choose.Question:
    """Return what the choice of a kernel depends on."""
    kv_heads = key.shape[-3] if len(key.shape) > 2 else 1
    sides = [side for side in (options.left, options.right) if side != WIDEST]
    return _choose.Question(
        query.dtype,
        key.dtype,
        query.shape[-1],
        value.shape[-1],
        options.shapes.q_len,
        options.shapes.kv_len,
        max(1, options.shapes.q_heads // max(1, kv_heads)),
        options.only_simt,
        options.scale,
        max(abs(options.offset), *sides, 0) > MOST_LENGTH,
        capability,
    )


# --- The call in kernels' form -------------------------------------------------------------------


class Problem(NamedTuple):
    """A call as kernels take it: arrays of (batch, heads, length, dim), or what is left of these.

    Where axes broadcast, strides are 0. None is absent.
    """

    query: DeviceArray
    key: DeviceArray
    value: DeviceArray
    out: DeviceArray
    lse: DeviceArray
    mask: DeviceArray | None
    bias: DeviceArray | None
    alibi_slopes: DeviceArray | None  # (batch, heads)
    sinks: DeviceArray | None  # (heads,)
    lengths: DeviceArray | None  # (batch,), of any integers
    offsets: DeviceArray | None
    key_offsets: DeviceArray | None
    options: DeviceOptions
    first_batch: int  # the number of element 0 in the whole batch
    more: Any = ()  # a named tuple of a gradient's arrays: as out, or as lse

    @property
    def batch(self) -> int:
        """The number of batch elements."""
        return self.query.shape[0]

    @property
    def group(self) -> int:
        """The number of query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]


def problems(
    query: DeviceArray,
    key: DeviceArray,
    value: DeviceArray,
    out: DeviceArray,
    lse: DeviceArray,
    options: DeviceOptions,
    more: Any = (),
) -> Iterator[Problem]:
    """Yield the call's launches: one, unless some batch axes broadcast so that they do not join.

    more: a named tuple of other arrays with the batch axes of out, and heads.
    """
    shapes = options.shapes
    batch_shape, ndim = shapes.batch_shape, len(shapes.batch_shape)
    pairs = (*batch_shape, max(shapes.q_heads, 1), shapes.q_len, shapes.kv_len)
    spread: list[Any] = [
        None if x is None else broadcast(x, (*batch_shape, *x.shape[len(x.shape) - kept :]))
        for x, kept in (
            *((with_heads(x), 3) for x in (query, key, value, out)),
            (with_row_heads(lse), 2),
            (options.mask and broadcast(options.mask, pairs), 3),
            (options.bias and broadcast(options.bias, pairs), 3),
            (options.alibi_slopes, 1),
            (options.lengths, 0),
            (options.offsets, 0),
            (options.key_offsets, 0),
            *((x, 0 if x is None else len(x.shape) - ndim) for x in more),
        )
    ]
    axes = joined(batch_shape, [x.strides[:ndim] for x in spread if x is not None])
    for place, first in axes.steps():
        views: list[Any] = [
            None if x is None else view_at(x, batch_shape, axes, place) for x in spread
        ]
        q, k, v, o, stats, mask, bias, slopes, lengths, offsets, first_keys, *others = views
        yield Problem(
            q, k, v, o, stats, mask, bias, slopes, options.sinks, lengths, offsets, first_keys,
            options, first, more._make(others) if more else (),
        )  # fmt: skip


# --- Views ---------------------------------------------------------------------------------------


def broadcast(array: DeviceArray, shape: Shape) -> DeviceArray:
    """Return a view of a shape, with strides of 0 along what is repeated."""
    missing = len(shape) - len(array.shape)
    strides = tuple(
        0 if size == 1 else stride for size, stride in zip(array.shape, array.strides, strict=True)
    )
    return array._replace(shape=shape, strides=(0,) * missing + strides)


def with_heads(array: DeviceArray) -> DeviceArray:
    """Return a view with an axis for heads."""
    if len(array.shape) > 2:
        return array
    return array._replace(shape=(1, *array.shape), strides=(0, *array.strides))


def with_row_heads(lse: DeviceArray) -> DeviceArray:
    """Return a view of (..., heads, rows) with that axis for heads."""
    if len(lse.shape) > 1:
        return lse
    return lse._replace(shape=(1, *lse.shape), strides=(0, *lse.strides))


class Axes(NamedTuple):
    """How several batch axes become one: launches over the outer ones, which do not join."""

    outer: Shape  # sizes
    inner: int

    def steps(self) -> Iterator[tuple[Shape, int]]:
        """Yield each launch's place in the outer axes, and its first batch element's number."""
        for i, place in enumerate(itertools.product(*map(range, self.outer))):
            yield place, i * self.inner


def joined(batch_shape: Shape, strides: list[Shape]) -> Axes:
    """Return how the batch axes join, given those strides of every array; axes of 1 always do."""
    axes = [i for i, size in enumerate(batch_shape) if size != 1]
    first = len(axes) - 1  # of the axes that join
    while first > 0 and all(
        each[axes[first - 1]] == each[axes[first]] * batch_shape[axes[first]] for each in strides
    ):
        first -= 1
    sizes = [batch_shape[i] for i in axes]
    first = max(first, 0)
    return Axes(tuple(sizes[:first]), math.prod(sizes[first:]))


def view_at(array: DeviceArray, batch_shape: Shape, axes: Axes, place: Shape) -> DeviceArray:
    """Return a view of what one launch reads of an array: its batch axes have become one."""
    kept = [i for i, size in enumerate(batch_shape) if size != 1]
    outer = zip(kept, place, strict=False)
    pointer = array.pointer + sum(array.strides[i] * n for i, n in outer) * item_bytes(array.dtype)
    inner = kept[len(place) :]
    stride = array.strides[inner[-1]] if inner else 0
    ndim = len(batch_shape)
    return array._replace(
        pointer=pointer,
        shape=(axes.inner, *array.shape[ndim:]),
        strides=(stride, *array.strides[ndim:]),
    )
