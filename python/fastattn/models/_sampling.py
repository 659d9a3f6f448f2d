# SPDX-License-Identifier: Apache-2.0
"""Which token comes next? The likeliest, or one that is drawn from those that filters leave."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from fastattn._arguments import finite_number, whole_number
from fastattn.models._tokens import unicode_text
from fastattn.nn import Floats

BLOCK = 256  # weights that are summed before one of them is looked for
Call = TypeVar("Call", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """The options of a call that generates; `Sampling` says what they are by default."""

    max_new_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str]
    stop_ids: Collection[int] | None


class Sampling:
    """How a text is generated; `Decoder.generate` explains each option.

    The logits are divided by the temperature, then top_k, top_p and min_p leave some, in this
    order, as in transformers. Of equal logits the lower id comes first.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        self.max_new_tokens = _at_least("max_new_tokens", 0, options.get("max_new_tokens"))
        self.temperature = options.get("temperature", 0.0)
        if finite_number("temperature", self.temperature) < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        self.top_k = _at_least("top_k", 1, options.get("top_k"))
        self.top_p = options.get("top_p")
        if self.top_p is not None and not 0 < finite_number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        self.min_p = options.get("min_p")
        if self.min_p is not None and not 0 <= finite_number("min_p", self.min_p) <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        self.seed = options.get("seed")  # which `generators` checks
        stop = options.get("stop", ())
        if not isinstance(stop, Sequence):
            raise TypeError(f"stop must be a str or a sequence of them, not {type(stop).__name__}")
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in [unicode_text("stop", x) for x in self.stop]:
            raise ValueError("stop must be strings of at least one character, got ''")
        self.stop_ids = options.get("stop_ids")
        if not isinstance(self.stop_ids, Collection | None):
            kind = type(self.stop_ids).__name__
            raise TypeError(f"stop_ids must be a collection of int, not {kind}")
        for x in self.stop_ids or ():
            whole_number("each of stop_ids", x)

    def generators(self, prompts: int) -> list[np.random.Generator]:
        """Return what the draws of each prompt come from: of one seed, as if each were alone."""
        seed = self.seed
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * prompts
        if len(seeds) != prompts:
            rule = f"one int, or one for each of {prompts} prompts"
            raise ValueError(f"seed must be {rule}, got {len(seeds)} of them")
        for x in [] if seed is None else seeds:
            if whole_number("seed", x) < 0:
                raise ValueError(f"seed must be >= 0, got {x}")
        return [np.random.default_rng(x) for x in seeds]

    def choose(self, logits: Floats, generator: np.random.Generator) -> int:
        """Return the id of the next token, by the logits of all; one number is drawn at most."""
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise ValueError(f"the model's largest logit must be finite, got {logits[best]}")
        if self.temperature == 0:
            return best
        ids, weights = self._left(logits, logits[best])
        place = _place(weights, generator.random())
        return place if ids is None else int(ids[place])

    def _left(self, logits: Floats, most: np.float32) -> tuple[NDArray[np.intp] | None, Floats]:
        """Return the ids that the filters leave, None for all, and their weights: the most is 1."""
        ids = None
        if self.top_k is not None and self.top_k < len(logits):
            ids = largest(logits, self.top_k, np.partition(logits, -self.top_k)[-self.top_k])
            logits = logits[ids]
        weights = logits - most
        # float32 holds no number between these limits' reciprocals that matters.
        with np.errstate(over="ignore"):
            weights /= np.float32(min(max(self.temperature, 1e-30), 1e30))
        np.exp(weights, out=weights)
        for kept in (self._nucleus, self._likely):
            if (places := kept(weights)) is not None:
                ids = places if ids is None else ids[places]
                weights = weights[places]
        return ids, weights

    def _nucleus(self, weights: Floats) -> NDArray[np.intp] | None:
        """Return the places that top_p leaves; weights that are surely too small are not sorted."""
        if self.top_p is None or self.top_p == 1:
            return None
        whole = weights.sum(dtype=np.float64)
        # All that are less than this one sum to less than what may be left out.
        least = np.float32((1 - self.top_p) * whole / len(weights))
        most = np.sort(weights[weights >= least])[::-1]
        count = int(most.cumsum(dtype=np.float64).searchsorted(self.top_p * whole)) + 1
        return largest(weights, count, most[min(count, len(most)) - 1])

    def _likely(self, weights: Floats) -> NDArray[np.intp] | None:
        """Return the places that min_p leaves."""
        return np.flatnonzero(weights >= np.float32(self.min_p)) if self.min_p else None


def largest(x: Floats, count: int, least: np.float32) -> NDArray[np.intp]:
    """Return the places of the largest numbers, of which one is the least; the first of equals."""
    places = np.flatnonzero(x >= least)
    if len(places) > count:
        equal = np.flatnonzero(x[places] == least)
        places = np.delete(places, equal[count - len(places) :])
    return places


def _place(weights: Floats, share: float) -> int:
    """Return the place where the running sum of weights passes that share of the whole."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    wanted = share * sums[-1]
    block = int(sums.searchsorted(wanted, "right"))
    if block:
        wanted -= sums[block - 1]
    inner = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    # Rounding may ask for more than the block holds: its last token that has a weight is meant.
    place = min(inner.searchsorted(wanted, "right"), inner.searchsorted(inner[-1]))
    return block * BLOCK + int(place)


def _at_least(name: str, least: int, x: int | None) -> int | None:
    """Return an option, which must be None or such an int."""
    if x is not None and whole_number(name, x) < least:
        raise ValueError(f"{name} must be >= {least}, got {x}")
    return x


def takes(*without: str) -> Callable[[Call], Call]:
    """Let a call take the options, but for some, which its signature shows one by one."""

    def decorated(call: Any) -> Any:
        signature, kind, usual = inspect.signature(call), inspect.Parameter, vars(Sampling())
        options = [
            kind(name, kind.KEYWORD_ONLY, default=usual[name], annotation=x.__forward_arg__)
            for name, x in Options.__annotations__.items()
            if name not in without
        ]
        own = list(signature.parameters.values())[:-1]
        signature = signature.replace(parameters=[*own, *options])

        @functools.wraps(call)
        def checked(*given: Any, **options: Any) -> Any:
            try:
                signature.bind(*given, **options)
            except TypeError as error:
                raise TypeError(f"{call.__qualname__}() {error}") from None
            return call(*given, **options)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked

    return decorated
