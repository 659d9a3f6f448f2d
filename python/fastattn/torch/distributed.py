# SPDX-License-Identifier: Apache-2.0
"""Attention of PyTorch tensors over ranks, with gradients: `fastattn.distributed` in autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from torch.autograd import Function

from fastattn import distributed as over_ranks
from fastattn._arrays import check_tensor
from fastattn._options import options_of, takes
from fastattn.torch._options import TensorOptions

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from fastattn.distributed._calls import Method
    from fastattn.distributed._layout import Layout

__all__ = ["attention"]


@takes(TensorOptions)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    layout: Layout,
    kv_layout: Layout | None = None,
    documents: Tensor | ArrayLike | None = None,
    method: Method = "ring",
    timeout: float | None = None,
    return_lse: bool = False,
    **options: Unpack[TensorOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what `fastattn.distributed.attention` computes, of tensors and with their gradients.

    All ranks of the group call it, and all of them go through its backward pass if one does, in the
    same order as the other passes.

    Parameters
    ----------
    query, key, value : Tensor
        This rank's rows, on the CPU.
    group : ProcessGroup or DeviceMesh, optional
        The ranks; torch's default group unless given. A communicator of mpi4py works too.
    layout, kv_layout, documents, method, timeout
        As for `fastattn.distributed.attention`.
    mask, bias : Tensor, optional
        This rank's rows, by all keys. They must not require grad.
    sinks : Tensor, optional
        May require grad; its gradient is the part of this rank's queries.
    scale, is_causal, query_offset, window, softcap, alibi_slopes, kv_lengths, dropout_p, seed, \
key_offset, head_offset, batch_offset, return_lse
        As for `fastattn.distributed.attention`.

    Returns
    -------
    out : Tensor of shape (batch, q_heads, rows, value_head_dim)
    lse : Tensor of shape (batch, q_heads, rows), only if return_lse
        Gradients flow through it.

    Raises
    ------
    TypeError, ValueError, TimeoutError, ConnectionError
        As for `fastattn.distributed.attention`.
    """
    asked = options_of(attention, options)
    for name in ("mask", "bias", "alibi_slopes"):
        x = getattr(asked, name)
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name} must not require grad over ranks: pass {name}.detach()"
            )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        check_tensor(torch, name, x)
    how: dict[str, Any] = asked._asdict()
    sinks = how.pop("sinks")
    how |= {
        "comm": torch.distributed.group.WORLD if group is None else group,
        "layout": layout,
        "kv_layout": kv_layout,
        "documents": documents,
        "method": method,
        "timeout": timeout,
    }
    out, lse = _Attention.apply(query, key, value, sinks, how, return_lse)
    return (out, lse) if return_lse else out


class _Attention(Function):
    """Attention over ranks that remembers what its gradients need."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Any, how: Any, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = over_ranks.attention(
            query,
            key,
            value,
            sinks=sinks,
            return_lse=True,
            **how,
        )
        is_tensor = isinstance(sinks, Tensor)
        ctx.save_for_backward(query, key, value, out, lse, sinks if is_tensor else None)
        ctx.sinks, ctx.how, ctx.return_lse = None if is_tensor else sinks, how, return_lse
        ctx.set_materialize_grads(False)
        return out, lse if return_lse else None

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, out, lse, sinks = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if ctx.return_lse and grad_lse is None:
            grad_lse = torch.zeros_like(lse)  # on other ranks it may be something
        wants_dsinks = ctx.needs_input_grad[3]
        dq, dk, dv, *dsinks = over_ranks.attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            grad_lse=grad_lse,
            sinks=ctx.sinks if sinks is None else sinks,
            return_dsinks=wants_dsinks,
            **ctx.how,
        )
        return dq, dk, dv, dsinks[0] if wants_dsinks else None, None, None
