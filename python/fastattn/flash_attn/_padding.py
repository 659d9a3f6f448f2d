# SPDX-License-Identifier: Apache-2.0
"""flash_attn.bert_padding: batches without their padding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from fastattn.flash_attn._lacking import lacking

if TYPE_CHECKING:
    from torch import Tensor

try:  # programs import the two from here
    _einops: Any = importlib.import_module("einops")
    rearrange, repeat = _einops.rearrange, _einops.repeat
except ImportError:
    rearrange, repeat = (
        lacking("flash_attn.bert_padding", name, "it is einops's own: pip install einops")
        for name in ("rearrange", "repeat")
    )


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of input that indices name."""
    rows: Tensor = input[indices]
    return rows


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return a tensor of first_axis_dim rows: values where indices name them, else 0."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of input that indices name, and input."""
    return index_first_axis(input, indices), input


class IndexFirstAxis:
    """`index_first_axis`, for programs that call its ``apply``."""

    apply = staticmethod(index_first_axis)


class IndexPutFirstAxis:
    """`index_put_first_axis`, for programs that call its ``apply``."""

    apply = staticmethod(index_put_first_axis)


class IndexFirstAxisResidual:
    """`index_first_axis_residual`, for programs that call its ``apply``."""

    apply = staticmethod(index_first_axis_residual)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch.

    Parameters
    ----------
    hidden_states : tensor of shape (batch, length, ...)
    attention_mask : tensor of bool or int, shape (batch, length)
        What is a token.
    unused_mask : tensor of bool or int, shape (batch, length), optional
        What else keeps its place.

    Returns
    -------
    tokens : tensor of shape (total, ...)
    indices : tensor of int, shape (total,)
        Where they were, in the flattened batch.
    cu_seqlens : tensor of int32, shape (batch + 1,)
    max_seqlen : int
    seqused : tensor of int32, shape (batch,)
        Tokens of each sequence, without those of unused_mask.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, *_starts_and_longest(lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack the tokens of a padded batch whose rows hold several sequences each.

    Parameters
    ----------
    hidden_states : tensor of shape (batch, length, ...)
    attention_mask_in_length : tensor of int, shape (batch, length)
        The lengths of a row's sequences, one after the other; 0 is none. ``[2, 3, 0, 0, 0, 0]`` is
        a sequence of two tokens, one of three, and one token of padding.

    Returns
    -------
    tokens : tensor of shape (total, ...)
    indices : tensor of int, shape (total,)
        Where they were, in the flattened batch.
    cu_seqlens : tensor of int32, shape (sequences + 1,)
    max_seqlen : int
    """
    used, length = attention_mask_in_length.sum(dim=-1, keepdim=True), hidden_states.shape[1]
    places = torch.arange(length, device=used.device)
    indices = (places < used).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, *_starts_and_longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Return the batch of shape (batch, seqlen, ...) that `unpad_input` packed; else 0."""
    whole = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return whole.reshape(batch, seqlen, *whole.shape[1:])


def _starts_and_longest(lengths: Tensor) -> tuple[Tensor, int]:
    starts = lengths.new_zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    return starts, int(lengths.max()) if len(lengths) else 0
