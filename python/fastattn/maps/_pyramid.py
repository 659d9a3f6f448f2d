# SPDX-License-Identifier: Apache-2.0
"""The map of a long text: blocks of it at several levels, and each word's strongest links.

No matrix of weights is made: the kernel sums the finest blocks, and coarser ones are sums of these.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

import fastattn
from fastattn._arguments import as_array, whole_number
from fastattn.maps import _html, _words
from fastattn.maps._map import CHECK, Link, at_least_1, in_notebook, suffix_of, write
from fastattn.maps._terminal import percent
from fastattn.maps._words import Choice, merged
from fastattn.nn import Floats, Integers

BLOCKS = 1500  # a side of the finest level, beside which others are 6 and 48 times coarser
NAMES = {48: "parts", 6: "passages", 1: "lines"}
MOST_BLOCKS = 4_000_000  # of a level


class Level(NamedTuple):
    """A text cut into blocks.

    Attributes
    ----------
    name : str
    queries, keys : ndarray of int64
        The word that each block of words begins with.
    shares : ndarray of shape (heads, len(queries), len(keys)) and dtype float32
        What a token of the one block gives to the other block, in the mean.
    """

    name: str
    queries: Integers
    keys: Integers
    shares: Floats


@dataclass(frozen=True, eq=False, repr=False)
class LongMap:
    """Where few heads look in a long text, as `pyramid` makes it. A notebook shows its page.

    Attributes
    ----------
    words : tuple of str
        The first token is a word of its own.
    layers, heads : tuple of int
        Their numbers, one for each head; layers may be empty.
    levels : tuple of Level
        From coarse to fine.
    top_keys, top_weights : ndarray of shape (heads, words, top), int64 and float32
        The words that each word looks at most, by the strongest keys of its tokens: -1 and 0 behind
        the last one.
    special : tuple of int
        The indices of special tokens, and of the first token in a causal map.
    sink : ndarray of shape (heads,) and dtype float32
        The share of all attention that goes to `special`, as in `Map`.
    sink_names : str
        What `special` is, in words.
    is_causal : bool
    title : str
    """

    words: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    levels: tuple[Level, ...]
    top_keys: Integers
    top_weights: Floats
    special: tuple[int, ...]
    sink: Floats
    sink_names: str
    is_causal: bool
    title: str

    def links(self, word: Choice, count: int = 10) -> list[Link]:
        """Return the strongest links of a word, as `Map.links` does; unknown layers are -1."""
        count = at_least_1("count", count)
        row = _words.place(self.words, word)
        hidden = np.array([*self.special, row, -1])
        keys, shares = self.top_keys[:, row], self.top_weights[:, row]
        found: dict[int, tuple[float, int]] = {}
        for head, i in np.argwhere(~np.isin(keys, hidden)).tolist():
            key = int(keys[head, i])
            found[key] = max(found.get(key, (0.0, 0)), (float(shares[head, i]), -head))
        best = sorted(found.items(), key=lambda x: x[1], reverse=True)[:count]
        layers = self.layers or (-1,) * len(self.heads)
        return [
            Link(self.words[row], self.words[key], layers[-i], self.heads[-i], share)
            for key, (share, i) in best
        ]

    def sink_text(self) -> str:
        """Return the sentence that says how much goes to `special`; "" where there are none."""
        if not self.special:
            return ""
        return f"{percent(self.sink.mean())} of the attention goes to {self.sink_names}"

    def __repr__(self) -> str:
        """Return what it is, in short."""
        return f"<LongMap: {len(self.words)} words, {len(self.heads)} heads>"

    def __str__(self) -> str:
        """Return what it is, in a line."""
        sizes = ", ".join(f"{len(x.queries):,} {x.name}" for x in self.levels)
        text = f"{len(self.words):,} words in {sizes}; {len(self.heads)} heads"
        return f"{text}. {self.sink_text()}." if self.special else f"{text}."

    def data(self) -> dict[str, Any]:
        """Return what the page is made of, which JSON can hold."""
        pack, budget = _html.pack, _html.PYRAMID_BUDGET
        keys = np.maximum(self.top_keys, 0)
        return {
            "kind": "pyramid",
            "title": self.title,
            "words": list(self.words),
            "layers": list(self.layers),
            "heads": list(self.heads),
            "causal": self.is_causal,
            "levels": [
                {
                    "name": level.name,
                    "queries": level.queries.tolist(),
                    "keys": level.keys.tolist(),
                    "blocks": pack(level.shares, budget),
                }
                for level in self.levels
            ],
            "top": {
                "count": keys.shape[2],
                "keys": _html.pack_integers(keys),
                "shares": pack(self.top_weights, budget),
            },
            "special": list(self.special),
            "sink": {"text": self.sink_text(), "shares": self.sink.astype(float).round(3).tolist()}
            if self.special
            else None,
            "check": {"text": CHECK, "code": ""},
        }

    def html(self) -> str:
        """Return the page: one file of HTML that needs no network.

        Raises
        ------
        ValueError
            It would be above its bound of 8 MB.
        """
        return _html.page(self.data())

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return in_notebook(self.html())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file that ends in .html, all of it or nothing."""
        suffix_of(path, (".html",))
        write(path, self.html().encode())


def pyramid(
    query: ArrayLike,
    key: ArrayLike,
    tokens: Sequence[str],
    *,
    levels: Mapping[str, ArrayLike] | None = None,
    top: int = 4,
    is_special: Sequence[bool] | None = None,
    layers: Sequence[int] = (),
    heads: Sequence[int] | None = None,
    title: str = "Where the heads look",
    is_causal: bool = True,
    **options: Any,
) -> LongMap:
    """Return the map of a long text, from the queries and keys of few heads.

    Memory is linear in the length, but for the finest level; time is quadratic. 100,000 tokens are
    ten thousand million pairs for each head.

    Parameters
    ----------
    query, key : array of shape (heads, len, head_dim)
        As `attention_statistics` is given them, without the batch, as a `Capture` has them of each
        layer; all finite.
    tokens : sequence of str
        Of the text, spelt as for `show`.
    levels : mapping of str to sequence of int, optional
        Names, as "chapters", and the tokens that these begin with, ascending from 0; from coarse to
        fine, each start being one of the next level too. By default three levels of equal blocks,
        of which the finest has at most 1500, and fewer the more heads there are.
    top : int
        How many links each word keeps.
    is_special : sequence of bool, optional
        Which tokens stand for no word; by default as in `show`.
    layers, heads : sequence of int, optional
        The numbers of the heads; by default 0, 1 and so on, and no layers.
    title : str
        The heading of the page.
    is_causal : bool
        Whether no token sees a later one: True unless it is given, as of a decoder. Give False for
        the queries and keys of an encoder. (`attention_statistics` has False by default.)
    **options
        As `attention_statistics` is given them.

    Returns
    -------
    LongMap

    Raises
    ------
    TypeError, ValueError
        The tokens do not match, `query` or `key` is not finite, the levels are no such starts or
        have too many blocks, or `attention_statistics` refuses an argument.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import maps
    >>> query, key = np.random.default_rng(0).standard_normal((2, 1, 3000, 16), np.float32)
    >>> print(maps.pyramid(query, key, ["a"] * 3000))
    3,000 words in 32 parts, 250 passages, 1,500 lines; 1 heads. 0 % of the attention goes to the \
first token, "a".
    """
    queries, keys = (as_array(n, x, "numbers") for n, x in (("query", query), ("key", key)))
    texts = _words.checked("tokens", tokens)
    for name, x in (("query", queries), ("key", keys)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be (heads, len, head_dim), got shape {x.shape}")
        if x.shape[1] != len(texts) or not texts:
            rule = f"as many as {name} has positions, {x.shape[1]}, and at least 1"
            raise ValueError(f"tokens must be {rule}, got {len(texts)}")
        _check_finite(name, x)
    top = at_least_1("top", top)
    of_heads = tuple(range(len(queries))) if heads is None else _numbers("heads", heads)
    of_layers = _numbers("layers", layers)
    for name, numbers in (("heads", of_heads), ("layers", of_layers or of_heads)):
        if len(numbers) != len(queries):
            rule = f"as many as query has heads, {len(queries)}"
            raise ValueError(f"{name} must be {rule}, got {len(numbers)}")
    special = _words.special_of(texts, is_special)
    pieces = _words.pieces_of_tokens(texts)
    rest = merged(pieces[1:], special[1:])
    names = (pieces[0].strip() or texts[0], *rest.words)
    starts = np.array([0, *(1 + x for x in rest.starts)])
    hidden = {0} if is_causal or special[0] else set()
    hidden |= {1 + k for k in rest.special}
    has_choice = _words.rows_with_choice(np.array(special), is_causal)
    wanted = _levels(levels, starts, len(texts), len(queries))
    finest = wanted[-1][1]
    of_keys = np.union1d(finest, [0, *([1] if len(starts) > 1 else [])])
    stats = fastattn.attention_statistics(
        queries[None],
        keys[None],
        is_causal=is_causal,
        column_sums=True,
        row_weights=has_choice / has_choice.sum(),
        top=min(2 * top, len(texts)),
        blocks=(starts[finest], starts[of_keys]),
        **options,
    )
    assert stats.blocks is not None
    assert stats.column_sums is not None
    found_levels = []
    for name, begins in wanted:
        columns = np.union1d(begins, of_keys[:2] if len(starts) > 1 and of_keys[1] == 1 else [0])
        sums = np.add.reduceat(stats.blocks[0], np.searchsorted(finest, begins), axis=1)
        sums = np.add.reduceat(sums, np.searchsorted(of_keys, columns), axis=2)
        rows = np.diff([*starts[begins].tolist(), len(texts)])
        shares = np.minimum(sums / rows[:, None], 1).astype(np.float32)
        found_levels.append(Level(name, begins, columns.astype(np.int64), shares))
    tops = [
        _top(k, w, starts, top)
        for k, w in zip(stats.top_keys[0], stats.top_weights[0], strict=True)
    ]
    first_tokens = starts[sorted(hidden)]
    sink = stats.column_sums[0][:, first_tokens].sum(axis=1)
    return LongMap(
        words=names,
        layers=of_layers,
        heads=of_heads,
        levels=tuple(found_levels),
        top_keys=np.stack([k for k, _ in tops]),
        top_weights=np.stack([w for _, w in tops]),
        special=tuple(sorted(hidden)),
        sink=np.asarray(sink, np.float32),
        sink_names=_words.sink_names(
            names[0] if is_causal and not special[0] else None,
            [texts[i] for i in starts[sorted(hidden)] if special[i]],
        ),
        is_causal=is_causal,
        title=title,
    )


def _check_finite(name: str, x: Any) -> None:
    """Refuse floats that are not finite, which would make whole rows NaN."""
    if x.dtype.kind in "fc" or x.dtype.name == "bfloat16":
        finite = np.isfinite(x)
        if not finite.all():
            at = tuple(int(i) for i in np.unravel_index(finite.argmin(), finite.shape))
            raise ValueError(f"{name} must be finite, got {x[at]} at {at}")


def _numbers(name: str, given: Any) -> tuple[int, ...]:
    """Return the numbers of layers or heads, which must be some ints."""
    try:
        found = list(given)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of int, not {type(given).__name__}") from None
    return tuple(whole_number(f"{name}[{i}]", x) for i, x in enumerate(found))


def _levels(
    given: Mapping[str, ArrayLike] | None, starts: Integers, tokens: int, heads: int
) -> list[tuple[str, Integers]]:
    """Return the names of levels, and the words that their blocks begin with."""
    if given is None:
        most = min(BLOCKS, math.isqrt(MOST_BLOCKS // max(heads, 1)))
        size = -(-len(starts) // max(most, 1))
        names = {**NAMES, 1: "words" if size == 1 else NAMES[1]}
        equal = [(name, np.arange(0, len(starts), size * times)) for times, name in names.items()]
        return [x for x in equal if len(x[1]) > 1] or equal[-1:]
    if not isinstance(given, Mapping):
        rule = "a mapping of names to the tokens that blocks begin with"
        raise TypeError(f"levels must be {rule}, not {type(given).__name__}")
    chosen: list[tuple[str, Integers]] = []
    for name, x in given.items():
        array = as_array(f"levels[{name!r}]", x, "integers")
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size or array[0] != 0:
            raise ValueError(f"levels[{name!r}] must be integers that begin with 0, got {x!r:.60}")
        array = array.astype(np.int64)
        if (np.diff(array) <= 0).any() or array[-1] >= tokens:
            raise ValueError(f"levels[{name!r}] must ascend, and stay below {tokens}, the tokens")
        words = np.unique(np.searchsorted(starts, array, side="right") - 1)
        if (count := heads * len(words) ** 2) > MOST_BLOCKS:
            rule = f"at most {MOST_BLOCKS:,} blocks x blocks x heads"
            raise ValueError(f"levels[{name!r}] must be {rule}, got {count:,}")
        for wrong in np.setdiff1d(chosen[-1][1], words)[:1] if chosen else ():
            rule = f"begin where those of {chosen[-1][0]!r} begin"
            raise ValueError(f"levels[{name!r}] must {rule}, and none does at word {wrong}")
        chosen.append((name, words))
    if not chosen:
        raise ValueError("levels must be one at least, got none")
    return chosen


def _top(keys: Integers, weights: Floats, starts: Integers, top: int) -> tuple[Integers, Floats]:
    """Return the words that each word looks at most, by the strongest keys of its tokens.

    A word gives another the mean, over its tokens, of what these give to the other's tokens.
    """
    tokens, words = len(keys), len(starts)
    word_of = np.searchsorted(starts, np.arange(tokens), side="right") - 1
    lengths = np.diff([*starts.tolist(), tokens])
    rows, places = np.nonzero(keys >= 0)
    pairs = word_of[rows] * words + word_of[keys[rows, places]]
    found, which = np.unique(pairs, return_inverse=True)
    query, key = np.divmod(found, words)
    shares = np.bincount(which, weights[rows, places], len(found)) / lengths[query]
    order = np.lexsort((key, -shares, query))
    query, key, shares = query[order], key[order], shares[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    kept = rank < top
    out_keys, out = np.full((words, top), -1, np.int64), np.zeros((words, top), np.float32)
    out_keys[query[kept], rank[kept]] = key[kept]
    out[query[kept], rank[kept]] = np.minimum(shares[kept], 1)
    return out_keys, out
