# SPDX-License-Identifier: Apache-2.0
"""Is this a valid question? Every rule about the arguments of an attention call, once.

A call asks `check` before anything is computed; it asks `_arrays.py` for what is no NumPy array.
Rules are checked in the order of the arguments, and an error says which argument, the rule, and
what was given. What comes back is in the form that `_core` takes; a valid array is passed on as it
is, strides and all.

A small call must not spend its time here: the fast path asks of each array only whether it is
plainly in order (`floats`), remembers the verdict on shapes (`sizes`), and looks at no option if
none was given.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn import _core
from fastattn._arrays import BFLOAT16_BITS, as_numpy, is_numbers, widened
from fastattn._options import NO_OPTIONS, CallOptions, Options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastattn._arrays import Library

    Array = NDArray[Any]

ndarray = np.ndarray
FLOAT16, FLOAT32, FLOAT64 = map(np.dtype, (np.float16, np.float32, np.float64))
# And ml_dtypes' bfloat16, once it was met: comparing names is slow.
float_dtypes = {FLOAT16, FLOAT32, FLOAT64, BFLOAT16_BITS}
FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")
MASK_NAMES = ("bool", *FLOAT_NAMES)
HALF_NAMES = FLOAT_NAMES[:2]
UNLIMITED = -1
FARTHEST = 2**61  # positions beyond are refused
WIDEST = 2**62  # a side of a window that no position reaches
MOST_ELEMENTS = 2**60  # of a result: its bytes, and every count of rows or blocks, fit 63 bits
MOST_DIM = 2**31  # of a head: scratch memory of any number of threads fits 63 bits
MOST_PAIRS = 2**62  # of a query and a key, that explain counts
OVERLAP_WORK = 10_000  # candidate solutions that numpy.shares_memory may look at


class Sizes(NamedTuple):
    """What the shapes of query, key and value say together."""

    batch_shape: tuple[int, ...]
    q_heads: int
    q_len: int
    kv_len: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    has_pairs: bool
    pairs_shape: tuple[int, ...]  # what mask and bias broadcast to
    unequal: str  # the lengths, if there are not as many queries as keys
    default: CallOptions  # of a call without options


def check(
    query: Any, key: Any, value: Any, options: Options
) -> tuple[Array, Array, Array, Sizes, CallOptions]:
    """Check every argument that says what to compute."""
    query, key, value = floats("query", query), floats("key", key), floats("value", value)
    dtype = query.dtype
    if key.dtype is not dtype or value.dtype is not dtype:
        mixed_dtypes(dtype, key.dtype, value.dtype)
    shapes = sizes(query.shape, key.shape, value.shape)
    return query, key, value, shapes, check_options(shapes, dtype, options)


def check_packed(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any, options: Options
) -> tuple[Array, Array, Array, Sizes, CallOptions, tuple[Array, Array]]:
    """Do what `check` does, of packed arrays; the last item is where their sequences start."""
    query, key, value = floats("query", query), floats("key", key), floats("value", value)
    dtype = query.dtype
    if key.dtype is not dtype or value.dtype is not dtype:
        mixed_dtypes(dtype, key.dtype, value.dtype)
    shapes, q_starts, kv_starts = packed_sizes(query, key, value, cu_seqlens_q, cu_seqlens_kv)
    checked = check_options(shapes, dtype, options)
    if options.kv_lengths is not None:
        given = as_numpy("kv_lengths", options.kv_lengths)
        lengths = given if checked.kv_lengths is None else checked.kv_lengths
        lengths_within(lengths, np.diff(kv_starts))
    return query, key, value, shapes, checked, (q_starts, kv_starts)


def check_options(
    shapes: Sizes, dtype: np.dtype[Any], options: Options, is_placed: bool = False
) -> CallOptions:
    """Check the options of a call whose query has the dtype.

    is_placed: the call itself says where its queries stand among the keys, as a cache does.
    """
    if options is NO_OPTIONS:
        return shapes.default
    (
        mask,
        bias,
        scale,
        is_causal,
        query_offset,
        window,
        softcap,
        alibi_slopes,
        sinks,
        kv_lengths,
        dropout_p,
        seed,
        key_offset,
        head_offset,
        batch_offset,
    ) = options
    left = right = UNLIMITED
    if mask is not None:
        mask = pair_array("mask", mask, MASK_NAMES, shapes)
    if bias is not None:
        bias = pair_array("bias", bias, FLOAT_NAMES, shapes)
    scale = shapes.default.scale if scale is None else finite_number("scale", scale)
    if is_causal is not False and is_causal is not True:
        is_causal = boolean("is_causal", is_causal)
    if window is not None:
        left, right = window_sides(window)
    if is_causal:
        right = 0
    if query_offset is not None:
        query_offset = per_batch("query_offset", query_offset, shapes, -FARTHEST, FARTHEST, 0)
    elif (
        not is_placed
        and shapes.unequal
        and (is_causal or window is not None or alibi_slopes is not None)
    ):
        argument = "is_causal" if is_causal else "alibi_slopes" if window is None else "window"
        raise ValueError(
            f"query_offset must be given with {argument} if q_len differs from kv_len "
            "(0: the first query stands at the first key; kv_len - q_len: the last at the last), "
            f"got {shapes.unequal}"
        )
    if type(key_offset) is int and key_offset == 0:
        key_offset = None
    else:
        key_offset = per_batch("key_offset", key_offset, shapes, -FARTHEST, FARTHEST, 0)
        if key_offset is not None:
            query_offset = between(query_offset, key_offset)
    if softcap is not None:
        softcap = min(positive_number("softcap", softcap), largest_safe(dtype))
    if alibi_slopes is not None:
        shape = (*shapes.batch_shape, shapes.q_heads)
        alibi_slopes = slopes_per_head(alibi_slopes, shapes.q_heads, shape)
        alibi_slopes = filled(alibi_slopes, shape, dtype) if shapes.has_pairs else None
    if sinks is not None:
        sinks = logits_per_head("sinks", sinks, shapes.q_heads)
        sinks = filled(sinks, sinks.shape, dtype) if shapes.has_pairs else None
    if kv_lengths is not None:
        kv_lengths = per_batch("kv_lengths", kv_lengths, shapes, 0, shapes.kv_len, shapes.kv_len)
    if type(dropout_p) is float and dropout_p == 0.0 and seed is None:
        seed = 0
    else:
        dropout_p, seed = dropout(dropout_p, seed)
    if type(head_offset) is not int or head_offset != 0:
        head_offset = counter("head_offset", head_offset)
    if type(batch_offset) is not int or batch_offset != 0:
        batch_offset = counter("batch_offset", batch_offset)
    checked = (
        mask,
        bias,
        alibi_slopes,
        sinks,
        query_offset,
        kv_lengths,
        scale,
        0.0 if softcap is None else softcap,
        left,
        right,
        dropout_p,
        seed,
        key_offset if dropout_p != 0 else None,
        head_offset,
        batch_offset,
    )
    return tuple.__new__(CallOptions, checked)  # calling the class is slow


def floats(name: str, x: Any) -> Array:
    """Return query, key or value as the core takes it: x itself if it can be read in place."""
    if type(x) is ndarray and x.flags.carray and x.dtype in float_dtypes:
        return x
    array = of_dtypes(name, x, FLOAT_NAMES)
    if array.dtype.isnative:
        float_dtypes.add(array.dtype)
    contiguous = array.shape[-1:] <= (1,) or array.strides[-1] == array.itemsize
    if contiguous and array.flags.aligned and array.dtype.isnative:
        return array
    head_dim_within(name, array.shape)  # now: the last axis may be one number, repeated
    return copied(array, array.ndim - 1)


def mixed_dtypes(query: np.dtype[Any], key: np.dtype[Any], value: np.dtype[Any]) -> None:
    """Accept keys and values of half precision for a float32 query."""
    if key != query and not (query == FLOAT32 and name_of(key) in HALF_NAMES):
        raise TypeError(f"key must have the dtype of query, {name_of(query)}, not {name_of(key)}")
    if value != key:
        other = "query" if key == query else "key"
        raise TypeError(
            f"value must have the dtype of {other}, {name_of(key)}, not {name_of(value)}"
        )


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that a query of `dtype` is computed in: that of lse."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def of_dtypes(name: str, x: Any, dtypes: tuple[str, ...]) -> Array:
    """Return the array that x is or stands for, if it has one of the dtypes."""
    kinds = ", ".join(dtypes[:-1]) + " or " + dtypes[-1] if len(dtypes) > 1 else dtypes[0]
    array = as_array(name, x, kinds)
    if name_of(array.dtype) not in dtypes:
        raise TypeError(f"{name} must be an array of {kinds}, not {name_of(array.dtype)}")
    return array


def name_of(dtype: np.dtype[Any]) -> str:
    """Return the dtype's name."""
    return "bfloat16" if dtype == BFLOAT16_BITS else dtype.name


def as_array(name: str, x: Any, kinds: str) -> Array:
    """Return the array that x is or stands for."""
    if type(x) is ndarray:
        return x
    numbers = as_numpy(name, x)
    try:
        array: Array = np.asarray(numbers)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name} must be an array of {kinds}: {error}") from error
    if array.dtype.kind not in "biufcV":
        raise TypeError(f"{name} must be an array of {kinds}, not {type(x).__name__}")
    return array


def copied(array: Array, axes: int) -> Array:
    """Return an aligned, C-contiguous copy; what the first axes repeat is copied once."""
    dtype = array.dtype.newbyteorder("=")
    return np.broadcast_to(np.array(distinct(array, axes), dtype=dtype, order="C"), array.shape)


def distinct(array: Array, axes: int) -> Array:
    """Return the array without what its first axes repeat: all its values, in little memory."""
    strides = array.strides[:axes]
    return array[tuple(slice(1) if stride == 0 else slice(None) for stride in strides)]


def head_dim_within(name: str, shape: tuple[int, ...]) -> None:
    """Accept what scratch memory can be counted for."""
    if shape[-1] >= MOST_DIM:
        raise ValueError(f"{name} must have a head_dim below 2**31, got {name}.shape={shape}")


@functools.lru_cache(maxsize=1024)
def sizes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> Sizes:
    """Return what the three shapes say together, if they fit."""
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 2:
            raise ValueError(
                f"{name} must have 2 axes or more, (batch, heads, length, head_dim) or the last of "
                f"these, got {name}.shape={shape}"
            )
        head_dim_within(name, shape)
    q_len, head_dim = query[-2:]
    kv_len, value_head_dim = value[-2:]
    q_heads, kv_heads, value_heads = (
        shape[-3] if shape[2:] else 1 for shape in (query, key, value)
    )
    if head_dim < 1:
        raise ValueError(f"query must have a head_dim of 1 or more, got query.shape={query}")
    both = f"(key.shape={key}, query.shape={query})"
    if key[-1] != head_dim:
        raise ValueError(f"key has head_dim {key[-1]} but query has head_dim {head_dim} {both}")
    if q_heads != 0 and (kv_heads == 0 or q_heads % kv_heads != 0):
        raise ValueError(
            f"q_heads must be a multiple of kv_heads, got q_heads={q_heads}, kv_heads={kv_heads} "
            f"{both}"
        )
    both = f"(value.shape={value}, key.shape={key})"
    if kv_len != key[-2]:
        raise ValueError(f"value has kv_len {kv_len} but key has kv_len {key[-2]} {both}")
    if value_heads != kv_heads:
        raise ValueError(f"value has {value_heads} heads but key has {kv_heads} {both}")
    got = f"got query.shape={query}, key.shape={key}, value.shape={value}"
    batch_shape = broadcast(query[:-3], key[:-3], value[:-3])
    if batch_shape is None:
        raise ValueError(f"the batch axes of query, key and value must broadcast, {got}")
    counts = (*batch_shape, max(q_heads, kv_heads), q_len, value_head_dim)
    if math.prod(max(count, 1) for count in counts) >= MOST_ELEMENTS:
        raise ValueError(
            f"batch x heads x q_len x value_head_dim must be below 2**60 (0 counts as 1), {got}"
        )
    heads = (q_heads,) if max(len(query), len(key), len(value)) > 2 else ()
    lse_shape = (*batch_shape, *heads, q_len)
    return Sizes(
        batch_shape=batch_shape,
        q_heads=q_heads,
        q_len=q_len,
        kv_len=kv_len,
        out_shape=(*lse_shape, value_head_dim),
        lse_shape=lse_shape,
        has_pairs=0 not in lse_shape and kv_len > 0,
        pairs_shape=(*batch_shape, q_heads, q_len, kv_len),
        unequal="" if q_len == kv_len else f"q_len={q_len}, kv_len={kv_len}",
        default=CallOptions(
            *(None,) * 6, 1 / math.sqrt(head_dim), 0.0, UNLIMITED, UNLIMITED, 0.0, 0, None, 0, 0
        ),
    )


def packed_sizes(
    query: Array, key: Array, value: Array, cu_seqlens_q: Any, cu_seqlens_kv: Any
) -> tuple[Sizes, Array, Array]:
    """Return what the shapes of packed arrays say together, and where their sequences start."""
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    for name, shape in shapes.items():
        if len(shape) != 3:
            raise ValueError(
                f"{name} must have 3 axes, (total, heads, head_dim), got {name}.shape={shape}"
            )
    total, q_heads, head_dim = query.shape
    got = ", ".join(f"{name}.shape={shape}" for name, shape in shapes.items())
    if key.shape[2] != head_dim or head_dim < 1:
        raise ValueError(f"query and key must have one head_dim, of 1 or more, got {got}")
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"key and value must have equal totals and heads, got {got}")
    if q_heads and (key.shape[1] == 0 or q_heads % key.shape[1]):
        raise ValueError(f"query's heads must be a multiple of key's, got {got}")
    q_starts = starts("cu_seqlens_q", cu_seqlens_q, total)
    kv_starts = starts("cu_seqlens_kv", cu_seqlens_kv, len(key))
    if len(q_starts) != len(kv_starts):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_kv must be equally long, got "
            f"{len(q_starts)} and {len(kv_starts)} entries"
        )
    whole = sizes(*((heads, rows, dim) for rows, heads, dim in shapes.values()))
    q_lens, kv_lens = np.diff(q_starts), np.diff(kv_starts)
    longest = int(kv_lens.max(initial=0))
    unlike = np.flatnonzero(q_lens != kv_lens)[:1]
    packed = whole._replace(
        batch_shape=q_lens.shape,
        q_len=int(q_lens.max(initial=0)),
        kv_len=longest,
        out_shape=(total, q_heads, value.shape[2]),
        has_pairs=whole.has_pairs and longest > 0,
        pairs_shape=(q_heads, total, longest),
        unequal="".join(f"q_len={q_lens[i]}, kv_len={kv_lens[i]} in sequence {i}" for i in unlike),
    )
    return packed, q_starts, kv_starts


def starts(name: str, x: Any, total: int) -> Array:
    """Return where the sequences of packed arrays start, and the last one ends."""
    array = as_array(name, x, "integers")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array of integers, not {array.dtype.name}")
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {name}.shape={array.shape}")
    array = array.copy()  # another thread may change what the caller has
    if array[0] < 0 or array[-1] > total:
        raise ValueError(
            f"{name} must be within 0..{total}, the rows there are, got {array[0]}..{array[-1]}"
        )
    wrong = np.flatnonzero(array[1:] < array[:-1])[:1]
    for i in wrong:
        raise ValueError(f"{name} must ascend, got {array[i]} before {array[i + 1]} at {i}")
    return array.astype(np.int64, order="C")


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that the shapes broadcast to; None if they do not."""
    ndim = max(map(len, shapes))
    axes = list(zip(*((1,) * (ndim - len(shape)) + shape for shape in shapes), strict=True))
    whole = tuple(next((n for n in axis if n != 1), 1) for axis in axes)
    fits = all(n in (1, m) for axis, m in zip(axes, whole, strict=True) for n in axis)
    return whole if fits else None


def countable(shapes: Sizes) -> None:
    """Accept a call whose pairs and tiles are so few that explain can say their number."""
    if math.prod(shapes.lse_shape) * shapes.kv_len >= MOST_PAIRS:
        raise ValueError(
            "batch x q_heads x q_len x kv_len must be below 2**62 for explain, got lengths "
            f"{shapes.q_len} and {shapes.kv_len}, {math.prod(shapes.lse_shape[:-1])} heads in all"
        )


def pair_array(name: str, x: Any, dtypes: tuple[str, ...], shapes: Sizes) -> Array:
    """Return a mask or bias, never expanded."""
    array = of_dtypes(name, x, dtypes)
    whole = shapes.pairs_shape
    fits = zip(reversed(array.shape), reversed(whole), strict=False)
    if array.ndim > len(whole) or not all(n in (1, m) for n, m in fits):
        raise ValueError(
            f"{name} must broadcast to (batch, q_heads, q_len, kv_len) = {whole}, "
            f"got {name}.shape={array.shape}"
        )
    if array.flags.aligned and array.dtype.isnative:
        return array
    return copied(array, array.ndim)


def per_head(name: str, x: Any, *shapes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return numbers of one of the shapes, and what values they have as float64."""
    array = of_dtypes(name, x, FLOAT_NAMES)
    if array.shape not in shapes:
        rule = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{name} must have shape {rule}, got {name}.shape={array.shape}")
    return array, widened(distinct(array, array.ndim)).astype(np.float64)


def slopes_per_head(x: Any, q_heads: int, shape: tuple[int, ...]) -> Array:
    """Return alibi_slopes, one per head, or per batch element and head."""
    array, values = per_head("alibi_slopes", x, (q_heads,), shape)
    wrong = values[~np.isfinite(values)]
    if wrong.size:
        raise ValueError(f"alibi_slopes must be finite, got {wrong[0]}")
    return array


def logits_per_head(name: str, x: Any, q_heads: int) -> Array:
    """Return sinks, one per head; -inf is none."""
    array, values = per_head(name, x, (q_heads,))
    wrong = values[np.isnan(values) | (values == np.inf)]
    if wrong.size:
        raise ValueError(f"{name} must be finite or -inf, got {wrong[0]}")
    return array


def filled(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return the array broadcast to a shape, as float64.

    Finite numbers stay finite in the arithmetic of dtype.
    """
    copy = np.array(np.broadcast_to(widened(array), shape), dtype=np.float64, order="C")
    most = largest_safe(dtype)
    np.clip(copy, -most, most, out=copy, where=copy != -np.inf)
    return copy


def largest_safe(dtype: np.dtype[Any]) -> float:
    """Return the largest number that a score may be: its product with log2(e) is still finite."""
    return float(np.finfo(arithmetic(dtype)).max) / 4


def per_batch(name: str, x: Any, shapes: Sizes, low: int, high: int, default: int) -> Array | None:
    """Return integers in low..high, one per batch element; None if each is the default."""
    array, least, most = integers(name, x, shapes.batch_shape, default)
    if least < low or most > high:
        rule = f"0..kv_len = 0..{high}" if low == 0 else "-2**61..2**61"
        raise ValueError(f"{name} must be within {rule}, got {least if least < low else most}")
    if least == most == default or not shapes.has_pairs:
        return None
    if least == most:
        return np.full(shapes.batch_shape, least, np.int64)
    return np.array(np.broadcast_to(array, shapes.batch_shape), dtype=np.int64, order="C")


def between(query_offset: Array | None, key_offset: Array) -> Array | None:
    """Return the positions of first queries, counted from the first key on; None if each is 0."""
    distance = np.asarray((0 if query_offset is None else query_offset) - key_offset)
    far = distance[(distance < -FARTHEST) | (distance > FARTHEST)]
    if far.size:
        raise ValueError(
            f"query_offset - key_offset must be within -2**61..2**61, got {far.flat[0]}"
        )
    return distance if distance.any() else None


def counter(name: str, x: Any) -> int:
    """Return x as a number that dropout may count from."""
    number = whole_number(name, x)
    if not 0 <= number < 2**32:
        raise ValueError(f"{name} must be within 0..2**32 - 1, got {name}={number}")
    return number


def integers(name: str, x: Any, batch_shape: tuple[int, ...], default: int) -> tuple[Any, int, int]:
    """Return integers that broadcast to the batch shape, the least and the most of them."""
    if is_integer(x):
        return x, int(x), int(x)
    kinds = "integers, or an int"
    array = as_array(name, x, kinds)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array of {kinds}, not {array.dtype.name}")
    if broadcast(array.shape, batch_shape) != batch_shape:
        raise ValueError(
            f"{name} must broadcast to the batch shape {batch_shape}, "
            f"got {name}.shape={array.shape}"
        )
    values = distinct(array, array.ndim).copy()  # another thread may change what the caller has
    if not values.size:
        return array, default, default
    return np.broadcast_to(values, array.shape), int(values.min()), int(values.max())


def lengths_within(kv_lengths: Any, longest: Array) -> None:
    """Accept lengths of packed sequences that are no longer than these are."""
    lengths = np.broadcast_to(kv_lengths, longest.shape)
    for i in np.flatnonzero(lengths > longest)[:1]:
        raise ValueError(
            f"kv_lengths must be within 0..kv_len = 0..{longest[i]} for sequence {i}, "
            f"got {lengths[i]}"
        )


def window_sides(window: Any) -> tuple[int, int]:
    """Return how many keys a query sees to its left and to its right."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(
            f"window must be a pair (left, right) of integers or None, not {window!r}"
        ) from None
    sides = [UNLIMITED, UNLIMITED]
    for i, side in enumerate((left, right)):
        if side is None:
            continue
        if not is_integer(side):
            raise TypeError(
                f"window must be a pair (left, right) of integers or None, not {window!r}"
            )
        if side < 0:
            raise ValueError(f"window must be a pair of integers >= 0 or None, got {window!r}")
        sides[i] = min(int(side), WIDEST)
    return sides[0], sides[1]


def finite_number(name: str, x: Any) -> float:
    """Return x as a float."""
    if type(x) is float and math.isfinite(x):
        return x
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{name} must be a number, not {type(x).__name__}")
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {name}={x}")
    return number


def positive_number(name: str, x: Any) -> float:
    """Return x as a float."""
    number = finite_number(name, x)
    if number <= 0:
        raise ValueError(f"{name} must be > 0 (None: off), got {name}={x}")
    return number


def is_integer(x: Any) -> bool:
    """Tell whether x is an integer of Python, NumPy or another library, and no bool."""
    return type(x) is int or (isinstance(x, numbers.Integral) and not isinstance(x, bool))


def whole_number(name: str, x: Any) -> int:
    """Return x as an int."""
    if not is_integer(x):
        raise TypeError(f"{name} must be an int, not {type(x).__name__}")
    return int(x)


def number_of_threads(name: str, x: Any) -> int:
    """Return x as a number of threads that a call may have."""
    threads = whole_number(name, x)
    if not 1 <= threads <= _core.MOST_THREADS:
        raise ValueError(f"{name} must be within 1..{_core.MOST_THREADS}, got {name}={threads}")
    return threads


def boolean(name: str, x: Any) -> bool:
    """Return x as a bool."""
    if type(x) is bool:
        return x
    if not isinstance(x, np.bool_):
        raise TypeError(f"{name} must be a bool, not {type(x).__name__}")
    return bool(x)


def wants_gradient(name: str, wanted: Any, of: str, array: Any) -> bool:
    """Tell whether the gradient of an option is asked for; the option must then be given."""
    if not boolean(name, wanted):
        return False
    if array is None:
        raise ValueError(f"{name} needs {of}, got {of}=None")
    return True


def check_like(name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Accept a result, or the gradient by one, that has the result's shape and dtype."""
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, not {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {name}.shape={array.shape}")


def dropout(dropout_p: Any, seed: Any) -> tuple[float, int]:
    """Return the share to be dropped, and the seed; without one, 0, which nothing is drawn from."""
    if not isinstance(dropout_p, numbers.Real) or isinstance(dropout_p, bool):
        raise TypeError(f"dropout_p must be a number, not {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:  # type: ignore[operator]
        raise ValueError(f"dropout_p must be within 0..1, got dropout_p={dropout_p}")
    if seed is None:
        if dropout_p != 0:
            raise ValueError(
                "seed must be given with dropout_p > 0, which draws from it alone, "
                f"got dropout_p={dropout_p}"
            )
        return 0.0, 0
    seed = whole_number("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be within 0..2**64 - 1, got seed={seed}")
    return float(dropout_p), seed


def result_array(
    name: str,
    out: Any,
    library: Library,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    inputs: tuple[Any, ...],
) -> Array:
    """Return where a result goes: out, if it can be written while the inputs are read, or new.

    out may have the dtype that a result of half precision is computed in.
    """
    if out is None:
        return library.empty(shape, dtype)
    out = library.destination(name, out)
    if (
        type(out) is ndarray
        and out.flags.carray
        and out.dtype is dtype
        and out.shape == shape
        and _core.lie_apart(out, inputs)
    ):
        return out
    if type(out) is not ndarray and not (isinstance(out, ndarray) and is_numbers(out)):
        raise TypeError(f"{name} must be a NumPy array, not {type(out).__name__}")
    wide = arithmetic(dtype)
    if out.dtype not in (dtype, wide):
        kinds = f"{dtype}" if dtype == wide else f"{dtype}, or {wide}"
        raise TypeError(f"{name} must have the dtype of the result, {kinds}, not {out.dtype}")
    if out.shape != shape:
        raise ValueError(
            f"{name} must have the shape of the result, {shape}, got {name}.shape={out.shape}"
        )
    if not out.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")
    if not out.flags.aligned:
        raise ValueError(f"{name} must be aligned, got a misaligned array")
    if out.size and shape[-1] > 1 and out.strides[-1] != out.itemsize:
        raise ValueError(
            f"{name} must be contiguous along its last axis, got {name}.strides={out.strides}"
        )
    if out.size and overlaps_itself(out):
        raise ValueError(f"{name} must not overlap itself, got {name}.strides={out.strides}")
    for x in inputs:
        if isinstance(x, ndarray) and may_share_memory(out, x):
            raise ValueError(
                f"{name} must not overlap an input, got an array that shares its memory"
            )
    return out


def accumulates(accumulate: Any, sinks: Any, **given: Any) -> bool:
    """Tell whether a call adds to what arrays hold; all of these must then be given."""
    if accumulate is False or not boolean("accumulate", accumulate):
        return False
    for name, x in given.items():
        if x is None:
            raise ValueError(
                f"{name} must be given with accumulate=True, which adds to what it holds, "
                f"got {name}=None"
            )
    if sinks is not None:
        raise ValueError(
            "sinks must not be given with accumulate=True: they count once, at the end, in "
            "fastattn.merge((out, lse), sinks=sinks)"
        )
    return True


def overlaps_itself(array: Array) -> bool:
    """Return whether any axis steps less far than the axes inside it reach."""
    reach = array.itemsize
    axes = zip(map(abs, array.strides), array.shape, strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def may_share_memory(a: Array, b: Array) -> bool:
    """Return whether the arrays overlap, yes if that is hard to tell."""
    try:
        return np.shares_memory(a, b, max_work=OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
