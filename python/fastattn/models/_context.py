# SPDX-License-Identifier: Apache-2.0
"""Where do tokens meet? A decoder's in what it has read, an encoder's in their own text.

In the process of the call, that is; `_ranks.py` has the same over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastattn import nn
from fastattn.kv_cache import PagedKVCache
from fastattn.models._capture import Attention, Observer
from fastattn.nn import Floats, Integers


class Reading(ABC):
    """The tokens that a decoder is given in a call, and what each layer of them sees.

    Attributes
    ----------
    lengths : ndarray of int64, shape (sequences,)
        How many tokens of each sequence are read with this call.
    positions : ndarray of int64, shape (total,)
        Of the tokens that are given, each in its sequence.
    layers : int
    observers : tuple of Observer
        Who is told of each layer's attention.
    """

    lengths: Integers
    positions: Integers
    layers: int
    observers: tuple[Observer, ...] = ()

    def attend(
        self, layer: int, query: Floats, key: Floats, value: Floats, **options: Any
    ) -> Floats:
        """Return what the given tokens see of their sequences, themselves included, in a layer.

        Parameters
        ----------
        layer : int
        query : array of shape (total, q_heads, head_dim)
        key : array of shape (total, kv_heads, head_dim)
        value : array of shape (total, kv_heads, value_head_dim)
        **options
            Of `fastattn.PagedKVCache.attend`: scale, window, softcap, sinks.

        Returns
        -------
        ndarray of shape (total, q_heads * value_head_dim)
        """
        seen = self._attend(layer, query, key, value, options)
        for observer in self.observers:
            asked = Attention(query, key, value, {"is_causal": True, **options})
            observer.attended(layer, asked, seen)
        return seen

    @abstractmethod
    def _attend(
        self, layer: int, query: Floats, key: Floats, value: Floats, options: dict[str, Any]
    ) -> Floats:
        """Do what `attend` does, of which nobody is told."""


class Context(Reading):
    """The tokens that a decoder has read of some sequences: none at first.

    Before each call of the model, `feed` says how many tokens of each it is given. After a call
    that an error ended, a context is of no use.
    """

    def __init__(
        self,
        sequences: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
    ) -> None:
        self._caches = [
            PagedKVCache(kv_heads, head_dim, value_head_dim=value_head_dim) for _ in range(layers)
        ]
        self.layers = layers
        self._ids = list(range(sequences))  # that every cache gives them
        for cache in self._caches:
            for _ in self._ids:
                cache.add()
        self.lengths = np.zeros(sequences, np.int64)
        self.feed([0] * sequences)

    def feed(self, counts: Sequence[int]) -> None:
        """Say how many tokens of each sequence come now, packed one sequence after the other."""
        each = np.array(counts, np.int64)
        begins = np.cumsum(each) - each
        self.positions = np.arange(each.sum()) + np.repeat(self.lengths - begins, each)
        self.lengths = self.lengths + each
        self._one_each = set(counts) == {1}
        # What `attend` asks at once: the cache's ids, the first row, how many sequences and tokens.
        self._calls: list[tuple[list[int] | None, int, int, int]]
        if len(set(counts)) == 1:
            self._calls = [(None, 0, len(each), int(each[0]))]
        else:
            parts = zip(self._ids, begins.tolist(), each.tolist(), strict=True)
            self._calls = [([i], begin, 1, count) for i, begin, count in parts if count]

    def _attend(
        self, layer: int, query: Floats, key: Floats, value: Floats, options: dict[str, Any]
    ) -> Floats:
        """Do what `attend` does, of which nobody is told."""
        cache = self._caches[layer]
        if self._one_each:  # a step of a loop, which must be quick
            cache.append(key[:, :, None], value[:, :, None])
            seen: Floats = cache.attend(query[:, :, None], **options)
            return seen.reshape(len(query), -1)
        out = np.empty((*query.shape[:2], value.shape[2]), np.float32)
        for ids, begin, sequences, tokens in self._calls:
            rows, lead = slice(begin, begin + sequences * tokens), (sequences, tokens)
            q, k, v, result = (
                x[rows].reshape(*lead, *x.shape[1:]).swapaxes(1, 2)
                for x in (query, key, value, out)
            )
            cache.append(k, v, sequences=ids)
            cache.attend(q, sequences=ids, out=result, **options)
        return out.reshape(len(out), -1)

    def reorder(self, indices: Sequence[int]) -> None:
        """Go on with these sequences, which are numbered anew in this order.

        One that is named several times goes on in several ways, and what it has read is shared.
        Others are dropped.
        """
        more = len(indices) - len(self.lengths)
        every = [*indices, *[0] * -more]  # also of the rows that are dropped
        for cache in self._caches:
            for _ in range(more):
                cache.add()
            if every != list(range(len(every))):
                cache.reorder(every)
            for sequence in cache.sequences[len(indices) :]:
                cache.free(sequence)
        self._ids, self.lengths = self._caches[0].sequences, self.lengths[list(indices)]


class Texts:
    """Texts that an encoder reads, packed one after the other.

    Parameters
    ----------
    cu_seqlens : array of int64, shape (texts + 1,)
        Where each text begins, and the last one ends.

    Attributes
    ----------
    lengths : ndarray of int64, shape (texts,)
    positions : ndarray of int64, shape (total,)
        Of the tokens that are given, each in its text.
    """

    def __init__(self, cu_seqlens: Integers) -> None:
        self.cu_seqlens, self.lengths = cu_seqlens, np.diff(cu_seqlens)
        begins = np.repeat(cu_seqlens[:-1], self.lengths)
        self.positions: Integers = np.arange(len(begins)) - begins

    def attend(self, query: Floats, key: Floats, value: Floats, heads: int) -> Floats:
        """Return what the tokens see of their texts: as `nn.multi_head_attention`."""
        return nn.multi_head_attention(query, key, value, heads, self.cu_seqlens)
