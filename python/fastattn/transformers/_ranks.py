# SPDX-License-Identifier: Apache-2.0
"""The attention of one layer under `fastattn.torch.context_parallel`, over the keys of all ranks.

A rank has some rows of the sequence, and transformers takes them for all there are: the mask that
it asks for, padding, and packed sequences that it finds in position_ids are those of these rows.
What a layer's queries see is therefore either said in words that hold for the whole sequence, or
refused, by all ranks together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastattn import _arguments
from fastattn.distributed._agree import agreed
from fastattn.transformers._mask import Pattern

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from fastattn.torch._context_parallel import OverRanks


def attention(
    ranks: OverRanks,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
    dropout_p: float,
    others: dict[str, Any],
    weighed: bool,
) -> Tensor:
    """Return out, of shape (batch, rows, q_heads, value_head_dim).

    is_causal : bool
        What counts if there is no mask.
    options, others : dict
        The other options of the call, and what else the layer was given.
    weighed : bool
        The probabilities are wanted.
    """

    def check() -> tuple[dict[str, Any], dict[str, Any]]:
        if weighed:
            raise _missing("output_attentions")
        layout = ranks.layout("query", query)
        total = ranks.layout("key", key).total
        seen = _seen(attention_mask, is_causal, total)
        documents = _documents(others, layout.total)
        if documents is not None:
            seen |= {"documents": documents, "query_offset": None}
        positions = layout.positions(ranks.rank)
        offsets = _offsets(module, others.get("position_ids"), positions, documents)
        return seen, {"the position of the first token, by position_ids": offsets}

    seen = agreed(ranks.peers("attn_implementation='fastattn'"), check)
    out = ranks.attention(query, key, value, dropout_p=dropout_p, **seen, **options)
    return out.transpose(1, 2)


def _missing(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_implementation='fastattn' has no {what} under fastattn.torch.context_parallel"
    )


def _seen(attention_mask: Tensor | None, is_causal: bool, total: int) -> dict[str, Any]:
    """Return the keywords that say which of all keys this rank's queries see."""
    if attention_mask is None:
        return {"is_causal": True, "query_offset": 0} if is_causal else {}
    if type(attention_mask) is Pattern and not attention_mask.is_made:
        if attention_mask.refusal is not None:
            raise _missing(attention_mask.refusal)
        return attention_mask.seen()
    if attention_mask.shape[-1] != total:
        raise ValueError(
            "attention_mask must have a column for each key of all ranks under "
            f"fastattn.torch.context_parallel, {total}, got attention_mask.shape="
            f"{tuple(attention_mask.shape)}"
        )
    whole = attention_mask.whole() if type(attention_mask) is Pattern else attention_mask
    return {"mask": whole}


def _documents(others: dict[str, Any], total: int) -> NDArray[Any] | None:
    """Return where packed sequences start, among the rows of all ranks; None if it is not told."""
    names = [f"cu_seq_lens_{x}" for x in "qk" if others.get(f"cu_seq_lens_{x}") is not None]
    if not names:
        return None
    found: list[NDArray[Any]] = [_arguments.starts(x, others[x], total) for x in names]
    for name, starts in zip(names, found, strict=True):
        if starts[0] != 0 or starts[-1] != total:
            raise ValueError(
                f"{name} must begin with 0 and end with {total}, the number of tokens of all ranks "
                f"under fastattn.torch.context_parallel, got {starts[0]}..{starts[-1]}"
            )
    if not np.array_equal(found[0], found[-1]):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be equal under fastattn.torch.context_parallel"
        )
    return found[0]


def _offsets(
    module: torch.nn.Module,
    position_ids: Tensor | None,
    positions: NDArray[Any],
    documents: NDArray[Any] | None,
) -> NDArray[Any]:
    """Return how far position_ids are from the positions of this rank's rows, in each row of them.

    Refuse those that differ in another way: they are of other rows, as those that a model counts
    itself, or of packed sequences that only they tell apart.
    """
    if not isinstance(position_ids, torch.Tensor):
        raise NotImplementedError(
            f"{type(module).__name__} must be told position_ids under "
            "fastattn.torch.context_parallel with attn_implementation='fastattn': it is not known "
            "which positions the model takes"
        )
    expected = [positions]
    if documents is not None:  # both are usual: within each sequence, and within the row
        numbers = np.searchsorted(documents, positions, side="right") - 1
        expected.append(positions - documents[numbers])
    if position_ids.shape[-1:] == positions.shape:
        for each in expected:
            offsets: NDArray[Any] = position_ids.detach().numpy() - each
            if (offsets == offsets[..., :1]).all():
                return offsets[..., 0]
    raise ValueError(
        "position_ids must be those of this rank's rows under fastattn.torch.context_parallel: "
        "give position_ids of the whole sequence, and have them in buffers; where packed sequences "
        "start must be told by cu_seq_lens_q, which are of the whole and in no buffer"
    )
