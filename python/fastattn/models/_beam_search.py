# SPDX-License-Identifier: Apache-2.0
"""Which texts does a model write of sources? Those that are likeliest, as far as beams find them.

At each step every source keeps the likeliest beginnings, and each goes on by every token; the
caches of those that are dropped make room for those that go on in several ways. The rules are
those of transformers, so that its texts are found. Each source has the texts that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn import nn
from fastattn._arguments import whole_number
from fastattn.models._sampling import largest
from fastattn.nn import Floats, Integers

if TYPE_CHECKING:
    from fastattn.models._encoder_decoder import EncoderDecoderModel, SourceContext

MOST_BEAMS = 1000  # each has a row of logits at every step
Rule = Callable[[Sequence[Sequence[int]], Floats], None]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How texts are looked for.

    Attributes
    ----------
    stop_ids : frozenset of int
        The tokens that end a text.
    max_new_tokens : int
        The most tokens behind the prompt, of which one may end the text.
    beams : int
        How many beginnings of a text are kept; with 1, it goes on by the likeliest token.
    length_penalty : float
        A text's log-probability is divided by its number of tokens to this power: above 0, longer
        texts are preferred.
    early_stopping : bool or "never"
        Whether the search ends when as many texts have ended as there are beams; or else, when
        none that goes on would be better now, or "never" could be, however long it gets. With one
        beam it ends with its text.
    suppressed : tuple of int
        Tokens that are never written.
    first, last : int or None
        The token that every text begins with, and the one that ends it where it is longest.
    renormalize : bool
        Whether the other tokens share the probability of those that are not allowed.
    rule : function, optional
        It is given the tokens of each beginning behind its prompt, and how likely each is to
        follow, of shape (beginnings, vocabulary). It sets those to -inf that may not follow.
    """

    stop_ids: frozenset[int]
    max_new_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    suppressed: tuple[int, ...] = ()
    first: int | None = None
    last: int | None = None
    renormalize: bool = False
    rule: Rule | None = None

    def log_probabilities(self, texts: Sequence[Sequence[int]], logits: Floats) -> Floats:
        """Return the log-probability of each token that may follow beginnings, by the logits."""
        found = logits if self.renormalize else nn.log_softmax(logits)
        found[:, list(self.suppressed)] = -np.inf
        if self.rule is not None:
            self.rule(texts, found)
        step = len(texts[0]) + 1
        for token, when in ((self.first, 1), (self.last, self.max_new_tokens)):
            if token is not None and step == when:
                found[:] = -np.inf
                found[:, token] = 0
        return nn.log_softmax(found) if self.renormalize else found


class Hypothesis(NamedTuple):
    """A text, or the beginning of one.

    Attributes
    ----------
    ids : list of int
        Its tokens behind the prompt, without one that ends it.
    log_probability : float
        Of all its tokens, the end included.
    score : float
        That, by `Search.length_penalty`: the higher, the better.
    """

    ids: list[int]
    log_probability: float
    score: float


class Beams:
    """The texts of one source: those that go on, and the best that have ended."""

    def __init__(self, how: Search) -> None:
        self._how = how
        self.going, self.ended = [Hypothesis([], 0.0, 0.0)], list[Hypothesis]()

    def step(self, logits: Floats) -> list[int]:
        """Go on by the logits of each that goes on; return of each that does, which it was."""
        how = self._how
        rows = how.log_probabilities([x.ids for x in self.going], logits)
        if not np.isfinite(rows.max()):
            raise ValueError(f"the model's largest logit must be finite, got {rows.max()}")
        length = len(self.going[0].ids) + 1
        rows += np.array([[x.log_probability] for x in self.going], np.float32)
        # So many that enough of them go on, whatever tokens end the others.
        places = _ranked(rows.ravel(), (1 + max(1, len(how.stop_ids))) * how.beams)
        parents, going = list[int](), list[Hypothesis]()
        for rank, place in enumerate(places.tolist()):
            parent, token = divmod(place, rows.shape[1])
            ids, total = self.going[parent].ids, float(rows[parent, token])
            if total == -np.inf:
                break
            score = total / length**how.length_penalty
            if token not in how.stop_ids:
                ids = [*ids, token]
            if token in how.stop_ids or length == how.max_new_tokens:
                if rank < how.beams:
                    self.ended.append(Hypothesis(ids, total, score))
            elif len(going) < how.beams:
                parents.append(parent)
                going.append(Hypothesis(ids, total, score))
        self.ended = sorted(self.ended, key=lambda x: -x.score)[: how.beams]
        self.going = going if self._may_improve(going, length) else []
        return parents if self.going else []

    def _may_improve(self, going: list[Hypothesis], length: int) -> bool:
        """Tell whether texts that go on may be better than those that have ended."""
        how = self._how
        if not going or len(self.ended) < how.beams:
            return bool(going)
        if how.early_stopping is True or how.beams == 1:
            return False
        if how.early_stopping == "never" and how.length_penalty > 0:
            length = how.max_new_tokens
        best: float = going[0].log_probability / length**how.length_penalty
        return best > self.ended[-1].score


def _ranked(x: Floats, count: int) -> NDArray[np.intp]:
    """Return the places of the largest numbers, the largest first; the first of equals."""
    count = min(count, len(x))
    places = largest(x, count, np.partition(x, -count)[-count])
    return places[np.argsort(-x[places], kind="stable")]


def number_of_beams(name: str, x: Any) -> int:
    """Return x as a number of beams."""
    if not 1 <= whole_number(name, x) <= MOST_BEAMS:
        raise ValueError(f"{name} must be from 1 to {MOST_BEAMS}, got {x}")
    return int(x)


def search(
    model: EncoderDecoderModel[Any],
    context: SourceContext,
    prompts: Sequence[Integers],
    how: Search,
) -> list[list[Hypothesis]]:
    """Return the best texts of each source, as many as there are beams, the best first.

    Parameters
    ----------
    model : EncoderDecoderModel
    context : SourceContext
        Of the sources, of which nothing has been written yet.
    prompts : sequence of arrays of int64
        What the text of each source begins with: a token at least.
    how : Search
    """
    beams = [Beams(how) for _ in prompts]
    context.feed([len(x) for x in prompts])
    ends = np.cumsum([len(x) for x in prompts])
    states = model(np.concatenate(prompts), context)[ends - 1]
    while True:
        parents, begin = list[int](), 0
        logits = model.head(states)
        for beam in beams:
            if n := len(beam.going):
                parents += [begin + i for i in beam.step(logits[begin : begin + n])]
                begin += n
        context.reorder(parents)
        if not parents:
            return [x.ended for x in beams]
        tokens = np.array([x.ids[-1] for beam in beams for x in beam.going])
        context.feed([1] * len(tokens))
        states = model(tokens, context)
