# SPDX-License-Identifier: Apache-2.0
"""The kernel, called with tensors: where every way of `_attention.py` ends.

The team of threads runs in the calling thread's own pool, which torch's operators use too: a second
one would make them slow (cpp/parallel.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastattn
from fastattn import _core
from fastattn._arguments import finite_number, packed_sizes, sizes
from fastattn.torch._tensors import array_of, small_array_of, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable

# (mask, bias, sinks, alibi_slopes, query_offset, kv_lengths, seed, cu_seqlens_q, cu_seqlens_kv,
#  scale, is_causal, has_window, left, right, softcap, dropout_p); the first 9 may be tensors.
# The sequences are packed iff there are cu_seqlens.
Options = tuple[Any, ...]
MAY_BE_TENSORS = 9
STARTS = slice(7, 9)
STARTS_NAMES = ("cu_seqlens_q", "cu_seqlens_kv")
SMALL_NAMES = ("query_offset", "alibi_slopes", "sinks", "kv_lengths")
calls: Any = fastattn  # with arguments in a dict
SEEDS = 2**64


class _PoolOfCaller:
    """Calls inside a with statement run in the calling thread's pool."""

    def __enter__(self) -> None:
        _core.use_pool_of_caller(True)

    def __exit__(self, *error: object) -> None:
        _core.use_pool_of_caller(False)


pool_of_caller = _PoolOfCaller()


def plain_options(scale: float | None, is_causal: bool) -> Options:
    """Return the options of a call that has no others."""
    return (*(None,) * MAY_BE_TENSORS, scale, is_causal, False, None, None, None, 0.0)


def split(options: Options) -> tuple[list[Tensor | None], Options]:
    """Return the tensors among the options, if there are any, and the rest; None for the others."""
    tensors = [x if isinstance(x, Tensor) else None for x in options[:MAY_BE_TENSORS]]
    if not any(x is not None for x in tensors):
        return [], options
    return tensors, tuple(None if isinstance(x, Tensor) else x for x in options)


def joined(tensors: list[Tensor | None], others: Options) -> Options:
    """Return the options that `split` has split."""
    if not tensors:
        return others
    first = (x if x is not None else y for x, y in zip(tensors, others, strict=False))
    return (*first, *others[MAY_BE_TENSORS:])


def is_packed(options: Options) -> bool:
    """Tell whether the call is one of `varlen_attention`."""
    return any(x is not None for x in options[STARTS])


def result_like(query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor for the result: laid out like query, as torch's own function does."""
    return torch.empty_like(query) if query.shape == shape else query.new_empty(shape)


def forward(
    query: Tensor, key: Tensor, value: Tensor, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return out, and lse if asked for."""
    if query.is_cuda:
        from fastattn.torch import _gpu

        return _gpu.forward(query, key, value, options, return_lse)
    if _is_plain(options, query, key):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = query.new_empty(query.shape[:-1], dtype=wide) if return_lse else None
        scale, is_causal = options[MAY_BE_TENSORS : MAY_BE_TENSORS + 2]
        result = plain(query, key, value, lse, scale, is_causal, True)
        if result is not None:
            return result, lse
    arrays = [array_of(*x) for x in (("query", query), ("key", key), ("value", value))]
    named = keywords(options, array_of, small_array_of)
    call = calls.attention
    if is_packed(options):
        call = calls.varlen_attention
        known, *starts = packed_sizes(*arrays, *(named[name] for name in STARTS_NAMES))
        named.update(zip(STARTS_NAMES, starts, strict=True))
    else:
        known = sizes(*(x.shape for x in arrays))
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = result_like(query, known.out_shape)
    with pool_of_caller:
        results = call(
            *arrays,
            **named,
            return_lse=return_lse,
            out=array_of("out", out) if out.numel() else None,
        )
    return out, tensor_of(results[1]) if return_lse else None


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor | None,
    scale: float | None,
    is_causal: bool,
    grouped: bool,
) -> Tensor | None:
    """Return out, and fill lse, without a NumPy view of each tensor; None where that cannot be.

    grouped: a key head may serve many query heads. The first query stands at the first key.
    """
    if scale is not None:
        scale = finite_number("scale", scale)
    if query.is_neg() or key.is_neg() or value.is_neg():  # the memory has the other sign
        return None
    out = torch.empty_like(query)
    done = _core.attend_plain(query, key, value, out, lse, scale, is_causal, grouped)
    return out if done else None


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    options: Options,
    wants_dbias: bool,
    wants_dsinks: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by query, key, value, bias and sinks; None for what is not wanted."""
    if query.is_cuda:
        from fastattn.torch import _gpu

        saved = (grad_out, query, key, value, out, lse, grad_lse)
        return _gpu.backward(*saved, options, wants_dbias, wants_dsinks)
    if grad_lse is None and _is_plain(options, query, key):
        scale, is_causal = options[MAY_BE_TENSORS : MAY_BE_TENSORS + 2]
        grads = plain_backward(grad_out, query, key, value, out, lse, scale, is_causal)
        if grads is not None:
            return *grads, None, None
    named = {"grad_out": grad_out, "query": query, "key": key, "value": value, "out": out}
    with pool_of_caller:
        dq, dk, dv, *rest = map(
            tensor_of,
            calls.attention_backward(
                *(array_of(name, x) for name, x in named.items()),
                array_of("lse", lse),
                grad_lse=None if grad_lse is None else array_of("grad_lse", grad_lse),
                return_dbias=wants_dbias,
                return_dsinks=wants_dsinks,
                **keywords(options, array_of, small_array_of),
            ),
        )
    dsinks = rest.pop().to(options[2].dtype) if wants_dsinks else None
    return dq, dk, dv, rest.pop() if wants_dbias else None, dsinks


def plain_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients by query, key and value of what `plain` computes; None likewise."""
    if grad_out.is_neg() or query.is_neg() or key.is_neg() or value.is_neg():
        return None
    if grad_out.stride(-1) != 1:  # of a sum, say: one number, repeated
        grad_out = grad_out.contiguous()
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    call = (grad_out, query, key, value, out, lse, *grads, scale, is_causal)
    return grads if _core.attend_plain_backward(*call) else None


def _is_plain(options: Options, query: Tensor, key: Tensor) -> bool:
    """Tell whether only scale and is_causal are given, and query 0 stands at key 0."""
    mask, bias, sinks, slopes, offset, lengths, seed, starts, _, *rest = options
    _, is_causal, has_window, *rest = rest
    if any(x is not None for x in (mask, bias, sinks, slopes, lengths, seed, starts)):
        return False
    if has_window or rest[2:] != [None, 0.0]:
        return False
    if offset is None:
        return not is_causal or query.shape[-2:-1] == key.shape[-2:-1]
    return type(offset) is int and offset == 0


def keywords(
    options: Options, pairs_of: Callable[[str, Tensor], Any], numbers_of: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """Return the options as fastattn's functions take them, tensors as what two functions say."""
    mask, bias, sinks, slopes, offset, lengths, seed = options[: STARTS.start]
    scale, is_causal, has_window, left, right, softcap, dropout_p = options[MAY_BE_TENSORS:]
    starts = zip(STARTS_NAMES, options[STARTS], strict=True) if is_packed(options) else ()
    return {
        "mask": mask if mask is None else pairs_of("mask", mask),
        "bias": bias if bias is None else pairs_of("bias", bias),
        "scale": scale,
        "is_causal": is_causal,
        "query_offset": numbers_of("query_offset", offset),
        "window": (left, right) if has_window else None,
        "softcap": softcap,
        "alibi_slopes": numbers_of("alibi_slopes", slopes),
        "sinks": numbers_of("sinks", sinks),
        "kv_lengths": numbers_of("kv_lengths", lengths),
        "dropout_p": dropout_p,
        "seed": int(seed) % SEEDS if isinstance(seed, Tensor) else seed,
        **{name: numbers_of(name, x) for name, x in starts},
    }
