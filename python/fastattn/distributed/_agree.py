# SPDX-License-Identifier: Apache-2.0
"""Whether all ranks ask for the same: they say so, in a few bytes, before any data moves.

An engine that is given messages of other lengths than it expects hangs, computes garbage, or ends
the process. So each rank first checks its own arguments, and tells whether they are in order and
what the terms are that all must share, as a digest. If digests differ, the terms themselves are
told, and every rank raises the same error; if a rank has refused its arguments, all others say so.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastattn.distributed._engine import Peers

    Terms = Mapping[str, Any]

Checked = TypeVar("Checked")

TEXT = 8192  # bytes, of terms in words
LONGEST_TERM = 160  # characters
MOST_NUMBERS = 4  # of an array, that are told one by one
REFUSED = "refused"
FIRST_STEP = "agreeing on the arguments"


def agreed(peers: Peers, check: Callable[[], tuple[Checked, Terms]]) -> Checked:
    """Return what check() returns beside the terms, if all ranks have come to the same terms.

    Parameters
    ----------
    peers : Peers
    check : callable
        Checks this rank's arguments, and returns what it made of them, and terms.

    Raises
    ------
    ValueError
        Ranks differ, or another one has refused its arguments.
    Exception
        What check() has raised.
    """
    refusal: Exception | None = None
    terms: dict[str, str] = {"call": peers.call}
    try:
        checked, own = check()
        terms |= {name: _text(term) for name, term in own.items()}
    except Exception as error:
        refusal = error
        terms[REFUSED] = f"{type(error).__name__}: {error}"
    digests = peers.all_gather(FIRST_STEP, _digest(terms))
    if refusal is None and (digests == digests[0]).all():
        return checked
    told = peers.all_gather("telling what differs", _told(terms))
    if refusal is not None:
        raise refusal
    raise ValueError(_difference([json.loads(bytes(x).rstrip()) for x in told]))


def _digest(terms: dict[str, str]) -> Any:
    return np.frombuffer(hashlib.sha256(json.dumps(terms).encode()).digest(), np.uint8)


def _text(term: Any) -> str:
    """Return a term as text that differs where the term does."""
    if isinstance(term, np.ndarray):
        flat = term.reshape(-1)
        shown = ", ".join(str(x) for x in flat[:MOST_NUMBERS])
        if flat.size > MOST_NUMBERS:
            shown += f", .. (sha256 {_short(flat.tobytes())})"
        return f"[{shown}] of shape {term.shape}, {term.dtype}"
    text = str(term)
    if len(text) <= LONGEST_TERM:
        return text
    return f"{text[: LONGEST_TERM - 40]} .. (sha256 {_short(text.encode())})"


def _short(whole: bytes) -> str:
    """Return a few characters that differ where the bytes do."""
    return hashlib.sha256(whole).hexdigest()[:16]


def _told(terms: dict[str, str]) -> Any:
    """Return terms in so many bytes."""
    text = json.dumps(terms).encode()
    if len(text) > TEXT:  # a refusal that goes on and on
        text = json.dumps({name: term[:LONGEST_TERM] for name, term in terms.items()}).encode()
    return np.frombuffer(text.ljust(TEXT), np.uint8)


def _difference(told: list[dict[str, str]]) -> str:
    """Return which ranks differ in what, from the terms of all of them."""
    calls = [terms["call"] for terms in told]
    for rank, call in enumerate(calls):
        if call != calls[0]:
            return (
                "all ranks must make the same calls in the same order, got "
                f"{calls[0]} on rank 0 and {call} on rank {rank}"
            )
    for rank, terms in enumerate(told):
        if REFUSED in terms:
            return f"rank {rank} has refused its arguments of {calls[0]}: {terms[REFUSED]}"
    for rank, terms in enumerate(told):
        for name, term in told[0].items():
            if terms.get(name) != term:
                return (
                    f"all ranks must give {calls[0]} the same {name}, got {term} on rank 0 and "
                    f"{terms.get(name)} on rank {rank}"
                )
    return f"all ranks must give {calls[0]} the same arguments"
