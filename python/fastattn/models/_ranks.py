# SPDX-License-Identifier: Apache-2.0
"""A model reads tokens over ranks: each has some rows of them, and tokens meet in attention alone.

All else is done row by row, to the bit as in one process. A rank's rows go through a layer all at
once, so that no keys are kept but those of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fastattn import distributed
from fastattn.distributed._agree import agreed
from fastattn.distributed._comm import peers_of, seconds
from fastattn.models._capture import Capture, Watched
from fastattn.models._context import Reading, Texts
from fastattn.models._progress import Advance
from fastattn.nn import Floats, Integers

if TYPE_CHECKING:
    from fastattn.distributed import Layout

Checked = TypeVar("Checked")


class Ranks:
    """The ranks that make a call together.

    Parameters
    ----------
    comm, method, timeout
        As for `fastattn.distributed.attention`.
    call : str
        The public function, for errors.

    Attributes
    ----------
    rank, size : int
    """

    def __init__(self, comm: Any, call: str, method: Any, timeout: float | None) -> None:
        self._comm, self._method, self._timeout = comm, method, timeout
        self._peers = peers_of(comm, call, timeout)
        self.rank, self.size = self._peers.rank, self._peers.size

    def agreed(
        self, model: Watched, check: Callable[[], tuple[Checked, dict[str, Any]]]
    ) -> Checked:
        """Return what check() returns beside the terms that all ranks must share."""

        def checked() -> tuple[Checked, dict[str, Any]]:
            seconds(self._timeout)
            if any(isinstance(x, Capture) for x in model.observers):
                raise ValueError("comm must be None in a `with` of capture: it sees all tokens")
            found, terms = check()
            return found, terms | {"model": model.config}

        return agreed(self._peers, checked)

    def shard(self, total: int, layers: int) -> Shard:
        """Return what this rank reads of one text of so many tokens."""
        return Shard(self, total, layers)

    def texts(self, cu_seqlens: Integers) -> TextsShard:
        """Return what this rank reads of packed texts."""
        return TextsShard(self, cu_seqlens)

    def places(self, layout: Layout) -> Integers:
        """Return where this rank's rows stand, of which there is one at least.

        A rank that has none computes the first one too, which nobody else is told: no family of
        models must know of arrays without rows.
        """
        found = layout.positions(self.rank)
        return found if len(found) else np.zeros(1, np.int64)

    def attention(
        self, layout: Layout, query: Floats, key: Floats, value: Floats, **options: Any
    ) -> Floats:
        """Return what this rank's rows see of all: arrays are as for `Reading.attend`."""
        out = np.zeros((*query.shape[:2], value.shape[2]), np.float32)
        own = layout.lengths[self.rank]
        q, k, v, result = (x[:own].swapaxes(0, 1)[None] for x in (query, key, value, out))
        how = {"comm": self._comm, "method": self._method, "timeout": self._timeout}
        distributed.attention(q, k, v, layout=layout, out=result, **how, **options)
        return out.reshape(len(out), -1)

    def whole(self, layout: Layout, rows: Floats) -> Floats:
        """Return the array of which each rank has some rows."""
        lengths = layout.lengths
        padded = np.zeros((max(lengths), *rows.shape[1:]), rows.dtype)
        own = lengths[self.rank]
        padded[:own] = rows[:own]
        told = self._peers.all_gather("gathering rows", padded.reshape(-1).view(np.uint8))
        parts = told.view(rows.dtype).reshape(self.size, *padded.shape)
        return layout.join([x[:n] for x, n in zip(parts, lengths, strict=True)], axis=0)


class Shard(Reading):
    """The tokens of one text that this rank reads, in a layout for causal attention.

    Parameters
    ----------
    ranks : Ranks
    total : int
        How many tokens all ranks read.
    layers : int

    Attributes
    ----------
    advance : function of int
        Who is told of each layer that has attended, by its rows.
    """

    advance: Advance

    def __init__(self, ranks: Ranks, total: int, layers: int) -> None:
        self._ranks, self.layers = ranks, layers
        self.layout = distributed.zigzag(total, ranks.size)
        self.positions = ranks.places(self.layout)
        self.lengths = np.array([total])

    def _attend(
        self, layer: int, query: Floats, key: Floats, value: Floats, options: dict[str, Any]
    ) -> Floats:
        """Do what `attend` does, of which nobody is told."""
        seen = self._ranks.attention(self.layout, query, key, value, is_causal=True, **options)
        self.advance(len(seen))
        return seen


class TextsShard(Texts):
    """The tokens of packed texts that this rank reads: those that stand beside each other.

    Parameters
    ----------
    ranks : Ranks
    cu_seqlens : array of int64, shape (texts + 1,)
        Of all ranks.

    Attributes
    ----------
    places : ndarray of int64, shape (total,)
        Where the tokens stand among those of all ranks.
    """

    def __init__(self, ranks: Ranks, cu_seqlens: Integers) -> None:
        super().__init__(cu_seqlens)
        self._ranks = ranks
        self.layout = distributed.contiguous(len(self.positions), ranks.size)
        self.places = ranks.places(self.layout)
        self.positions = self.positions[self.places]

    def attend(self, query: Floats, key: Floats, value: Floats, heads: int) -> Floats:
        """Return what the tokens see of their texts, whichever ranks have these."""
        q, k, v = (x.reshape(len(x), heads, -1) for x in (query, key, value))
        return self._ranks.attention(self.layout, q, k, v, documents=self.cu_seqlens)
