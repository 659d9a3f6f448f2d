# SPDX-License-Identifier: Apache-2.0
"""How fastattn itself is called: a function for each `call` that a case can name.

Called by libraries.py. What a user does once, such as filling a cache or packing sequences, is
done before the clock starts.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import fastattn
from fastattn.bench.cases import Array, Case, Inputs, numpy_dtype, score_options
from fastattn.bench.operands import module, tensor, tokens_first


class Prepared(NamedTuple):
    """A case ready to be timed: `call()`, then `to_numpy(result)` in fastattn's layout."""

    call: Callable[[], Any]
    to_numpy: Callable[[Any], Array]
    how: str  # the operator that was chosen, for the report
    into: bool = False  # whether the result goes into an array that was there


def _attention(case: Case, inputs: Inputs) -> Prepared:
    query, key, value, mask, bias, grad_out = inputs
    options: dict[str, Any] = {}
    if case.call == "kv_lengths":
        options["kv_lengths"] = np.array(case.lengths)
    elif mask is not None:
        options["mask"] = mask
    if bias is not None:
        options["bias"] = bias
    if case.is_causal:
        options["is_causal"] = True
    if case.at_end:
        options["query_offset"] = case.query_offset
    if case.window is not None:
        options["window"] = case.window
    options |= score_options(case)
    if grad_out is not None:
        result, lse = fastattn.attention(query, key, value, return_lse=True, **options)

        def backward() -> Any:
            return fastattn.attention_backward(grad_out, query, key, value, result, lse, **options)

        return Prepared(backward, lambda grads: grads[0], "attention_backward")

    def filled() -> Array:
        return np.full(case.output_shape, 0, query.dtype)

    def call() -> Any:
        return fastattn.attention(query, key, value, **options)

    def into_filled() -> Any:
        return fastattn.attention(query, key, value, out=filled(), **options)

    if case.call == "into filled":
        return Prepared(into_filled, _as_it_is, "attention(out), out new and filled")
    if case.call == "into":
        options["out"] = filled()
    return Prepared(call, _as_it_is, f"attention({', '.join(options)})", case.call == "into")


def as_views(inputs: Inputs) -> Inputs:
    """Lay query, key and value out as a model does: (batch, seq, heads, dim), transposed."""
    query, key, value = (tokens_first(x).swapaxes(1, 2) for x in inputs[:3])
    return inputs._replace(query=query, key=key, value=value)


def _views(case: Case, inputs: Inputs) -> Prepared:
    prepared = _attention(case, as_views(inputs))
    return prepared._replace(how=f"{prepared.how} of transposed views")


def _tensors(case: Case, inputs: Inputs) -> Prepared:
    """Let an operator of torch run just before, as in a model: its threads still spin then."""
    torch = module("torch")
    door = fastattn if case.call == "tensors" else module("fastattn.torch")
    operands = [tensor(x) for x in inputs[:3]]
    hidden = torch.ones(1 << 16)  # enough for torch to use its threads

    def call() -> Any:
        hidden.mul_(1.0)
        return door.attention(*operands)

    how = f"{door.__name__}.attention behind an operator of torch"
    return Prepared(call, lambda out: out.double().numpy(), how)


def _drop_in(case: Case, inputs: Inputs) -> Prepared:
    attention = module("fastattn.torch").attention
    operands = [tensor(x) for x in inputs[:3]]

    def call() -> Any:
        return attention(*operands, is_causal=case.is_causal)

    return Prepared(call, lambda out: out.double().numpy(), "fastattn.torch.attention(is_causal)")


def _packed(case: Case, inputs: Inputs) -> Prepared:
    """Pack the sequences, and attend to all in one call, or to each in a call of its own."""
    ends = np.cumsum(case.lengths)
    starts = np.array([0, *ends], np.int32)
    query, key, value = (
        np.concatenate([x[i, :, :n].swapaxes(0, 1) for i, n in enumerate(case.lengths)])
        for x in inputs[:3]
    )

    def together() -> Any:
        return fastattn.varlen_attention(
            query, key, value, starts, starts, is_causal=case.is_causal
        )

    sequences = [
        tuple(x[begin:end].swapaxes(0, 1) for x in (query, key, value))
        for begin, end in itertools.pairwise(starts)
    ]

    def one_by_one() -> list[Array]:
        return [fastattn.attention(*each, is_causal=case.is_causal) for each in sequences]

    def padded(out: Array | list[Array]) -> Array:
        if isinstance(out, list):
            return padded_rows(case, [x.swapaxes(0, 1) for x in out])
        return padded_rows(case, np.split(out, ends[:-1]))

    if case.call == "varlen":
        return Prepared(together, padded, "varlen_attention")
    return Prepared(one_by_one, padded, f"attention, {len(sequences)} calls")


def padded_rows(case: Case, sequences: Sequence[Array]) -> Array:
    """Put sequences, each (rows, heads, dim), into one array in fastattn's layout."""
    whole = np.zeros(case.output_shape, sequences[0].dtype)
    for i, rows in enumerate(sequences):
        whole[i, :, : len(rows)] = rows.swapaxes(0, 1)
    return whole


def _cache(case: Case, inputs: Inputs) -> Prepared:
    query, key, value, *_ = inputs
    cache = _new_cache(case)
    cache.append(key, value)
    return Prepared(lambda: cache.attend(query), _as_it_is, _named("KVCache.attend", case))


def _append(case: Case, inputs: Inputs) -> Prepared:
    """Append the last token and truncate it again, so that each call finds the same cache."""
    query, key, value, *_ = inputs
    cache = _new_cache(case)
    cache.append(key[:, :, :-1], value[:, :, :-1])
    new = key[:, :, -1:], value[:, :, -1:]
    before = np.full(case.batch, case.kv_len - 1)

    def call() -> None:
        cache.append(*new)
        cache.truncate(before)

    def attended(_: None) -> Any:
        cache.append(*new)
        out = cache.attend(query)
        cache.truncate(before)
        return out

    return Prepared(call, attended, _named("KVCache.append, truncate", case))


def _pages(case: Case, inputs: Inputs) -> Prepared:
    """Append the shared tokens once, and let every sequence begin with them."""
    query, key, value, *_ = inputs
    cache = fastattn.PagedKVCache(key.shape[1], case.head_dim, dtype=_cache_dtype(case))
    prefix = None
    if case.shared:
        prefix = cache.add()
        common = (x[:1, :, : case.shared] for x in (key, value))
        cache.append(*common, sequences=[prefix])
    sequences = [cache.add(prefix) for _ in range(case.batch)]
    cache.append(key[:, :, case.shared :], value[:, :, case.shared :], sequences=sequences)

    def call() -> Any:
        return cache.attend(query, sequences=sequences)

    return Prepared(call, _as_it_is, _named("PagedKVCache.attend", case))


def _new_cache(case: Case) -> "fastattn.KVCache":
    kv_heads = case.kv_heads or case.q_heads
    return fastattn.KVCache(
        case.batch, kv_heads, case.head_dim, capacity=case.kv_len, dtype=_cache_dtype(case)
    )


def _cache_dtype(case: Case) -> Any:
    return numpy_dtype(case.cache_dtype or case.dtype)


def _named(how: str, case: Case) -> str:
    return f"{how} ({case.cache_dtype or case.dtype})"


def _as_it_is(out: Array) -> Array:
    return out


CALLS: dict[str, Callable[[Case, Inputs], Prepared]] = {
    "attention": _attention,
    "into": _attention,
    "into filled": _attention,
    "backward": _attention,
    "kv_lengths": _attention,
    "views": _views,
    "tensors": _tensors,
    "tensors to fastattn.torch": _tensors,
    "drop-in": _drop_in,
    "varlen": _packed,
    "one by one": _packed,
    "cache": _cache,
    "append": _append,
    "pages": _pages,
}
