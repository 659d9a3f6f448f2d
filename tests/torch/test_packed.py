# SPDX-License-Identifier: Apache-2.0
"""Packed sequences of tensors are attended alone."""

import numpy as np
import pytest
import torch

import fastattn
import fastattn.torch as ft
from tests.torch.problems import DTYPES, STARTS, packed, rand


@pytest.mark.promise("torch-has-every-argument")
def test_every_argument_of_packed_sequences():
    tensors = packed()
    offsets, lengths = torch.tensor([5, 3, -4, -4]), torch.tensor([9, 1, 0, 1])
    options = {
        "mask": rand(4, 1, 9) > -1,
        "bias": rand(20, 9),
        "scale": 0.3,
        "is_causal": True,
        "query_offset": offsets,
        "window": (5, None),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(4, 4),
        "sinks": rand(4),
        "kv_lengths": lengths,
        "dropout_p": 0.2,
    }
    arrays = {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    expected = fastattn.varlen_attention(
        *(x.numpy() for x in (*tensors, *STARTS)), return_lse=True, seed=3, **arrays
    )
    for starts in (STARTS, [x.tolist() for x in STARTS], [x.int().numpy() for x in STARTS]):
        out, lse = ft.varlen_attention(*tensors, *starts, return_lse=True, seed=3, **options)
        np.testing.assert_array_equal(out.numpy(), expected[0])
        np.testing.assert_array_equal(lse.numpy(), expected[1])
    out = torch.empty(20, 4, 8, dtype=torch.float64)
    assert ft.varlen_attention(*tensors, *STARTS, out=out, seed=3, **options) is out
    np.testing.assert_array_equal(out.numpy(), expected[0])


@pytest.mark.promise("packed-gradients-are-alone", "rows-of-no-sequence-are-zero")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_are_attended_alone(dtype):
    """Forward and backward, to the bit; rows of no sequence give 0."""
    leaves = packed(dtype=dtype, grad=True)
    q_starts, kv_starts = torch.tensor([1, 5, 16]), torch.tensor([2, 11, 19])
    out = ft.varlen_attention(*leaves, q_starts, kv_starts, softcap=3.0)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    alone = [torch.zeros_like(x) for x in (out, *leaves)]
    for rows, keys in ((slice(1, 5), slice(2, 11)), (slice(5, 16), slice(11, 19))):
        own = [leaves[0][rows], *(x[keys] for x in leaves[1:])]
        own = [x.detach().transpose(0, 1).requires_grad_() for x in own]
        result = ft.attention(*own, softcap=3.0)
        own_grads = torch.autograd.grad(result, own, torch.ones_like(result))
        where = (rows, rows, keys, keys)
        for x, i, part in zip(alone, where, (result, *own_grads), strict=True):
            x[i] = part.detach().transpose(0, 1)
    assert all(map(torch.equal, (out, *grads), alone))


@pytest.mark.promise("torch-gradients")
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "query_offset": torch.tensor([5, 3, -4, -4])},
        {"kv_lengths": torch.tensor([7, 2, 7, 0]), "softcap": 1.5},
        {"dropout_p": 0.3, "seed": 7},
    ],
)
def test_gradcheck_of_packed_sequences(options):
    leaves = [*packed(grad=True), rand(4, 1, 9, grad=True), rand(4, grad=True, seed=9)]

    def both(query, key, value, bias, sinks):
        out, lse = ft.varlen_attention(
            query, key, value, *STARTS, bias=bias, sinks=sinks, return_lse=True, **options
        )
        return out, lse.clamp(min=-99)

    assert torch.autograd.gradcheck(both, leaves)


def test_errors_of_packed_sequences():
    query, key, value = packed()
    q_starts, kv_starts = STARTS
    for wrong, message in (
        ((query[0], key, value, *STARTS), r"query must have 3 axes, .* got query.shape=\(4, 8\)"),
        ((query, key, value, q_starts, None), "cu_seqlens_kv must be .* not None"),
        ((query, key, value, q_starts.double(), kv_starts), "cu_seqlens_q must be .* not float64"),
        ((query, key, value, q_starts, kv_starts + 1), "cu_seqlens_kv must "),
        ((query, key, value, q_starts[1:], kv_starts), "must be equally long, got 4 and 5 entries"),
        ((query.numpy(), key, value, *STARTS), "query must be a tensor, not ndarray"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ft.varlen_attention(*wrong)
    with pytest.raises(ValueError, match="query_offset must be given"):
        ft.varlen_attention(query, key, value, *STARTS, is_causal=True)
    with pytest.raises(ValueError, match="out must not be given where an argument requires grad"):
        ft.varlen_attention(
            query, key.requires_grad_(), value, *STARTS, out=torch.empty_like(query)
        )
