# SPDX-License-Identifier: Apache-2.0
"""The errors of fastattn.torch."""
# ruff: noqa: E501 - the tables have a line per case

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
import fastattn.torch as ft
from tests.torch.problems import operands, rand

# Errors.


PLAIN = rand(2, 3, 5, 4, dtype=torch.float32)
ERRORS = [
    (lambda x: (x.to("meta"), x, x), {}, "query must hold numbers, got a tensor on the device meta"),
    (lambda x: (x, x.to_sparse(), x), {}, "key must be a dense tensor, got one of layout torch.sparse_coo"),
    (lambda x: (x, x, x.double()), {}, "value must have the dtype of query, float32, not float64"),
    (lambda x: (x.bfloat16(), x, x), {}, "key must have the dtype of query, bfloat16, not float32"),
    (lambda x: (x.int(), x.int(), x.int()), {}, "query must be an array of float16, .* not int32"),
    (lambda x: (x.numpy(), x, x), {}, "query must be a tensor, not ndarray"),
    (lambda x: (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), x, x), {}, "query must not be quantised, got a tensor of torch.qint8"),
    (lambda x: (*[torch.nested.nested_tensor([x[0], x[1]])] * 3,), {}, "query must be a dense tensor, not a nested one"),
    (lambda x: (x.to(torch.float8_e4m3fn), x, x), {}, "query must be a tensor that NumPy can read, got torch.float8"),
    (lambda x: (x, x[..., :3], x), {}, "key has head_dim 3 but query has head_dim 4"),
    (lambda x: (x, x[:, :2], x), {}, "must have equally many heads unless enable_gqa=True"),
    (lambda x: (x, x, x), {"attn_mask": torch.ones(5, 5, dtype=torch.bool, device="meta")}, "attn_mask must hold numbers, got a tensor on the device meta"),
    (lambda x: (x, x, x), {"attn_mask": torch.ones(5, 4, dtype=torch.bool)}, r"attn_mask must broadcast to .* got attn_mask.shape=\(5, 4\)"),
    (lambda x: (x, x, x), {"attn_mask": torch.ones(5, 5, dtype=torch.int32)}, "attn_mask must be an array of bool, .* not int32"),
    (lambda x: (x, x, x), {"attn_mask": torch.ones(5, 5), "is_causal": True}, "attn_mask must not be given together with is_causal=True"),
    (lambda x: (x, x, x), {"dropout_p": 1.5}, r"dropout_p must be within 0..1"),
    (lambda x: (x, x, x), {"scale": float("nan")}, "scale must be finite, got scale=nan"),
]  # fmt: skip


@pytest.mark.promise("error-says-which-rule-and-what")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tensors", "options", "message"), ERRORS)
@pytest.mark.parametrize("grad", [False, True])
def test_errors(tensors, options, message, grad):
    given = tensors(PLAIN)
    if grad and given[0] is PLAIN:
        given = (PLAIN.clone().requires_grad_(), *given[1:])
    with pytest.raises((TypeError, ValueError), match=message):
        ft.scaled_dot_product_attention(*given, **options)


def test_errors_of_attention():
    q, k, v = operands()
    with pytest.raises(ValueError, match="out must not be given where an argument requires grad"):
        ft.attention(q.clone().requires_grad_(), k, v, out=torch.empty_like(q))
    with pytest.raises(ValueError, match="out must not be given where an argument requires grad"):
        ft.attention(q, k, v, out=torch.empty_like(q, requires_grad=True))
    with pytest.raises(TypeError, match="out must be a tensor, not ndarray"):
        ft.attention(q, k, v, out=np.empty(q.shape, np.float64))
    with pytest.raises(ValueError, match=r"out must have the shape of the result, .*\(3,\)"):
        ft.attention(q, k, v, out=torch.empty(3, dtype=q.dtype))
    with pytest.raises(TypeError, match="out must have the dtype of the result, "):
        ft.attention(q, k, v, out=torch.empty_like(q, dtype=torch.int32))
    with pytest.raises(ValueError, match="out must not overlap an input"):
        ft.attention(q, k, v, out=q)
    with pytest.raises(ValueError, match="out must be written as it is"):
        ft.attention(q, k, v, out=torch._neg_view(torch.empty_like(q)))
    with (
        FlopCounterMode(display=False),
        pytest.raises(ValueError, match="out must be a tensor of the result's"),
    ):
        ft.attention(q, k, v, out=torch.empty(3))
    with pytest.raises(ValueError, match="alibi_slopes must not require grad"):
        ft.attention(q, k, v, alibi_slopes=rand(4, grad=True), query_offset=0)
    with pytest.raises(TypeError, match="mask must be a tensor, not list"):
        ft.attention(q, k, v, mask=[[True]])
    with pytest.raises(TypeError, match="kv_lengths must hold numbers"):
        ft.attention(q, k, v, kv_lengths=torch.tensor([1, 2], device="meta"))


@pytest.mark.promise("nothing-is-detached-silently")
def test_a_tensor_that_requires_grad_is_not_silently_detached():
    x = PLAIN.clone().requires_grad_()
    with pytest.raises(TypeError, match=r"query requires grad"):
        fastattn.attention(x, PLAIN, PLAIN)
