# SPDX-License-Identifier: Apache-2.0
"""How does a cache become a file, a pickle or a copy? All three are the same arrays.

The arrays hold the cache and nothing else. A cache is made of them by the same checks, wherever
they come from. `_arrays_of` writes the format: ``format``, ``dtype``, ``limit``, the sequences' ids
and the ``next`` one, their ``tables``, ``lengths`` and ``begins``, and the pages that they read. A
change of it raises the number in `_format`: 2 is that of a cache whose sequences have ``parts``.
"""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from fastattn._arguments import whole_number
from fastattn.kv_cache._arguments import ARRAYS, given_arrays, rows_of_tables
from fastattn.kv_cache._pool import NONE, PagePool, slots_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    File = str | os.PathLike[str] | BinaryIO

STORED = ("dtype", "limit", "sequences", "next", "tables", "lengths", "begins")  # beside ARRAYS


class Contents(NamedTuple):
    """What a cache is."""

    pool: PagePool
    sequences: list[int]  # ids, in the order of the pool's rows
    next: int  # id of the sequence that is added next
    limit: int  # of pages, for a KVCache of tokens; NONE: it grows


class StoredCache:
    """What files, pickles and copies ask of a cache: what it is, and to become what another was."""

    _kind: ClassVar[str]
    _own: ClassVar[frozenset[str]]  # the attributes that each cache of the kind has by itself

    if TYPE_CHECKING:

        def _contents(self) -> Contents: ...

        @classmethod
        def _of_contents(cls, contents: Contents) -> Self: ...

    def save(self, file: File) -> None:
        """Write the cache to a file, the tokens that it keeps.

        Parameters
        ----------
        file : path, or file open for writing in binary
            Becomes an .npz file, without pickled objects.
        """
        arrays = self._stored()
        if isinstance(file, str | os.PathLike):
            with Path(file).open("wb") as opened:
                np.savez(opened, **arrays)
        else:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, file: File) -> Self:
        """Return the cache that a file holds, as it was saved.

        Parameters
        ----------
        file : path, or file open for reading in binary

        Raises
        ------
        ValueError
            The file is damaged, or is none that `save` wrote.
        ImportError
            The cache holds bfloat16, and ml_dtypes is not installed.
        """
        with (
            _rule(f"file must hold a {cls._kind} that save wrote"),
            np.load(file, allow_pickle=False) as arrays,
        ):
            return cls._restored(arrays)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle keeps: the arrays, and what else the cache has got as attributes."""
        return self._stored() | {"others": self._others()}

    def __setstate__(self, state: Any) -> None:
        """Become the cache that pickle kept. Its arrays may lie in memory that others have too."""
        with _rule(f"state must be what pickle made of a {self._kind}"):
            if not isinstance(state, dict):
                raise TypeError(f"it is of type {type(state).__name__}")
            own = {k: x.copy() if isinstance(x, np.ndarray) else x for k, x in state.items()}
            others = dict(own.pop("others", {}))
            restored = self._restored(own)
        vars(self).update(others | vars(restored))

    def __copy__(self) -> Self:
        """Return a cache of its own memory."""
        other = self._restored(self._stored())
        vars(other).update(self._others())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a cache of its own memory; what else it has got is copied in depth."""
        other = memo[id(self)] = self._restored(self._stored())
        vars(other).update(copy.deepcopy(self._others(), memo))
        return other

    def _others(self) -> dict[str, Any]:
        """Return attributes that are not the cache's own: those of a subclass, or given later."""
        return {name: x for name, x in vars(self).items() if name not in self._own}

    def _stored(self) -> dict[str, Any]:
        """Return the arrays that the cache becomes, all of them new."""
        return _arrays_of(self._contents(), self._kind)

    @classmethod
    def _restored(cls, arrays: Mapping[str, Any]) -> Self:
        """Return the cache that such arrays are. Their memory becomes its own."""
        return cls._of_contents(_contents_of(arrays, cls._kind))


def _arrays_of(contents: Contents, kind: str) -> dict[str, Any]:
    """Return the arrays that hold what a cache of that kind is, and nothing else."""
    pool, ids, next_id, limit = contents
    n, page_size, dtype = pool.rows, pool.page_size, pool.arrays[0].dtype
    begins, lengths, parts = (x[:n].copy() for x in (pool.begins, pool.lengths, pool.parts))
    slots = slots_of(begins, lengths, parts)
    columns = int(pool.pages_of(slots[0][1]).max(initial=0))
    named = pool.named(begins, lengths, parts, columns)
    used, at, table = np.unique(
        pool.table[:n, :columns][named], return_index=True, return_inverse=True
    )
    # In the order in which sequences read them: equal caches are equal files and pickles.
    order = np.argsort(at)
    used, table = used[order], np.argsort(order)[table]
    tables = np.full((n, columns), NONE, np.int64)
    tables[named] = table
    # Tokens of a page that no sequence reads may be anything, and become zeros.
    start = np.arange(columns) * page_size
    changes = np.zeros((len(used), page_size + 1), np.int64)  # of how many read a token
    for part in slots:
        first, last = (np.clip(x[:, None] - start, 0, page_size)[named] for x in part)
        np.add.at(changes, (table, first), 1)
        np.add.at(changes, (table, last), -1)
    unread = changes[:, :-1].cumsum(axis=1) == 0
    arrays: dict[str, Any] = {
        "format": np.array(_format(kind, bool(parts.any()))),
        "dtype": np.array(dtype.name),
        "limit": np.array(limit),
        "sequences": np.array(ids, np.int64),
        "next": np.array(next_id),
        "tables": tables,
        "lengths": lengths,
        "begins": begins,
    }
    if parts.any():
        arrays["parts"] = parts
    for name, x in zip(ARRAYS, pool.arrays, strict=False):
        pages = np.ascontiguousarray(x[used])
        pages.swapaxes(1, 2)[unread] = 0
        arrays[name] = pages.view(np.uint16) if x.dtype.name == "bfloat16" else pages
    return arrays


def _contents_of(arrays: Mapping[str, Any], kind: str) -> Contents:
    """Return what the cache of that kind is, if the arrays are such; its pool has no free pages."""
    form = str(arrays["format"])[:99] if "format" in arrays else ""
    if form not in (_format(kind), _format(kind, parts=True)):
        raise ValueError(f"its format is {form!r}, and this version reads {_format(kind)!r} and 2")
    stored = (*STORED, "parts") if form == _format(kind, parts=True) else STORED
    dtype = str(arrays["dtype"])[:99] if "dtype" in arrays else ""
    names = ARRAYS if dtype == "int8" else ARRAYS[:2]
    for missing in (x for x in (*stored, *names) if x not in arrays):
        raise ValueError(f"it lacks {missing}")
    pages = [arrays[x] for x in names]
    if dtype == "bfloat16":
        if any(x.dtype != np.uint16 for x in pages):
            raise ValueError("bfloat16 must be stored as uint16")
        pages = [x.view(_bfloat16()) for x in pages]
    if pages[0].dtype.name != dtype:
        raise ValueError(f"it has {pages[0].dtype.name} for {dtype}")
    for x in pages[2:]:
        if not (np.isfinite(x) & (x >= 0)).all():
            raise ValueError("scales must be finite and >= 0")
    pool = PagePool(given_arrays(*pages), fixed=False)
    pool.take_rows(*rows_of_tables(pool, *(arrays[x] for x in stored[4:])))
    ids = arrays["sequences"].tolist()
    next_id, limit = (whole_number(x, arrays[x].item()) for x in ("next", "limit"))
    for i, sequence in enumerate(ids):
        if not 0 <= whole_number(f"sequences[{i}]", sequence) < next_id:
            raise ValueError(f"sequences must be within 0..next - 1, got {sequence}")
    if len(ids) != pool.rows or len(set(ids)) != pool.rows:
        raise ValueError(f"sequences must be {pool.rows} distinct integers")
    return Contents(pool, ids, next_id, limit)


def _format(kind: str, parts: bool = False) -> str:
    """Return what a file says that it is."""
    return f"fastattn.{kind} {2 if parts else 1}"


@contextlib.contextmanager
def _rule(rule: str) -> Iterator[None]:
    """Let an error that shows damage say which rule it breaks."""
    try:
        yield
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{rule}: {error}") from error


def _bfloat16() -> np.dtype[Any]:
    """Return the dtype, which NumPy has not got itself."""
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("the cache holds bfloat16, which needs ml_dtypes") from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
