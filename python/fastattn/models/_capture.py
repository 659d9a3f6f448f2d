# SPDX-License-Identifier: Apache-2.0
"""Looking on while a model runs: what its heads see, and what it says without some of them.

What runs keeps no more than queries and keys. What follows from them is computed when it is asked
for, of all rows at once: that costs less than it would step by step, and nothing where nobody asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

import fastattn
from fastattn._arguments import as_array, whole_number
from fastattn.nn import Floats, Integers

STATISTICS = ("weights", "top", "column_sums", "entropy", "maximum")
WHAT = (*STATISTICS, "hidden", "query", "key", "value")
PER_HEAD = ("sinks", "alibi_slopes")  # options of attention that have a number for each head


class Attention(NamedTuple):
    """How a layer attends: arrays of shape (total, heads, dim), and options of `attention`."""

    query: Floats
    key: Floats
    value: Floats
    options: dict[str, Any]


class Observer:
    """Whom a model tells what it does, if `observing`: this one heeds nothing."""

    def begin(self, ids: Integers, lengths: Integers) -> None:
        """Be told what is read now, and how long the texts are with it, several being packed."""

    def states(self, layer: int, x: Floats) -> None:
        """Be told what a layer is given, and last, by the number of layers, what is behind all.

        The model changes the array afterwards.
        """

    def attended(self, layer: int, attention: Attention, seen: Floats) -> None:
        """Be told how a layer attends, and what is seen: (total, q_heads * value_head_dim).

        That may be changed.
        """


class Watched:
    """What observers look on at, by its layers and heads: a model, or a part of one."""

    config: Any
    observers: tuple[Observer, ...] = ()

    def begin(self, ids: Integers, lengths: Integers) -> None:
        """Tell the observers what is read, and how long the texts are with it."""
        for observer in self.observers:
            observer.begin(ids, lengths)

    def states(self, layer: int, x: Floats) -> Floats:
        """Return x, of which the observers are told that a layer is given it."""
        for observer in self.observers:
            observer.states(layer, x)
        return x

    def attended(self, layer: int, attention: Attention, seen: Floats) -> Floats:
        """Return what a layer sees, of which the observers are told."""
        for observer in self.observers:
            observer.attended(layer, attention, seen)
        return seen


T = TypeVar("T", bound=Observer)


@contextlib.contextmanager
def observing(model: Watched, observer: T) -> Iterator[T]:
    """Let a model tell an observer what it does, for as long as the `with` lasts."""
    model.observers = (*model.observers, observer)
    try:
        yield observer
    finally:
        model.observers = tuple(x for x in model.observers if x is not observer)


@contextlib.contextmanager
def unobserved(*watched: Watched) -> Iterator[None]:
    """Let who captures look away, for as long as the `with` lasts: heads stay taken away."""
    before = [x.observers for x in watched]
    for x in watched:
        x.observers = tuple(y for y in x.observers if isinstance(y, Ablation))
    try:
        yield
    finally:
        for x, observers in zip(watched, before, strict=True):
            x.observers = observers


class Observed:
    """What `Decoder` and `Encoder` share: their model can be looked into."""

    _model: Watched

    def capture(
        self,
        *,
        layers: ArrayLike | None = None,
        heads: ArrayLike | None = None,
        rows: slice | ArrayLike | None = None,
        what: str | Iterable[str] = ("weights",),
        top: int = 8,
    ) -> AbstractContextManager[Capture]:
        """Capture what heads see of one text, while the model runs as fast as ever.

        In the `with`, call what runs the model once: `encode` of one text, `logits`, `score`,
        `generate` of one prompt; what is generated is captured as it is read. The model keeps its
        bits. Captures may be nested, also in `ablate`. No other thread may run the model meanwhile.
        A generator only runs where its pieces are taken: take them in the `with`.

        Parameters
        ----------
        layers, heads : sequence of int, optional
            Which query heads, of each of which layers; by default all.
        rows : slice or sequence of int, optional
            The positions of the tokens of whose queries it is captured; by default all. Positions
            that the text does not reach are left out; it must reach one.
        what : str or sequence of str
            The names of what is captured: "weights", "top", "column_sums", "entropy", "maximum",
            "hidden", "query", "key", "value". `Capture` says what they are.
        top : int
            How many of the keys that a row sees most of, "top" says.

        Returns
        -------
        context manager of a Capture
            Which stays readable behind the `with`.

        Raises
        ------
        TypeError, ValueError
            A layer or a head is not there, or an argument is no such thing. In the `with`: the
            model is given several texts, or one that it has begun to read before.
        """
        model = self._model
        asked = Capture(model, layers=layers, heads=heads, rows=rows, what=what, top=top)
        return observing(model, asked)

    def ablate(self, heads: ArrayLike) -> AbstractContextManager[Any]:
        """Let heads give 0, for as long as a `with` lasts, to see what the model does without them.

        No other thread may run the model meanwhile. A generator only runs where its pieces are
        taken: take them in the `with`.

        Parameters
        ----------
        heads : sequence of (int, int)
            Layers, and a query head of each.

        Raises
        ------
        TypeError, ValueError
            heads are no such pairs, or one is not there.
        """
        return observing(self._model, Ablation(self._model, heads))


class Part:
    """An array of a capture: None if `what` does not name it, or what it is a part of."""

    def __init__(self, what: str | None = None) -> None:
        self._what = what

    def __set_name__(self, owner: type[Capture], name: str) -> None:
        """Take the attribute's name."""
        self._name, self._what = name, self._what or name

    def __get__(self, capture: Capture | None, owner: type[Capture]) -> Any:
        """Return the array as it is now."""
        if capture is None:
            return self
        return capture.part(self._name) if self._what in capture.what else None


class Capture(Observer):
    """What was captured of a text. It is computed when it is asked for, of what was read by then.

    Its arrays are float32 but for `ids`, the numbers and `top_keys`, and None where `what` did not
    name them. To ask before the model has read one of the rows is a RuntimeError.

    Attributes
    ----------
    ids : list of int
        The tokens that the model has read.
    what : frozenset of str
        The names of what was asked for.
    layers, heads, rows : ndarray of int64
        The numbers of what was captured. Rows are the positions of tokens, ascending.
    weights : ndarray of shape (layers, heads, rows, tokens)
        The probabilities with which a row weighs the tokens: 0 for those that it does not see.
    top_keys, top_weights : ndarray of shape (layers, heads, rows, top)
        The positions of the largest weights of each row, in int64, and these; the largest comes
        first. Beyond what a row sees: -1 and 0.
    column_sums : ndarray of shape (layers, heads, tokens)
        The sum of the weights over the rows.
    entropy, maximum : ndarray of shape (layers, heads, rows)
        Of each row's weights, the entropy in nats and the largest.
    hidden : ndarray of shape (all layers + 1, rows, hidden)
        What each layer of the model is given, whatever `layers` are, and what the last one returns.
        A decoder's last norm comes behind it.
    query, key, value : ndarray of shape (layers, heads, rows or tokens, dim)
        As attention is given them: the query of each row, and the key and value of each token, of
        the head that the query head reads.
    options : list of dict
        The options of `fastattn.attention` that each layer has beside them: is_causal, and those
        of the model, such as scale, window or sinks.
    """

    def __init__(
        self, model: Watched, *, layers: Any, heads: Any, rows: Any, what: Any, top: Any
    ) -> None:
        self._count = model.config.num_hidden_layers
        self.layers = _chosen("layers", layers, self._count)
        self.heads = _chosen("heads", heads, model.config.num_attention_heads)
        self._rows, self.what, self._top = _rows(rows), _what(what), whole_number("top", top)
        if self._top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        self._is_scored = not self.what.isdisjoint(STATISTICS)
        self._attends = frozenset(self.layers.tolist() if self.what - {"hidden"} else ())
        self.ids: list[int] = []
        self._step: dict[tuple[str, int], Any] = {}  # what the model says now, by name and layer
        self._steps: list[dict[tuple[str, int], Any]] = []  # and what it had said before
        self._results: dict[str, Any] = {}

    def begin(self, ids: Integers, lengths: Integers) -> None:
        """Refuse what is not the one text from its beginning on."""
        if len(lengths) != 1:
            raise ValueError(f"capture must see one text, got {len(lengths)} at once")
        first, n = int(lengths[0]) - len(ids), len(self.ids)
        if first != n:
            got = "another behind it" if n else f"one of which {first} tokens were read before"
            raise ValueError(f"capture must see one text from its first token on, got {got}")
        self._place: Any = slice(None)
        positions = np.arange(first, first + len(ids))
        if self._rows is not None:
            self._place = np.flatnonzero(_within(positions, self._rows))
        self._step = {("ids", 0): ids, ("rows", 0): positions[self._place]}

    def states(self, layer: int, x: Floats) -> None:
        """Keep the states of the rows; behind the last layer, keep all that was said of it."""
        if "hidden" in self.what:
            self._step["hidden", layer] = np.array(x[self._place])
        if layer == self._count:
            self.ids += self._step["ids", 0].tolist()
            self._steps.append(self._step)
            self._results = {}

    def attended(self, layer: int, attention: Attention, seen: Floats) -> None:
        """Keep what the heads' weights follow from."""
        if layer not in self._attends:
            return
        query, key, value, options = attention
        step, of_kv = self._step, self.heads // (query.shape[1] // key.shape[1])
        step["options", layer] = options
        if self._is_scored or "query" in self.what:
            step["query", layer] = query[self._place][:, self.heads]
        if self._is_scored or "key" in self.what:
            step["key", layer] = key[:, of_kv]
        if "value" in self.what:
            step["value", layer] = value[:, of_kv]

    weights = Part()
    top_keys, top_weights = Part("top"), Part("top")
    column_sums, entropy, maximum = Part(), Part(), Part()
    hidden, query, key, value = Part(), Part(), Part(), Part()

    @property
    def rows(self) -> Integers:
        """The positions of the tokens of which it is captured."""
        return np.concatenate([np.arange(0), *(step["rows", 0] for step in self._steps)])

    @property
    def options(self) -> list[dict[str, Any]]:
        """What each of `layers` gives `fastattn.attention` beside its arrays, for its `heads`."""
        if not self._steps:
            raise RuntimeError("options must be asked for when the model has run in the `with`")
        return [
            {
                name: np.asarray(x)[self.heads] if name in PER_HEAD and x is not None else x
                for name, x in self._steps[0]["options", layer].items()
            }
            for layer in self.layers.tolist()
        ]

    def part(self, name: str) -> Any:
        """Return the array of that name, which is computed once for what was read."""
        if not self._steps:
            raise RuntimeError(f"{name} must be asked for when the model has run in the `with`")
        if not self.rows.size:
            raise RuntimeError(f"rows must be of the text, which has {len(self.ids)} tokens")
        if name not in self._results:
            if name == "hidden":
                each = [self._joined(name, layer) for layer in range(self._count + 1)]
                self._results[name] = np.stack(each)
            elif name in WHAT and name not in STATISTICS:
                self._results[name] = np.stack([self._heads(name, x) for x in self.layers.tolist()])
            else:
                self._results |= self._statistics()
        return self._results[name]

    def _joined(self, name: str, layer: int) -> Floats:
        """Return what the model said of a layer, step by step."""
        return np.concatenate([step[name, layer] for step in self._steps])

    def _heads(self, name: str, layer: int) -> Floats:
        """Return the queries, keys or values of a layer, head by head."""
        return self._joined(name, layer).swapaxes(0, 1)

    def _statistics(self) -> dict[str, Any]:
        """Return all that was asked of the weights."""
        rows, what, found = self.rows, self.what, dict[str, Any]()
        gaps = np.flatnonzero(np.diff(rows) != 1) + 1  # A call is given rows in succession.
        runs = [slice(*ends) for ends in pairwise([0, *gaps.tolist(), len(rows)])]
        for i, (layer, options) in enumerate(zip(self.layers.tolist(), self.options, strict=True)):
            query, key = self._heads("query", layer), self._heads("key", layer)
            for run in runs:
                single = np.arange(run.stop - run.start), np.arange(key.shape[1])
                statistics = fastattn.attention_statistics(
                    query[None, :, run],
                    key[None],
                    query_offset=int(rows[run.start]),
                    entropy="entropy" in what,
                    column_sums="column_sums" in what,
                    top=self._top if "top" in what else None,
                    blocks=single if "weights" in what else None,
                    maximum="maximum" in what,
                    **options,
                )
                for field, x in statistics._asdict().items():
                    if x is None:
                        continue
                    name = "weights" if field == "blocks" else field
                    shape = x.shape[2:] if name == "column_sums" else (len(rows), *x.shape[3:])
                    if name not in found:
                        lead = len(self.layers), len(self.heads)
                        found[name] = np.zeros((*lead, *shape), x.dtype)
                    if name == "column_sums":
                        found[name][i] += x[0]
                    else:
                        found[name][i, :, run] = x[0]
        return found


class Ablation(Observer):
    """Who takes heads away."""

    def __init__(self, model: Watched, heads: ArrayLike) -> None:
        pairs = as_array("heads", heads, "integers")
        self._heads: dict[int, Integers] = {}
        if not pairs.size:
            return
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            rule = "pairs of a layer and a head"
            raise ValueError(f"heads must be {rule}, got an array of shape {pairs.shape}")
        config = model.config
        layers = _chosen("layers of heads", pairs[:, 0], config.num_hidden_layers)
        found = _chosen("heads", pairs[:, 1], config.num_attention_heads)
        self._heads = {layer: found[layers == layer] for layer in set(layers.tolist())}

    def attended(self, layer: int, attention: Attention, seen: Floats) -> None:
        """Take away what the heads of the layer see."""
        if layer in self._heads:
            seen.reshape(*attention.query.shape[:2], -1)[:, self._heads[layer]] = 0


def _chosen(name: str, given: Any, count: int) -> Integers:
    """Return the numbers of layers or heads, of which a model has so many; None means all."""
    rule = f"within 0..{count - 1}, those of the model"
    return np.arange(count) if given is None else _numbers(name, given, count, rule)


def _numbers(name: str, given: Any, count: int, rule: str) -> Integers:
    """Return numbers, of which there must be one at least, from 0 on and below count."""
    found = as_array(name, given, "integers")
    if found.ndim != 1 or not found.size:
        raise ValueError(f"{name} must be a sequence of at least one, got shape {found.shape}")
    if found.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {found.dtype}")
    for wrong in found[(found < 0) | (found >= count)][:1]:
        raise ValueError(f"{name} must be {rule}, got {wrong}")
    return found.astype(np.int64)


def _rows(given: Any) -> slice | Integers | None:
    """Return which positions are meant; None means all."""
    if given is None:
        return None
    if not isinstance(given, slice):
        return _numbers("rows", given, 2**63, "positions from 0 on")
    parts = {"start": given.start, "stop": given.stop, "step": given.step}
    for name, x in parts.items():
        if x is not None and whole_number(f"the {name} of rows", x) < (name == "step"):
            raise ValueError(f"the {name} of rows must be at least {int(name == 'step')}, got {x}")
    return given


def _within(positions: Integers, rows: slice | Integers) -> Any:
    """Return which positions are among the rows."""
    if not isinstance(rows, slice):
        return np.isin(positions, rows)
    span = range(*rows.indices(int(positions[-1]) + 1))
    return [x in span for x in positions.tolist()]


def _what(given: Any) -> frozenset[str]:
    """Return the names of what is captured."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Iterable):
        raise TypeError(f"what must be a str or a sequence of str, not {type(given).__name__}")
    found = list(names)
    for wrong in [x for x in found if x not in WHAT][:1]:
        raise ValueError(f"what must be of {', '.join(WHAT)}, got {wrong!r}")
    if not found:
        raise ValueError(f"what must be at least one of {', '.join(WHAT)}, got none")
    return frozenset(found)
