# SPDX-License-Identifier: Apache-2.0
"""Decoding: every rank has the same queries, and some of the keys; results become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._arguments import (
    arithmetic,
    boolean,
    check_like,
    floats,
    logits_per_head,
    name_of,
)
from fastattn._arrays import library_of, rounded_to, widened
from fastattn.distributed import _exact_merge
from fastattn.distributed._agree import agreed
from fastattn.distributed._block import add, add_sinks
from fastattn.distributed._comm import peers_of, seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from fastattn.distributed._engine import Peers

    Array = NDArray[Any]


def combine(
    out: ArrayLike | Sequence[ArrayLike],
    lse: ArrayLike | Sequence[ArrayLike],
    *,
    comm: Any,
    sinks: ArrayLike | None = None,
    reproducible: bool = False,
    timeout: float | None = None,
) -> tuple[Array, Array]:
    """Merge the attention of the same queries over the keys of each rank, on every rank.

    So a model decodes over a cache that is shared by ranks: each attends to the keys that it keeps,
    and the results are combined; keys do not travel.

    Parameters
    ----------
    out : array of shape (batch, q_heads, q_len, value_head_dim), or a sequence of them
        This rank's, as `fastattn.attention` returns it with return_lse=True, without sinks; or
        some parts, over disjoint keys. A rank without keys gives zeros, and an lse of -inf.
    lse : array of shape (batch, q_heads, q_len), or a sequence of them
    comm : communicator of mpi4py, or ProcessGroup or DeviceMesh of torch.distributed
    sinks : array of shape (q_heads,), optional
        As for `fastattn.attention`. They count once, so they are given here and not to the parts.
    reproducible : bool
        The result depends on the parts alone, and not on how many ranks there are and which rank
        has which part: the same parts, as of keys cut at multiples of 1024, give the same bits on 1
        rank and on 7. It takes 3 times the bytes.
    timeout : float, optional
        Seconds to wait for other ranks in one step.

    Returns
    -------
    out : ndarray of shape (batch, q_heads, q_len, value_head_dim)
    lse : ndarray of shape (batch, q_heads, q_len)
        Without the sinks.

    Raises
    ------
    TypeError, ValueError, TimeoutError, ConnectionError
        As for `attention` over ranks.

    See Also
    --------
    fastattn.merge : the same, of parts that one process has.

    Notes
    -----
    Every rank gets the same bits. The number of messages grows with the logarithm of the number of
    ranks.
    """
    peers = peers_of(comm, "combine", timeout)

    def check() -> Any:
        seconds(timeout)
        outs, lses = _parts("out", out), _parts("lse", lse)
        if not outs or len(outs) != len(lses):
            raise ValueError(
                "out and lse must be equally many parts, 1 or more, got "
                f"{len(outs)} and {len(lses)}"
            )
        shape, dtype = outs[0].shape, outs[0].dtype
        if len(shape) < 2:
            raise ValueError(
                f"out must have 2 axes or more, (batch, q_heads, q_len, value_head_dim) or the "
                f"last of these, got out.shape={shape}"
            )
        for each_out, each_lse in zip(outs, lses, strict=True):
            check_like("out", each_out, shape, dtype)
            check_like("lse", each_lse, shape[:-1], arithmetic(dtype))
        logits = None
        if sinks is not None:
            heads = shape[-3] if len(shape) > 2 else 1
            logits = logits_per_head("sinks", sinks, heads)
        exactly = boolean("reproducible", reproducible)
        terms = {
            "shape of out": shape,
            "dtype of out": name_of(dtype),
            "sinks": logits,
            "reproducible": exactly,
        }
        return (outs, lses, logits, exactly), terms

    outs, lses, logits, exactly = agreed(peers, check)
    rows, columns = lses[0].size, outs[0].shape[-1]
    flat = [
        (widened(x).reshape(rows, columns), y.reshape(rows))
        for x, y in zip(outs, lses, strict=True)
    ]
    if exactly:
        states = [_exact_merge.of_part(*part) for part in flat]
        whole, of_rows = _exact_merge.result(_reduced(peers, states, _exact_merge.added))
    else:
        state = _reduced(peers, [_of_part(*part) for part in flat], _added)
        whole, of_rows = state[:, :-1], state[:, -1]
    whole, of_rows = whole.reshape(outs[0].shape), of_rows.reshape(lses[0].shape)
    if logits is not None:
        add_sinks(whole, of_rows, logits)
    found = rounded_to(outs[0].dtype, whole), of_rows.astype(lses[0].dtype)
    first = out[0] if isinstance(out, list | tuple) else out
    results: tuple[Array, Array] = library_of(first).to_caller(None, *found)
    return results


def _parts(name: str, x: Any) -> list[Array]:
    """Return the arrays of one part, or of a sequence of them."""
    parts = x if isinstance(x, list | tuple) else [x]
    for part in parts:
        if library_of(part).on_gpu:
            raise TypeError(f"{name} must be on the CPU, got an array on a GPU")
    return [floats(name, library_of(part).array(name, part)) for part in parts]


def _reduced(peers: Peers, states: list[Array], added: Callable[[Array, Array], Array]) -> Array:
    """Return what the states of all ranks add up to, the same bits on every rank.

    Ranks exchange with partners at distances of 1, 2, 4 ..; those beyond a power of two give theirs
    to one within it first. Of two sums, that of the lower ranks is the first one.
    """
    mine = states[0]
    for state in states[1:]:
        mine = added(mine, state)
    rank, size = peers.rank, peers.size
    within = 1 << (size.bit_length() - 1)
    theirs, words = np.empty_like(mine), "adding up"
    if rank >= within:
        peers.exchange(words, [(rank - within, mine)], [])
        peers.exchange(words, [], [(rank - within, theirs)])
        return theirs
    if rank + within < size:
        peers.exchange(words, [], [(rank + within, theirs)])
        mine = added(mine, theirs)
    distance = 1
    while distance < within:
        other = rank ^ distance
        peers.exchange(words, [(other, mine)], [(other, theirs)])
        mine = added(mine, theirs) if rank < other else added(theirs, mine)
        distance *= 2
    if rank + within < size:
        peers.exchange(words, [(rank + within, mine)], [])
    return mine


def _of_part(out: Array, lse: Array) -> Array:
    """Return a part in float64, lse as the last column."""
    return np.concatenate([out, lse[:, None]], axis=1, dtype=np.float64)


def _added(a: Array, b: Array) -> Array:
    """Return two parts together."""
    total, more = a.copy(), b.copy()
    add(total[:, :-1], total[:, -1], more[:, :-1], more[:, -1])
    return total
