# SPDX-License-Identifier: Apache-2.0
"""What a query sees: `mask` is what transformers asks once per forward pass and kind of layer.

Where arguments of the kernel say it, no mask of q_len x kv_len is made: `Pattern` stands for it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from fastattn.torch._context_parallel import active
from fastattn.transformers import _packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastattn.torch._context_parallel import OverRanks

# What models ask of a mask without its numbers; `to` returns it where it is already.
DESCRIPTIONS = {
    *(getattr(Tensor, x).__get__ for x in ("shape", "dtype", "device", "ndim", "requires_grad")),
    *(getattr(Tensor, x) for x in ("dim", "size", "numel", "is_floating_point", "to")),
}


class Pattern(Tensor):
    """A bool mask of shape (batch, 1, q_len, kv_len), in the words of the kernel.

    Whatever needs the numbers, of torch or of others, finds the mask itself, made then: a model may
    slice it or combine it with another, a calibrator save it or send it to a process. From then on
    the mask counts, since it may have been written to. Only scores, as layers of other kinds have
    them beside ours, it must not be added to, and neither must what is made of it.
    """

    _seen: dict[str, Any]
    _whole: Tensor | None
    ranks: OverRanks | None  # under context_parallel: what is seen is said of the whole sequence
    refusal: str | None  # what is not there over ranks; a layer tells it, when all of them are met

    @staticmethod
    def __new__(cls: type[Self], shape: tuple[int, ...], seen: dict[str, Any]) -> Self:
        """Take the shape, and the keywords of `fastattn.attention` that say what is seen.

        Beside them `starts`, of packed sequences in the batch's rows behind each other.
        """
        self: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device="cpu")
        torch._C._set_throw_on_mutable_data_ptr(self)  # an error for extensions, not a crash
        self._seen = seen
        self._whole = self.ranks = self.refusal = None
        return self

    @classmethod
    def of(cls, mask: Tensor) -> Self:
        """Return the pattern of a mask that there is."""
        self = cls(tuple(mask.shape), {})
        self._whole = mask
        return self

    @property
    def chunk_size(self) -> int | None:
        """The size of chunks, which may be of the row, whatever sequences are packed in it."""
        return getattr(self._whole, "chunk_size", None)

    @property
    def is_made(self) -> bool:
        """Whether there is the mask itself, which counts then."""
        return self._whole is not None

    def seen(self) -> dict[str, Any]:
        """Return the keywords that say what is seen, before it is made."""
        return dict(self._seen)

    def whole(self) -> Tensor:
        """Return the mask itself, with its numbers also where torch traces with fake tensors."""
        if self.ranks is not None:
            raise NotImplementedError(
                "attn_implementation='fastattn' has no masks that a model reads or changes under "
                "fastattn.torch.context_parallel"
            )
        if self._whole is None:
            with torch.inference_mode(False), _disable_current_modes():
                self._whole = _whole(tuple(self.shape), **self._seen)
        return self._whole

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return another pattern, with a copy of the mask if there is one."""
        if self._whole is not None:
            return Pattern.of(copy.deepcopy(self._whole, memo))
        copied = Pattern(tuple(self.shape), copy.deepcopy(self._seen, memo))
        copied.ranks, copied.refusal = self.ranks, self.refusal
        return copied

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function or a method of torch on the masks themselves; a mask stays a pattern."""
        if function in DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        found = _on_masks(function, getattr(function, "__name__", ""), args, kwargs)
        if function is Tensor.as_subclass:
            return found
        return tree_map_only(Tensor, lambda x: Pattern.of(x) if _is_mask(x) else x, found)

    @classmethod
    def __torch_dispatch__(
        cls,
        operator: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator on the masks themselves: of a caller for whom there are no subclasses."""
        return _on_masks(operator, operator.overloadpacket.__name__, args, kwargs)


def _is_mask(x: Any) -> bool:
    """Tell whether x is a mask with numbers, not one that a transform or the compiler follows."""
    if type(x) is not Tensor or x.dtype != torch.bool or x.dim() != 4:
        return False
    if x.device.type != "cpu" or x.layout != torch.strided:
        return False
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x))


def _on_masks(
    function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> Any:
    """Call a function with masks in the place of patterns, unless it adds one to scores."""
    if name.strip("_") in ("add", "radd", "iadd") and any(
        isinstance(x, Tensor) and x.is_floating_point() for x in (*args, *(kwargs or {}).values())
    ):
        raise NotImplementedError(
            "a layer adds its bool mask to scores: it computes attention in its own way, "
            "without transformers' AttentionInterface, which attn_implementation='fastattn' "
            "needs"
        )
    leaves = tree_leaves((args, kwargs))
    sizes = [x.chunk_size for x in leaves if getattr(x, "chunk_size", None) is not None]
    args, kwargs = tree_map_only(Pattern, Pattern.whole, (args, kwargs or {}))
    found = function(*args, **kwargs)
    for x in tree_leaves(found) if sizes else ():
        if isinstance(x, Tensor) and not isinstance(x, Pattern):  # which has its mask's
            x.chunk_size = min(sizes)
    return found


def _whole(
    shape: tuple[int, ...],
    *,
    is_causal: bool = False,
    query_offset: int = 0,
    window: tuple[int | None, int | None] = (None, None),
    kv_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Return the mask of that shape that the keywords of a pattern mean."""
    key = torch.arange(shape[-1], device="cpu")
    distance = key - torch.arange(query_offset, query_offset + shape[-2], device="cpu")[:, None]
    left, right = window
    whole = torch.ones(shape, dtype=torch.bool, device="cpu")
    if is_causal:
        whole &= distance <= 0
    if left is not None:
        whole &= distance >= -left
    if right is not None:
        whole &= distance <= right
    if kv_lengths is not None:
        whole &= key < kv_lengths[:, None, None, None]
    if mask is not None:
        whole &= mask
    if starts is not None:
        whole &= _packed.shared((starts, starts), *shape[-2:])
    return whole


def mask(
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

    A `Pattern` in the kernel's arguments where they say it; None for a single query that sees all
    keys; else the mask that transformers makes for torch's function. None for more queries would
    leave to each layer whether it is causal, and some are wrong about themselves.

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
    ranks = active()
    if ranks is not None:
        shape = (batch_size, 1, q_length, kv_length)
        return _over_ranks(ranks, shape, q_offset, kv_offset, mask_function, attention_mask)

    def make() -> Tensor:
        made: Tensor = masking_utils.sdpa_mask(
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
        chunk_size = getattr(others.get("config"), "attention_chunk_size", None)
        if chunk_size is not None and chunk_size == others.get("local_size"):
            made.chunk_size = chunk_size
        return made

    plain = attention_mask is None or (attention_mask.dim(), attention_mask.dtype) == (
        2,
        torch.bool,
    )
    if not plain or is_tracing(attention_mask) or torch.device(device).type != "cpu":
        return make()
    first, first_key = int(q_offset), int(kv_offset)
    known = _known(mask_function, max(first + q_length, first_key + kv_length))
    starts = None if known is None else _starts(mask_function)
    if starts is not None and (
        (first, first_key, q_length) != (0, 0, kv_length)
        or int(starts[-1]) != batch_size * q_length
    ):
        known = None  # sequences of another row than this
    if known is None:
        if q_length == 1:
            return make()  # it may go to a compiled model
        return Pattern.of(make())
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
    if starts is not None:
        seen["starts"] = starts

    if q_length == 1:  # the mask is no larger than the words
        may_skip = allow_is_causal_skip if causal_layer else allow_is_bidirectional_skip
        return None if may_skip and not seen else make()
    return Pattern((batch_size, 1, q_length, kv_length), seen)


def _over_ranks(
    ranks: OverRanks,
    shape: tuple[int, ...],
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
) -> Pattern:
    """Return the pattern of what queries see among the keys of all ranks, of which some are here.

    Packed sequences are no matter of it: that the positions of these rows leap says nothing.
    """
    if is_tracing(attention_mask):
        raise NotImplementedError(
            "attn_implementation='fastattn' has no torch.compile or torch.export under "
            "fastattn.torch.context_parallel"
        )
    known = _known(mask_function, sys.maxsize)
    causal, left, right = known or (False, None, None)
    seen: dict[str, Any] = {"is_causal": causal, "query_offset": 0}
    if left is not None or right is not None:
        seen["window"] = (left, right)
    pattern = Pattern(shape, seen)
    pattern.ranks = ranks
    if known is None:
        pattern.refusal = "mask beside causal ones and sliding windows"
    elif int(q_offset) != 0 or kv_offset != 0:
        pattern.refusal = "cache of earlier tokens"
    elif attention_mask is not None and not bool((attention_mask != 0).all()):
        pattern.refusal = "padding (an attention_mask that hides tokens)"
    return pattern


def _keys_seen(
    attention_mask: Tensor | None, kv_offset: int, kv_length: int, needed: int
) -> dict[str, Any]:
    """Return the option that hides padding; none if all keys before `needed` are tokens."""
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
AND, WINDOW, WINDOW_BOTH_WAYS, CHUNKS, RESTARTED, PACKED = _codes(
    masking_utils.and_masks(),
    masking_utils.sliding_window_overlay(1),
    masking_utils.sliding_window_bidirectional_overlay(1),
    masking_utils.chunked_overlay(1, torch.zeros(1)),
    masking_utils.remap_positions_for_packed_sequence(masking_utils.and_masks(), torch.zeros(1)),
    masking_utils.packed_sequence_mask_function(torch.zeros(1)),
)


def _known(
    mask_function: Callable[..., Any], end: int
) -> tuple[bool, int | None, int | None] | None:
    """Return is_causal and the sides of the window that a function means; None if it means more.

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
    if code not in (AND, WINDOW, WINDOW_BOTH_WAYS, CHUNKS, RESTARTED, PACKED):
        return None
    given = inspect.getclosurevars(mask_function).nonlocals
    if code is WINDOW:
        return False, given["sliding_window"] - 1, None
    if code is WINDOW_BOTH_WAYS:
        return False, given["sliding_window"], given["sliding_window"]
    if code is CHUNKS:
        whole = end <= given["chunk_size"] and not given["left_padding"].any()
        return (False, None, None) if whole else None
    if code is RESTARTED:  # distances within a sequence stay, chunks do not
        return _known(given["mask_function"], sys.maxsize)
    if code is PACKED:
        numbers = given["packed_sequence_mask"]
        together = bool((numbers[:, 1:] >= numbers[:, :-1]).all())
        return (False, None, None) if together else None
    parts = [_known(f, end) for f in given["mask_functions"]]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    causal, left, right = zip(*found, strict=True)
    return any(causal), _least(left), _least(right)


def _starts(mask_function: Callable[..., Any]) -> Tensor | None:
    """Return where the packed sequences start that a known function keeps apart, if it does."""
    code = getattr(mask_function, "__code__", None)
    if code not in (AND, PACKED):
        return None
    given = inspect.getclosurevars(mask_function).nonlocals
    if code is PACKED:
        return _packed.restarts_of(given["packed_sequence_mask"])
    found = [x for x in map(_starts, given["mask_functions"]) if x is not None]
    return torch.cat(found).unique() if found else None


def _least(sides: tuple[int | None, ...]) -> int | None:
    return min((side for side in sides if side is not None), default=None)
