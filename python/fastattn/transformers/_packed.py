# SPDX-License-Identifier: Apache-2.0
"""Sequences packed behind each other in a row, each of which sees itself alone.

Where they start say cu_seq_lens_q and cu_seq_lens_k, which a model hands on to its layers, or
position_ids that restart, of which transformers makes a mask (`_mask.py`); if both do, both count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import fastattn.torch
from fastattn import _arguments

if TYPE_CHECKING:
    from torch import Tensor

    Starts = tuple[Tensor, Tensor]  # of each sequence's queries, and of its keys

# What says the same of a sequence as of the row, if its queries stand at its keys.
RELATIVE = {"is_causal", "window", "query_offset"}


def are_told(others: dict[str, Any]) -> bool:
    """Tell whether a layer was told where sequences start."""
    return others.get("cu_seq_lens_q") is not None or others.get("cu_seq_lens_k") is not None


@torch.compiler.disable(reason="where packed sequences start is checked, which needs its numbers")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: dict[str, Any],
    options: dict[str, Any],
    others: dict[str, Any],
    as_mask: bool,
    chunk_size: int | None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return out, of shape (batch, q_len, q_heads, value_head_dim), and what each query saw.

    seen : dict
        What a query of the row sees; `starts` too, if position_ids restart.
    options, others : dict
        The other options of the call, and what else the layer was given.
    as_mask : bool
        What each query saw is wanted in the words of `fastattn.attention`.
    chunk_size : int, optional
        The size of the chunks in the mask that `seen` has.
    """
    seen = dict(seen)
    restarts = seen.pop("starts", None)
    parts = [] if restarts is None else [(restarts, restarts)]
    told = _told(query, key, others, seen) if are_told(others) else None
    if told is not None:
        parts.append(told)
        if chunk_size is not None:
            _check_chunks(seen["mask"], told, chunk_size)
    if not parts:
        return fastattn.torch.attention(query, key, value, **seen, **options).transpose(1, 2), seen
    first, (queries, keys) = parts[0], parts[-1]
    by_starts = (
        seen.keys() <= RELATIVE
        and not seen.get("query_offset")
        and options["bias"] is None
        and torch.equal(first[0], queries)
        and torch.equal(first[1], keys)
        and int(queries[-1]) == len(query) * query.shape[2]
    )
    if as_mask or not by_starts:
        for part in parts:
            seen["mask"] = _hidden(seen.get("mask"), shared(part, query.shape[2], key.shape[2]))
        return fastattn.torch.attention(query, key, value, **seen, **options).transpose(1, 2), seen
    query_rows, key_rows, value_rows = (
        x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)
    )
    out = fastattn.torch.varlen_attention(
        query_rows, key_rows, value_rows, queries, keys, **seen, **options
    )
    return out.unflatten(0, (len(query), query.shape[2])), seen


def _told(
    query: Tensor, key: Tensor, others: dict[str, Any], seen: dict[str, Any]
) -> Starts | None:
    """Return where a layer was told that sequences start; None if there is one, or no pair.

    Either of cu_seq_lens_q and cu_seq_lens_k serves for both.
    """
    sides = [x for x in "qk" if others.get(f"cu_seq_lens_{x}") is not None]
    found = []
    for side, tokens, what in (
        (sides[0], query, "queries"),
        (sides[-1], key, "keys, a cache's included"),
    ):
        name, length = f"cu_seq_lens_{side}", tokens.shape[2]
        if len(tokens) != 1:
            raise ValueError(f"{name} must tell of one row of tokens, got a batch of {len(tokens)}")
        starts = _arguments.starts(name, others[name], length)
        if starts[0] != 0 or starts[-1] != length:
            raise ValueError(
                f"{name} must begin with 0 and end with {length}, the number of {what}, got "
                f"{starts[0]}..{starts[-1]}"
            )
        longest, most = np.diff(starts).max(initial=0), others.get(f"max_length_{side}")
        if most is not None:
            if isinstance(most, (torch.Tensor, np.ndarray)) and most.shape in ((), (1,)):
                most = most.item()
            if longest > (most := _arguments.whole_number(f"max_length_{side}", most)):
                raise ValueError(
                    f"max_length_{side} must be {longest}, the longest of {name}, or more, got "
                    f"{most}"
                )
        found.append(starts)
    queries, keys = found
    if len(queries) != len(keys):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be equally long, got "
            f"{len(queries)} and {len(keys)} entries"
        )
    if len(queries) <= 2 or queries[-1] == 0 or keys[-1] == 0:
        return None
    unlike = np.flatnonzero(queries != keys)
    if len(unlike) and seen.keys() & {"is_causal", "window"}:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be equal in a causal layer and in one with a "
            f"window, got {queries[unlike[0]]} and {keys[unlike[0]]} at {unlike[0]}"
        )
    return torch.from_numpy(queries), torch.from_numpy(keys)


def _check_chunks(mask: Tensor, starts: Starts, size: int) -> None:
    """Refuse a mask whose chunks do not start anew in each sequence: its numbers tell."""
    queries, keys = starts
    if torch.equal(queries, keys) and mask.shape[-2:] == (queries[-1], keys[-1]):
        position = torch.arange(int(queries[-1]))
        position -= torch.repeat_interleave(queries[:-1], queries.diff())
        chunk = position // size
        pairs = shared(starts, len(position), len(position))
        right = (pairs & (chunk[:, None] == chunk)).tril()
        found = (mask if mask.dtype == torch.bool else mask == 0) & pairs
        if torch.equal(found, right.expand_as(found)):
            return
    raise NotImplementedError(
        "attn_implementation='fastattn' cannot chunk packed sequences told by cu_seq_lens_q: "
        "pass position_ids that restart, use_cache=False, and no attention_mask"
    )


def restarts_of(sequence: Tensor) -> Tensor:
    """Return where sequences start in rows behind each other; each row starts one.

    sequence : Tensor of int, shape (batch, length)
        Tokens of one sequence have one number, and are neighbours.
    """
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
    return torch.nn.functional.pad(first.flatten().nonzero()[:, 0], (0, 1), value=first.numel())


def shared(starts: Starts, q_len: int, kv_len: int) -> Tensor:
    """Return the mask of shape (batch, 1, q_len, kv_len) of the pairs that share a sequence."""
    queries, keys = (  # the number of each token's sequence
        torch.repeat_interleave(x.diff()).unflatten(0, (-1, length))
        for x, length in zip(starts, (q_len, kv_len), strict=True)
    )
    return queries[:, None, :, None] == keys[:, None, None, :]


def _hidden(mask: Tensor | None, seen: Tensor) -> Tensor:
    """Return a mask that hides what `seen` does not have."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
