# SPDX-License-Identifier: Apache-2.0
"""How do several prompts go on? Step by step, each by the token that it gets alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.models._sampling import Sampling
from fastattn.nn import Floats, Integers

if TYPE_CHECKING:
    from fastattn.models._family import DecoderModel

READ_TOKENS = 512  # that the model is given at once


class Generation:
    """Prompts that a model goes on with, until each has ended.

    Parameters
    ----------
    model : DecoderModel
    prompts : sequence of arrays of int64
        The tokens of each, of which there is one at least.
    limits : sequence of int
        How many tokens each gets at most.
    stop_ids : collection of int
        The tokens that end a prompt's text.
    sampling : Sampling
        What chooses the tokens.
    """

    def __init__(
        self,
        model: DecoderModel[Any],
        prompts: Sequence[Integers],
        limits: Sequence[int],
        stop_ids: Collection[int],
        sampling: Sampling,
    ) -> None:
        self._model, self._sampling, self._stop_ids = model, sampling, frozenset(stop_ids)
        self._generators, self._left = sampling.generators(len(prompts)), list(limits)
        # Of each prompt that goes on, the tokens to read: the context's sequences, in order.
        self._unread = dict(enumerate(prompts))
        self._context = model.context(len(prompts))
        self.end([i for i, limit in enumerate(limits) if limit == 0])

    def __iter__(self) -> Iterator[dict[int, int]]:
        """Yield the steps until all prompts have ended."""
        while self._unread:
            yield self.step()

    @property
    def live(self) -> list[int]:
        """The prompts that go on, by their numbers."""
        return list(self._unread)

    def end(self, prompts: Collection[int]) -> None:
        """End some of the prompts that go on, and free what was read of them."""
        if prompts:
            kept = [place for place, i in enumerate(self._unread) if i not in prompts]
            self._context.reorder(kept)
            self._unread = {i: x for i, x in self._unread.items() if i not in prompts}

    def step(self) -> dict[int, int]:
        """Return the next token of each prompt that goes on, but for those that it ends."""
        tokens = {}
        logits = self._model.head(self._last_states())
        for i, row in zip(self._unread, logits, strict=True):
            token = self._sampling.choose(row, self._generators[i])
            self._left[i] -= 1
            if token not in self._stop_ids:
                tokens[i] = token
        # The last token that a prompt may get is never read.
        self.end([i for i in self._unread if i not in tokens or self._left[i] == 0])
        self._unread = {i: np.array([tokens[i]]) for i in self._unread}
        return tokens

    def _last_states(self) -> Floats:
        """Let the model read; return the last hidden state of each prompt that goes on.

        A prompt is cut where it is cut alone, since that changes the last bits.
        """
        found: dict[int, Floats] = {}
        for batch in _batches(self._unread):
            self._context.feed([len(batch.get(i, ())) for i in self._unread])
            states = self._model(np.concatenate(list(batch.values())), self._context)
            ends = np.cumsum([len(x) for x in batch.values()])
            found |= dict(zip(batch, states[ends - 1], strict=True))
        return np.stack(list(found.values()))


def _batches(unread: Mapping[int, Integers]) -> Iterator[dict[int, Integers]]:
    """Yield parts of prompts, in order, at most READ_TOKENS together; no two of one prompt."""
    batch: dict[int, Integers] = {}
    for i, ids in unread.items():
        for begin in range(0, len(ids), READ_TOKENS):
            part = ids[begin : begin + READ_TOKENS]
            if sum(map(len, batch.values())) + len(part) > READ_TOKENS:
                yield batch
                batch = {}
            batch[i] = part
    yield batch
