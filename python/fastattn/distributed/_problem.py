# SPDX-License-Identifier: Apache-2.0
"""What is asked of a rank, and which part of it meets which keys.

A `Problem` is a checked call: this rank's arrays, who has which positions, and the options. It cuts
the call into calls of one block each: some of this rank's queries, and a span of some rank's keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._arguments import (
    UNLIMITED,
    arithmetic,
    check_options,
    floats,
    mixed_dtypes,
    name_of,
    sizes,
    starts,
    window_sides,
)
from fastattn._arrays import as_numpy, library_of
from fastattn._options import NO_OPTIONS, OFFSETS
from fastattn.distributed._layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastattn._arguments import Sizes
    from fastattn._arrays import Library
    from fastattn._options import Options
    from fastattn.distributed._engine import Engine
    from fastattn.distributed._layout import Piece

    Array = NDArray[Any]

METHODS = ("ring", "gather", "heads")
ROWS_AT_ONCE = 1024  # of queries in a call: between two calls an engine may be polled
FAR = 2**62  # beyond all positions
LOCAL = ("mask", "bias")  # options that each rank has its own rows of


class Block(NamedTuple):
    """A call of one block: rows of this rank's queries, rows of some rank's keys."""

    rows: slice
    columns: slice
    options: Options
    starts: tuple[Array, Array] | None  # cu_seqlens of queries and keys, if documents are packed


class Reach:
    """Which keys queries can see at all: what is_causal, window, kv_lengths and documents leave."""

    def __init__(self, options: Options, kv_total: int, documents: Array | None) -> None:
        left, right = (UNLIMITED, UNLIMITED)
        if options.window is not None:
            left, right = window_sides(options.window)
        if options.is_causal:
            right = 0
        self._left = FAR if left == UNLIMITED else left
        self._right = FAR if right == UNLIMITED else right
        first_query = 0 if options.query_offset is None else options.query_offset
        offsets = np.asarray(first_query - options.key_offset)
        self._least, self._most = int(offsets.min(initial=FAR)), int(offsets.max(initial=-FAR))
        lengths = kv_total if options.kv_lengths is None else options.kv_lengths
        self._end = min(kv_total, int(np.max(lengths, initial=0)))
        self._documents = documents

    @property
    def first(self) -> int:
        """How far the first key that a query sees is from position query, if offsets are equal."""
        return self._least - self._left

    @property
    def last(self) -> int:
        """How far the last one is."""
        return self._most + self._right

    def keys(self, start: Any, stop: Any) -> tuple[Any, Any]:
        """Return the first key, and the end of the keys, that queries start:stop can see.

        The positions may be arrays; each span must have a query.
        """
        first = np.maximum(start + self._least - self._left, 0)
        end = np.minimum(stop + self._most + self._right, self._end)
        if self._documents is not None:
            of_first = np.searchsorted(self._documents, start, side="right") - 1
            of_last = np.searchsorted(self._documents, stop - 1, side="right")
            first = np.maximum(first, self._documents[np.maximum(of_first, 0)])
            end = np.minimum(end, self._documents[np.minimum(of_last, len(self._documents) - 1)])
        return first, end

    def between(self, layout: Layout, kv_layout: Layout) -> NDArray[np.bool_]:
        """Return which ranks' queries can see which ranks' keys, of shape (ranks, ranks)."""
        rank_q, start_q, stop_q = spans_of(layout)
        rank_k, start_k, stop_k = spans_of(kv_layout)
        seen = np.zeros((layout.ranks, kv_layout.ranks), bool)
        if len(rank_q) and len(rank_k):
            first, end = self.keys(start_q, stop_q)
            pairs = (start_k < end[:, None]) & (stop_k > first[:, None])
            seen[
                rank_q[:, None].repeat(len(rank_k), 1)[pairs], np.where(pairs, rank_k, 0)[pairs]
            ] = 1
        return seen


class Problem(NamedTuple):
    """A call of this rank, checked."""

    query: Array
    key: Array
    value: Array
    rank: int
    layout: Layout
    kv_layout: Layout
    documents: Array | None
    options: Options  # arrays as NumPy's
    reach: Reach
    sees: NDArray[np.bool_]  # whose queries can see whose keys
    shapes: Sizes  # of this rank's queries and all keys
    library: Library

    @property
    def wide(self) -> np.dtype[Any]:
        """The dtype of the arithmetic."""
        return arithmetic(self.query.dtype)

    def blocks(self, source: int) -> Iterator[Block]:
        """Yield the calls of this rank's queries on the keys of rank `source`."""
        for q_piece in self.layout.pieces(self.rank):
            for rows, start, stop in chunks_of(q_piece):
                first, end = self.reach.keys(start, stop)
                for columns, k_start, k_stop in self.kv_layout.pieces(source):
                    if k_start < end and k_stop > first:
                        yield self.block(rows, (start, stop), columns, (k_start, k_stop))

    def block(
        self, rows: slice, queries: tuple[int, int], columns: slice, keys: tuple[int, int]
    ) -> Block:
        """Return the call of queries start:stop, which are these rows, on keys start:stop."""
        (start, stop), (k_start, k_stop) = queries, keys
        options = self.options
        offset = 0 if options.query_offset is None else options.query_offset
        lengths = options.kv_lengths
        options = options._replace(
            query_offset=offset + start,
            key_offset=options.key_offset + k_start,
            kv_lengths=None if lengths is None else np.clip(lengths, k_start, k_stop) - k_start,
            mask=_part(options.mask, rows, slice(k_start, k_stop)),
            bias=_part(options.bias, rows, slice(k_start, k_stop)),
        )
        if self.documents is None:
            return Block(rows, columns, options, None)
        of_queries = np.clip(self.documents, start, stop)
        of_keys = np.clip(self.documents, k_start, k_stop)
        options = options._replace(
            query_offset=(of_queries - self.documents)[:-1],
            key_offset=(of_keys - self.documents)[:-1],
        )
        return Block(rows, columns, options, (of_queries - start, of_keys - k_start))


def checked(
    engine: Engine,
    query: Any,
    key: Any,
    value: Any,
    layout: Any,
    kv_layout: Any,
    documents: Any,
    method: Any,
    options: Options,
) -> tuple[Problem, dict[str, Any]]:
    """Check the arguments of a call; return it, and the terms that all ranks must share."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    kv_layout = layout if kv_layout is None else kv_layout
    for name, x in (("layout", layout), ("kv_layout", kv_layout)):
        if not isinstance(x, Layout):
            raise TypeError(f"{name} must be a Layout, not {type(x).__name__}")
        if x.ranks != engine.size:
            raise ValueError(
                f"{name} must have as many ranks as comm, {engine.size}, got {x.ranks}"
            )
    library = library_of(query)
    if library.on_gpu:
        raise TypeError(
            "query must be on the CPU, got an array on a GPU: fastattn.distributed has no kernels "
            "there"
        )
    query = floats("query", library.array("query", query))
    key, value = floats("key", key), floats("value", value)
    mixed_dtypes(query.dtype, key.dtype, value.dtype)
    rank = engine.rank
    for name, x, of in (("query", query, layout), ("key", key, kv_layout)):
        if x.ndim > 1 and x.shape[-2] != of.lengths[rank]:
            which = "layout" if of is layout else "kv_layout"
            raise ValueError(
                f"{name} must have as many rows as rank {rank} in {which}, {of.lengths[rank]}, got "
                f"{name}.shape={x.shape}"
            )
    sizes(query.shape, key.shape, value.shape)
    total, kv_total = layout.total, kv_layout.total
    key_shape, value_shape = ((*x.shape[:-2], kv_total, x.shape[-1]) for x in (key, value))
    shapes = sizes(query.shape, key_shape, value_shape)
    check_options(shapes, query.dtype, options, is_placed=True)
    options = _as_arrays(options)
    if total != kv_total and options.query_offset is None:
        placed = (
            (options.is_causal, "is_causal"),
            (options.window is not None, "window"),
            (options.alibi_slopes is not None, "alibi_slopes"),
        )
        for is_given, name in placed:
            if is_given:
                raise ValueError(
                    f"query_offset must be given with {name} if the layouts have different totals "
                    "(0: the first query stands at the first key; kv_total - total: the last at "
                    f"the last), got {total} and {kv_total}"
                )
    if documents is not None:
        documents = _documents(documents, total, shapes, options, layout == kv_layout)
        if options.alibi_slopes is not None:
            options = options._replace(alibi_slopes=options.alibi_slopes.reshape(-1))
    if method == "heads" and engine.size > shapes.q_heads:
        raise ValueError(
            "method must not be heads if there are more ranks than query heads, got "
            f"{engine.size} ranks, q_heads={shapes.q_heads}"
        )
    reach = Reach(options, kv_total, documents)
    problem = Problem(
        query=query,
        key=key,
        value=value,
        rank=rank,
        layout=layout,
        kv_layout=kv_layout,
        documents=documents,
        options=options,
        reach=reach,
        sees=reach.between(layout, kv_layout),
        shapes=shapes,
        library=library,
    )
    return problem, _terms(problem, method)


def _terms(problem: Problem, method: str) -> dict[str, Any]:
    """Return what all ranks must share of a call."""
    terms = {
        "method": method,
        "layout": problem.layout,
        "kv_layout": problem.kv_layout,
        "documents": problem.documents,
    }
    for name in ("query", "key", "value"):
        x = getattr(problem, name)
        axes = f"{x.shape[:-2]} x rows x {x.shape[-1]}"
        terms |= {f"shape of {name}": axes, f"dtype of {name}": name_of(x.dtype)}
    options = problem.options._asdict()
    if method == "heads":  # which sends them, too
        for name in LOCAL:
            x = options[name]
            terms[f"shape of {name}"] = x if x is None else (*x.shape[:-2], "rows", *x.shape[-1:])
            terms[f"dtype of {name}"] = x if x is None else name_of(x.dtype)
    return terms | {name: x for name, x in options.items() if name not in LOCAL}


def _documents(documents: Any, total: int, shapes: Sizes, options: Options, is_self: bool) -> Array:
    """Return where documents start, and the last one ends, if they fit the call."""
    checked = starts("documents", documents, total)
    if not is_self:
        raise ValueError("kv_layout must not be given with documents, whose keys lie as queries do")
    for name in ("mask", "bias", *OFFSETS, "kv_lengths"):
        if getattr(options, name) is not getattr(NO_OPTIONS, name):
            raise ValueError(f"{name} must not be given with documents")
    if int(np.prod(shapes.batch_shape)) != 1:
        raise ValueError(
            "query, key and value must have batch axes of size 1 with documents, which are packed "
            f"one after the other, got a batch of {shapes.batch_shape}"
        )
    return checked


def _as_arrays(options: Options) -> Options:
    """Return options with NumPy's arrays, or numbers, in the place of those of other libraries."""
    kept = {}
    for name in ("mask", "bias", "alibi_slopes", "sinks", *OFFSETS, "kv_lengths"):
        x = getattr(options, name)
        if x is not getattr(NO_OPTIONS, name):
            kept[name] = np.asarray(as_numpy(name, x))
    return options._replace(**kept)


def chunks_of(piece: Piece) -> Iterator[Piece]:
    """Yield equal parts of a span of queries, that are not too large."""
    count = -(-(piece.stop - piece.start) // ROWS_AT_ONCE)
    length = piece.stop - piece.start
    for i in range(count):
        low, high = length * i // count, length * (i + 1) // count
        rows = slice(piece.rows.start + low, piece.rows.start + high)
        yield type(piece)(rows, piece.start + low, piece.start + high)


def _part(array: Array | None, rows: slice, columns: slice) -> Array | None:
    """Return some rows and columns of an array of pairs; what broadcasts stays."""
    if array is None:
        return None
    if array.ndim > 0 and array.shape[-1] != 1:
        array = array[..., columns]
    if array.ndim > 1 and array.shape[-2] != 1:
        array = array[..., rows, :]
    return array


def spans_of(layout: Layout) -> tuple[Array, Array, Array]:
    """Return the rank, start and stop of each span."""
    spans = [(r, *span) for r, of_rank in enumerate(layout.spans) for span in of_rank]
    rank, start, stop = np.array(spans, np.int64).reshape(-1, 3).T
    return rank, start, stop
