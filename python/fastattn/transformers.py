# SPDX-License-Identifier: Apache-2.0
"""Attention of models of Hugging Face transformers: what `attn_implementation="fastattn"` means.

transformers asks two functions: `_mask` once per forward pass and kind of layer, what a query sees;
`_attention` in every layer. Between the two goes a tensor, or None: a `Pattern` where the kernel's
own arguments say what is seen, so that no mask of q_len x kv_len is made or read. The call itself
is `fastattn.torch.attention`.

Differences from transformers' own implementations: docs/transformers.md.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Self

try:
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_map_only
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        PreTrainedModel,
        masking_utils,
    )
    from transformers.utils import output_capturing
    from transformers.utils.import_utils import is_tracing
except ImportError as error:
    raise ImportError(
        f"fastattn.transformers needs transformers and torch ({error}): "
        "pip install torch transformers"
    ) from error

import fastattn
import fastattn.torch
from fastattn.torch._attention import drawn_seed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["register"]

NAME = "fastattn"


def register() -> None:
    """Make ``attn_implementation="fastattn"`` known to transformers, in this process.

    Models that are loaded with it, or told by ``model.set_attn_implementation("fastattn")``,
    compute attention here, on the CPU. More than once does nothing.

    What is not supported is an error, never another computation: a model that does not use
    transformers' AttentionInterface, when it is made; when it runs, another device, sparse
    attention by indices, sinks per token, packed sequences that neither a mask nor position_ids
    tell apart, continuous batching.

    See Also
    --------
    fastattn.torch.patch : for models that call torch's function themselves.

    References
    ----------
    https://huggingface.co/docs/transformers/attention_interface

    Examples
    --------
    >>> import fastattn.transformers, transformers
    >>> fastattn.transformers.register()
    >>> config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=10)
    >>> model = transformers.AutoModel.from_config(config, attn_implementation="fastattn")
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    _refuse_models()


@functools.cache
def _refuse_models() -> None:
    """Let transformers refuse models that compute attention in their own way, as it does for sdpa.

    They would go on doing so, and take what `_mask` returns for something to be added.
    """
    accepted = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(accepted)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == NAME and not _asks_for_attention(type(self)):
            raise ValueError(
                f"{type(self).__name__} does not support attn_implementation='{NAME}': it computes "
                "attention in its own way, without transformers' AttentionInterface"
            )
        return accepted(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = checked


def _asks_for_attention(model: Any) -> bool:
    """Tell whether a class of models, or one that it extends, uses the AttentionInterface."""
    return any(
        issubclass(c, PreTrainedModel)
        and c is not PreTrainedModel
        and c._can_set_attn_implementation()
        for c in model.__mro__
    )


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of one layer, as transformers calls for it.

    Parameters
    ----------
    module : Module
        The layer; its `is_causal`, False if it has none, counts where is_causal is None.
    query : Tensor of shape (batch, q_heads, q_len, head_dim)
    key : Tensor of shape (batch, kv_heads, kv_len, head_dim)
    value : Tensor of shape (batch, kv_heads, kv_len, value_head_dim)
    attention_mask : Tensor, broadcastable to (batch, q_heads, q_len, kv_len), optional
        What `_mask` has returned, or what the caller of the model gave: bool, or added. If None
        and the layer is causal, query i sees key j iff j <= i; a single query sees all keys.
    dropout, scaling, softcap
        dropout_p, scale and softcap of `fastattn.attention`; no dropout unless module.training.
    s_aux : Tensor of shape (q_heads,), optional
        Sinks.
    position_bias : Tensor, broadcastable to (batch, q_heads, q_len, kv_len), optional
        Added to the scores.
    output_attentions : bool
        Return the probabilities.
    **others
        What else the model was called with. sliding_window is in the mask already.

    Returns
    -------
    out : Tensor of shape (batch, q_len, q_heads, value_head_dim)
    weights : Tensor of shape (batch, q_heads, q_len, kv_len), or None
        Without dropout, and without a gradient.
    """
    _refuse(module, attention_mask, s_aux, others)
    seen: dict[str, Any]
    if type(attention_mask) is Pattern:
        seen = attention_mask.seen()
    elif attention_mask is not None:
        seen = {"mask": attention_mask}
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", False)
        seen = {"is_causal": True, "query_offset": 0} if is_causal and query.shape[2] > 1 else {}
    seen.update(bias=position_bias, scale=scaling, softcap=softcap, sinks=s_aux)
    if dropout > 0 and module.training:
        dropped = {"dropout_p": dropout, "seed": drawn_seed(dropout)}
    else:
        dropped = {}
    out = fastattn.torch.attention(query, key, value, **seen, **dropped)
    weights = _weights(query, key, seen) if output_attentions or _collected() else None
    return out.transpose(1, 2).contiguous(), weights


def _refuse(
    module: torch.nn.Module,
    attention_mask: Tensor | None,
    s_aux: Tensor | None,
    others: dict[str, Any],
) -> None:
    """Refuse what would change the result, and is not done here."""
    for name, what in (
        ("indices", "sparse attention by indices of keys"),
        ("block_indices", "sparse attention by indices of blocks"),
        ("sinks", "sinks that differ from token to token"),
    ):
        if others.get(name) is not None:
            raise NotImplementedError(
                f"attn_implementation='fastattn' has no {what} ({name}), as "
                f"{type(module).__name__} asks for"
            )
    if s_aux is None and isinstance(module._parameters.get("sinks"), Tensor):
        raise NotImplementedError(
            f"{type(module).__name__} has sinks, and does not pass them to "
            "attn_implementation='fastattn' as s_aux"
        )
    starts = others.get("cu_seq_lens_q")
    if attention_mask is None and starts is not None and len(starts) > 2:
        raise NotImplementedError(
            "attn_implementation='fastattn' tells packed sequences apart by their position_ids, or "
            f"by an attention_mask, got cu_seq_lens_q of {len(starts) - 1} sequences without"
        )
    if attention_mask is not None and attention_mask.dim() < 3:
        raise ValueError(
            "attention_mask must have the axes (batch, heads, q_len, kv_len) where a layer gets "
            f"it, got attention_mask.shape={tuple(attention_mask.shape)}"
        )


def _collected() -> bool:
    """Tell whether the model returns what its layers return as weights.

    Not every model passes output_attentions on to its layers.
    """
    if torch.compiler.is_compiling():
        return False
    collected = output_capturing._active_collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _weights(query: Tensor, key: Tensor, seen: dict[str, Any]) -> Tensor:
    """Return the probabilities, in the dtype of query."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "attn_implementation='fastattn' has no output_attentions under torch.compile"
        )
    exact = {
        name: _wide(x.detach()) if isinstance(x, Tensor) else x
        for name, x in (("query", query), ("key", key), *seen.items())
    }
    weights: Tensor = fastattn.attention_weights(**exact)
    return weights.to(query.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return a tensor that NumPy knows: float32 if it is of half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


ADDITIONS = (torch.ops.aten.add, torch.ops.aten.add_)


class Pattern(Tensor):
    """A bool mask of shape (batch, 1, q_len, kv_len), in the words of the kernel.

    Any operation on it finds the mask itself, made then, so that a model may slice it or combine
    it with another; from then on the mask counts, since the operation may have written to it.
    Only scores, as layers of other kinds have them beside ours, it must not be added to.
    """

    _make: Callable[[], Tensor]
    _whole: Tensor | None
    _seen: dict[str, Any]

    @staticmethod
    def __new__(
        cls: type[Self], shape: tuple[int, ...], seen: dict[str, Any], make: Callable[[], Tensor]
    ) -> Self:
        """Take the shape, the keywords of `fastattn.attention`, and how the mask is made."""
        self: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device="cpu")
        self._make = make
        self._whole = None
        self._seen = seen
        return self

    def seen(self) -> dict[str, Any]:
        """Return keywords of `fastattn.attention` that say what is seen."""
        return dict(self._seen) if self._whole is None else {"mask": self._whole}

    def whole(self) -> Tensor:
        """Return the mask itself."""
        if self._whole is None:
            self._whole = self._make()
        return self._whole

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls,
        operator: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator on the masks themselves."""
        if operator.overloadpacket in ADDITIONS and any(
            isinstance(x, Tensor) and x.is_floating_point() for x in args
        ):
            raise NotImplementedError(
                "a layer adds its bool mask to scores: it computes attention in its own way, "
                "without transformers' AttentionInterface, which attn_implementation='fastattn' "
                "needs"
            )
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return operator(*args, **kwargs)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Say what each query sees, in the cheapest way that is right.

    A `Pattern` where the kernel's arguments say it; None for a single query that sees all keys;
    else the mask that transformers makes for torch's function. None for more queries would leave
    to each layer whether it is causal, and some are wrong about themselves.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        The sizes of the mask.
    q_offset, kv_offset : int, or Tensor of one
        Positions of the first query and of the first key in the sequence.
    mask_function : callable
        Of (batch, head, query position, key position): whether the pair is seen.
    attention_mask : Tensor of bool, shape (batch, positions), optional
        False: padding. Positions behind its end are padding too.
    allow_is_causal_skip, allow_is_bidirectional_skip : bool
        Whether None may be returned, if mask_function is causal or if it is not.
    device, **others
        As for transformers' function.

    Returns
    -------
    Tensor of bool, shape (batch, 1, q_len, kv_len), or None
    """

    def make() -> Tensor:
        mask: Tensor = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            device=device,
            **others,
        )
        return mask

    plain = attention_mask is None or (attention_mask.dim(), attention_mask.dtype) == (
        2,
        torch.bool,
    )
    if not plain or is_tracing(attention_mask) or torch.device(device).type != "cpu":
        return make()
    first, first_key = int(q_offset), int(kv_offset)
    known = _known(mask_function, max(first + q_length, first_key + kv_length))
    if known is None:
        return make()
    causal_layer, left, right = known
    offset = first - first_key  # of the first query, among the keys
    end = offset + q_length  # of the queries, likewise
    causal = causal_layer and offset < kv_length - 1
    if left is not None and left >= end - 1:
        left = None
    if right is not None and right >= kv_length - 1 - offset:
        right = None

    seen: dict[str, Any] = {}
    if causal or left is not None or right is not None:
        seen["query_offset"] = offset
    if causal:
        seen["is_causal"] = True
    if left is not None or right is not None:
        seen["window"] = (left, right)
    needed = min(max(end, 0), kv_length) if causal else kv_length
    seen |= _keys_seen(attention_mask, first_key, kv_length, needed)

    if q_length == 1:  # the mask is no larger than the words, and may go to a compiled model
        may_skip = allow_is_causal_skip if causal_layer else allow_is_bidirectional_skip
        return None if may_skip and not seen else make()
    return Pattern((batch_size, 1, q_length, kv_length), seen, make)


def _keys_seen(
    attention_mask: Tensor | None, kv_offset: int, kv_length: int, needed: int
) -> dict[str, Any]:
    """Return the keyword that says which keys are padding; none if only such from `needed` on."""
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return {}
    keys = padding[:, kv_offset : kv_offset + kv_length]
    if bool(keys[:, :needed].all()):
        return {}
    if bool((keys[:, 1:] <= keys[:, :-1]).all()):  # padding is at the end
        return {"kv_lengths": keys.sum(-1)}
    return {"mask": keys[:, None, None, :]}


def _codes(*functions: Callable[..., Any]) -> tuple[Any, ...]:
    return tuple(f.__code__ for f in functions)


# What the functions consist of that transformers composes a mask function of.
AND, WINDOW, WINDOW_BOTH_WAYS, CHUNKS = _codes(
    masking_utils.and_masks(),
    masking_utils.sliding_window_overlay(1),
    masking_utils.sliding_window_bidirectional_overlay(1),
    masking_utils.chunked_overlay(1, torch.zeros(1)),
)


def _known(
    mask_function: Callable[..., Any], end: int
) -> tuple[bool, int | None, int | None] | None:
    """Return is_causal and both sides of the window, if they are all that a function says.

    Parameters
    ----------
    mask_function : callable
        One of transformers' own, or their conjunction; None is returned for any other.
    end : int
        No position reaches it.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True, None, None
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, None, None
    code = getattr(mask_function, "__code__", None)
    if code not in (AND, WINDOW, WINDOW_BOTH_WAYS, CHUNKS):
        return None
    given = inspect.getclosurevars(mask_function).nonlocals
    if code is WINDOW:
        return False, given["sliding_window"] - 1, None
    if code is WINDOW_BOTH_WAYS:
        return False, given["sliding_window"], given["sliding_window"]
    if code is CHUNKS:
        whole = end <= given["chunk_size"] and not given["left_padding"].any()
        return (False, None, None) if whole else None
    parts = [_known(f, end) for f in given["mask_functions"]]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    causal, left, right = zip(*found, strict=True)
    return any(causal), _least(left), _least(right)


def _least(sides: tuple[int | None, ...]) -> int | None:
    return min((side for side in sides if side is not None), default=None)
