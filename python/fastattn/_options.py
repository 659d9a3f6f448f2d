# SPDX-License-Identifier: Apache-2.0
"""Which options has a call? Their names, types, order and defaults, each once.

A public call takes its options as `**options`, of the types in one of the tables below; `takes`
shows them in its signature one by one. Inside they travel as one `Options`, as they were given, and
from `_arguments.py` on as one `CallOptions`, as the kernel takes them (src/calls.cpp).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

Call = TypeVar("Call", bound="Callable[..., Any]")


class ScoreOptions(TypedDict, total=False):
    """The options of every call, those of the caches too."""

    mask: ArrayLike | None
    bias: ArrayLike | None
    scale: float | None
    is_causal: bool
    window: tuple[int | None, int | None] | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None


class WeightOptions(ScoreOptions, total=False):
    """The options that decide the probabilities; a cache knows these two itself."""

    query_offset: ArrayLike | None
    kv_lengths: ArrayLike | None
    key_offset: ArrayLike


class AttentionOptions(WeightOptions, total=False):
    """All options."""

    dropout_p: float
    seed: int | None
    head_offset: int
    batch_offset: int


class Options(NamedTuple):
    """The options of one call, as they were given, in the order that signatures show."""

    mask: Any = None
    bias: Any = None
    scale: Any = None
    is_causal: Any = False
    query_offset: Any = None
    window: Any = None
    softcap: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    kv_lengths: Any = None
    dropout_p: Any = 0.0
    seed: Any = None
    key_offset: Any = 0
    head_offset: Any = 0
    batch_offset: Any = 0


class CallOptions(NamedTuple):
    """The options of one call, as they were checked, in the order that the kernel takes."""

    mask: Array | None
    bias: Array | None
    alibi_slopes: Array | None  # float64, of shape (batch, q_heads)
    sinks: Array | None  # float64
    query_offset: Array | None  # from the first key on; int64, of the batch shape; None: 0
    kv_lengths: Array | None  # int64, of the batch shape; None: kv_len
    scale: float
    softcap: float  # 0: none
    left: int  # keys that a query sees on this side; UNLIMITED: all
    right: int
    dropout_p: float
    seed: int
    key_offset: Array | None  # likewise, for dropout, whose counters have positions; None: 0
    head_offset: int
    batch_offset: int


NO_OPTIONS = Options()
OFFSETS = ("query_offset", "key_offset")
ARRAYS = ("mask", "bias", *OFFSETS, "alibi_slopes", "sinks", "kv_lengths")  # or numbers


def takes(table: type, **defaults: Any) -> Callable[[Call], Call]:
    """Show the options of a table in the signature of a call, in the place of its `**options`."""

    def decorated(call: Any) -> Any:
        signature = inspect.signature(call)
        own = list(signature.parameters.values())[:-1]
        kinds = inspect.Parameter
        positional = [x for x in own if x.kind is not kinds.KEYWORD_ONLY]
        types = table.__annotations__
        call._default = Options(**defaults) if defaults else NO_OPTIONS
        call._lacks = frozenset(Options._fields) - types.keys()
        shown = [
            kinds(name, kinds.KEYWORD_ONLY, default=default, annotation=types[name].__forward_arg__)
            for name, default in call._default._asdict().items()
            if name in types
        ]
        parameters = [*positional, *shown, *own[len(positional) :]]
        call.__signature__ = signature.replace(parameters=parameters)
        return call

    return decorated


def options_of(call: Any, given: Mapping[str, Any]) -> Options:
    """Return the options that were given to a call that `takes` some."""
    default: Options = call._default
    if not given:
        return default
    try:
        options = Options(**given) if default is NO_OPTIONS else default._replace(**given)
        if not call._lacks or call._lacks.isdisjoint(given):
            return options
    except (TypeError, ValueError):
        pass
    unknown = next(x for x in given if x in call._lacks or x not in Options._fields)
    raise TypeError(f"{call.__qualname__}() got an unexpected keyword argument {unknown!r}")
