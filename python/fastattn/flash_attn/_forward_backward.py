# SPDX-License-Identifier: Apache-2.0
"""flash_attn.flash_attn_interface beside its public functions: forward and backward on their own.

Programs that share a sequence among processes (ring attention) call these: they merge what each
part of the keys gives, by its softmax_lse, and ask for gradients with the whole's out and
softmax_lse. None of them has gradients of its own. They have no decorators: programs read their
arguments by inspect.getfullargspec.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

import fastattn
from fastattn._arrays import pool_of_caller
from fastattn.flash_attn._arguments import check_axes, kernel_options
from fastattn.flash_attn._calls import dense, packed, packed_arguments
from fastattn.flash_attn._functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,  # noqa: F401 (_install.py looks for all names here)
)
from fastattn.torch._tensors import (
    array_of,
    drawn_dropout,
    lse_dtype,
    small_array_of,
    tensor_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Results:
    """Return out, softmax_lse, S_dmask and rng_state of `flash_attn_func`.

    S_dmask is empty; rng_state, int64 of shape (2,), begins with the seed of the dropout.
    """
    sides = (window_size_left, window_size_right)
    options = kernel_options(softmax_scale, causal, sides, softcap, alibi_slopes)
    options |= drawn_dropout(dropout_p)
    with torch.no_grad():
        return _with_state(*dense(q, k, v, options), options["seed"])


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> Results:
    """Return out, softmax_lse, S_dmask and rng_state of `flash_attn_varlen_func`.

    leftpad_k and seqused_k, int of shape (batch,), say which keys of a sequence there are: those
    from leftpad_k on, before seqused_k. They are copied.
    """
    sides = (window_size_left, window_size_right)
    options = kernel_options(softmax_scale, causal, sides, softcap, alibi_slopes)
    options |= drawn_dropout(dropout_p)
    with torch.no_grad():
        k, v, q_starts, kv_starts = packed_arguments(
            q, k, v, cu_seqlens_q, cu_seqlens_k, block_table
        )
        if leftpad_k is not None or seqused_k is not None:
            k, v, kv_starts = _used_alone(k, v, kv_starts, leftpad_k, seqused_k)
        result = packed(q, k, v, q_starts, kv_starts, options)
    return _with_state(*result, options["seed"])


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Write the gradients of `flash_attn_func` to dq, dk and dv.

    out and softmax_lse may be those of more keys than k and v: the gradients are then the parts
    that k and v contribute. rng_state is the forward's, and needed with dropout_p.

    Returns
    -------
    softmax_d : tensor of shape (batch, heads, q_len)
        The sums over head_dim of dout * out.
    """
    check_axes(4, "(batch, length, heads, head_dim)", dout=dout, q=q, k=k, v=v, out=out)
    options = kernel_options(
        softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes
    )
    options["query_offset"] = k.shape[1] - q.shape[1]
    arrays = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
    heads_first = {name: x.transpose(1, 2) for name, x in arrays.items()}
    grads = _gradients(heads_first, softmax_lse, options, dropout_p, rng_state)
    _write({"dq": dq, "dk": dk, "dv": dv}, [x.transpose(1, 2) for x in grads])
    return _sums(dout, out).transpose(1, 2)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Do what `_flash_attn_backward` does, for `flash_attn_varlen_func`.

    Returns
    -------
    softmax_d : tensor of shape (heads, total_q)
    """
    check_axes(3, "(total, heads, head_dim)", dout=dout, q=q, out=out)
    k, v, q_starts, kv_starts = packed_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, None)
    options = kernel_options(
        softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes
    )
    options["query_offset"] = kv_starts.diff() - q_starts.diff()
    options |= {"cu_seqlens_q": q_starts, "cu_seqlens_kv": kv_starts}
    arrays = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
    grads = _gradients(arrays, softmax_lse, options, dropout_p, rng_state)
    _write({"dq": dq, "dk": dk, "dv": dv}, grads)
    return _sums(dout, out).transpose(0, 1)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _function(name: str, function: Callable[..., Any]) -> Any:
    """Return a class whose ``apply`` calls the function, as torch's autograd functions have it.

    After the function's arguments comes whether gradients are wanted.
    """
    count = len(inspect.signature(function).parameters)

    def apply(*arguments: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and all(arguments[count:])):
            return function(*arguments[:count])

    about = f"`{function.__name__}`, for programs that call its ``apply``."
    return type(name, (), {"apply": staticmethod(apply), "__doc__": about, "__module__": __name__})


FlashAttnFunc = _function("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = _function("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = _function("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = _function("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = _function(
    "FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func
)
FlashAttnVarlenQKVPackedFunc = _function(
    "FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func
)


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """Return x with its last axis contiguous."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def round_multiple(x: int, m: int) -> int:
    """Return the least multiple of m that is at least x."""
    return -(-x // m) * m


def _with_state(out: Tensor, lse: Tensor, seed: Any) -> Results:
    state = torch.tensor([0 if seed is None else seed, 0], dtype=torch.int64, device="cpu")
    return out, lse, out.new_empty(0), state


def _used_alone(
    k: Tensor, v: Tensor, starts: Tensor, leftpad: Tensor | None, used: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys and values from leftpad on and before used of each sequence, packed."""
    lengths = starts.diff()
    first = torch.zeros_like(lengths) if leftpad is None else leftpad.long()
    last = lengths if used is None else used.long()
    if first.shape != lengths.shape or last.shape != lengths.shape:
        raise ValueError(
            f"leftpad_k and seqused_k must have shape {tuple(lengths.shape)}, got "
            f"{tuple(first.shape)} and {tuple(last.shape)}"
        )
    if bool(((first < 0) | (last < first) | (last > lengths)).any()):
        raise ValueError(
            "leftpad_k and seqused_k must be within each sequence of cu_seqlens_k, got "
            f"leftpad_k={first.tolist()}, seqused_k={last.tolist()}, lengths={lengths.tolist()}"
        )
    counts = last - first
    ends = counts.cumsum(0)
    shift = (starts[:-1] + first - ends + counts).repeat_interleave(counts)
    rows = torch.arange(len(shift), device="cpu") + shift
    return k[rows], v[rows], torch.cat((ends.new_zeros(1), ends))


def _gradients(
    arrays: dict[str, Tensor],
    softmax_lse: Tensor,
    options: dict[str, Any],
    dropout_p: float,
    rng_state: Tensor | None,
) -> list[Tensor]:
    """Return the gradients by query, key and value."""
    if dropout_p > 0 and rng_state is None:
        raise ValueError("rng_state must be given with dropout_p: that of the forward")
    arrays = arrays | {"softmax_lse": softmax_lse}
    options = {name: small_array_of(name, x) for name, x in options.items()}
    seed = int(rng_state[0]) if dropout_p > 0 and rng_state is not None else None
    with pool_of_caller:
        grads = fastattn.attention_backward(
            *(array_of(name, x) for name, x in arrays.items()),
            **options,
            dropout_p=dropout_p,
            seed=seed,
        )
    return [tensor_of(x) for x in grads]


def _write(wanted: dict[str, Tensor | None], grads: list[Tensor]) -> None:
    """Write gradients to where they are wanted, once all places are known to be right."""
    for (name, place), grad in zip(wanted.items(), grads, strict=True):
        if place is not None and place.shape != grad.shape:
            raise ValueError(
                f"{name} must have shape {tuple(grad.shape)}, got {tuple(place.shape)}"
            )
    with torch.no_grad():
        for place, grad in zip(wanted.values(), grads, strict=True):
            if place is not None:
                place.copy_(grad)


def _sums(dout: Tensor, out: Tensor) -> Tensor:
    """Return the sums over the last axis of dout * out, in the dtype of lse."""
    wide = lse_dtype(out.dtype)
    with torch.no_grad():
        sums: Tensor = (dout.to(wide) * out.to(wide)).sum(-1)
    return sums
