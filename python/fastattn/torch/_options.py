# SPDX-License-Identifier: Apache-2.0
"""What a call on tensors asks for, on its way from the public functions to the kernels.

The options travel as one `Options`, and the starts of packed sequences beside them: () where the
sequences are not packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from torch import Tensor

from fastattn._options import Options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

Starts = tuple[Any, ...]
Converted = Callable[[str, Any], Any]  # what a tensor of that name is converted to
STARTS = ("cu_seqlens_q", "cu_seqlens_kv")
# A tensor, array or number each.
NUMBERS = ("query_offset", "key_offset", "alibi_slopes", "sinks", "kv_lengths")
SEEDS = 2**64


class TensorOptions(TypedDict, total=False):
    """The options of `attention` and `varlen_attention`."""

    mask: Tensor | None
    bias: Tensor | None
    scale: float | None
    is_causal: bool
    query_offset: Tensor | ArrayLike | None
    window: tuple[int | None, int | None] | None
    softcap: float | None
    alibi_slopes: Tensor | ArrayLike | None
    sinks: Tensor | ArrayLike | None
    kv_lengths: Tensor | ArrayLike | None
    dropout_p: float
    seed: int | None
    key_offset: Tensor | ArrayLike
    head_offset: int
    batch_offset: int


class Gradients(NamedTuple):
    """The gradients of a call; None for one that is not wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None = None
    sinks: Tensor | None = None


class BackwardCall(NamedTuple):
    """The arguments of a backward pass."""

    grad_out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor | None
    options: Options
    starts: Starts
    wants_dbias: bool
    wants_dsinks: bool

    def keywords(self, tensor_as: Converted, numbers_as: Converted) -> dict[str, Any]:
        """Return the arguments as `keywords` does, for `attention_backward`."""
        names = ("grad_out", "query", "key", "value", "out", "lse", "grad_lse")
        named = {name: getattr(self, name) for name in names}
        _convert(named, names, tensor_as)
        named |= keywords(self.options, self.starts, tensor_as, numbers_as)
        return named | {"return_dbias": self.wants_dbias, "return_dsinks": self.wants_dsinks}

    def gradients(self, results: Iterable[Tensor]) -> Gradients:
        """Return by name the gradients that `attention_backward` has returned."""
        dq, dk, dv, *rest = results
        dsinks = rest.pop().to(self.options.sinks) if self.wants_dsinks else None
        return Gradients(dq, dk, dv, rest.pop() if self.wants_dbias else None, dsinks)


def keywords(
    options: Options, starts: Starts, tensor_as: Converted, numbers_as: Converted
) -> dict[str, Any]:
    """Return the options and the starts as the functions of fastattn and fastattn.cuda take them.

    tensor_as converts tensors; numbers_as, what has a number for each head or sequence, and may be
    a tensor.
    """
    named = options._asdict() | dict(zip(STARTS, starts, strict=False))
    _convert(named, ("mask", "bias"), tensor_as)
    _convert(named, NUMBERS + STARTS[: len(starts)], numbers_as)
    if isinstance(options.seed, Tensor):
        named["seed"] = int(options.seed) % SEEDS
    return named


def _convert(named: dict[str, Any], names: Iterable[str], converted: Converted) -> None:
    for name in names:
        if named[name] is not None:
            named[name] = converted(name, named[name])


def split(options: Options, starts: Starts) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """Return the tensors among the two, which autograd must save itself, and what is left of them.

    Each has None in the places of the other; no tensors are an empty list.
    """
    given = (*options, *starts)
    tensors = [x if isinstance(x, Tensor) else None for x in given]
    if not any(x is not None for x in tensors):
        return [], given
    return tensors, tuple(None if isinstance(x, Tensor) else x for x in given)


def joined(tensors: list[Tensor | None], others: tuple[Any, ...]) -> tuple[Options, Starts]:
    """Return the options and the starts that `split` has split."""
    if tensors:
        others = tuple(y if x is None else x for x, y in zip(tensors, others, strict=True))
    count = len(Options._fields)
    return Options(*others[:count]), others[count:]
