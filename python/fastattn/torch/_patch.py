# SPDX-License-Identifier: Apache-2.0
"""Ours in the place of torch.nn.functional.scaled_dot_product_attention, until it is closed."""

from __future__ import annotations

import importlib
import math
import threading
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch._C import (
    _get_flash_sdp_enabled,
    _is_torch_function_enabled,
    _is_torch_function_mode_enabled,
)
from torch.nn import functional
from torch.overrides import (
    _get_current_function_mode_stack,
    _get_overloaded_args,
    handle_torch_function,
    has_torch_function,
)
from torch.utils._device import DeviceContext

from fastattn._arrays import overridden
from fastattn._report import Report
from fastattn.torch import _sdpa, _tensors
from fastattn.torch._autograd import unobserved
from fastattn.torch._sdpa import Call

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

ERRORS = (TypeError, ValueError, NotImplementedError)  # of ours

_lock = threading.RLock()
_active: list[Patch] = []  # the latest last


def patch() -> Patch:
    """Put ours under torch.nn.functional.scaled_dot_product_attention.

    So under nn.MultiheadAttention, nn.Transformer and every module that calls the function by that
    name. torch.backends.mha's fast path, which in eval mode goes around the function, is switched
    off. It holds for all threads, at once, and until the end of the with statement, or until
    `close` if there is none::

        with fastattn.torch.patch() as p:
            model(x)
        print(p.report())

        p = fastattn.torch.patch()
        model(x)
        p.close()

    What ours does not do goes to the function that was there, and is counted in the report: tensors
    that are not on the CPU, of other dtypes, nested or sparse, of subclasses; calls under a
    transform of torch.func or a dispatch mode, or where torch's flash attention is switched off, as
    by sdpa_kernel(SDPBackend.MATH); arguments that break a rule, but for those of which torch's own
    kernel computes garbage: these are a ValueError. docs/torch.md has the table.

    Patches nest. Each, when it is closed, restores the function and the switch that it found; one
    that is closed before another that came later leaves them to that one. If something else has
    taken the function's place meanwhile, it stays, and what it calls is then torch's own again.

    A module that has taken the function itself by ``from torch.nn.functional import`` does not
    notice any of this. One that took it during a patch has ours, which afterwards is torch's own
    again; it is copied and saved as what stands at that name where it is loaded.

    Returns
    -------
    Patch
        With `close` and `report`.
    """
    return Patch()


class Patch:
    """What `patch` returns; it is in force from then on."""

    def __init__(self) -> None:
        self._answered = 0
        self._counts: dict[str, int] = {}
        self._counting = threading.Lock()
        with _lock:
            self._found: Callable[..., Any] = functional.scaled_dot_product_attention
            self._found_fastpath = torch.backends.mha.get_fastpath_enabled()
            self._ours = _Replacement(self).scaled_dot_product_attention
            functional.scaled_dot_product_attention = self._ours
            torch.backends.mha.set_fastpath_enabled(False)
            _active.append(self)
            self._in_force = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Patch must not be copied or saved: it holds a switch of this whole process; patch "
            "again where it is wanted"
        )

    def close(self) -> None:
        """Restore what was there. More than once does nothing."""
        with _lock:
            if not self._in_force:
                return
            self._in_force = False
            place = _active.index(self)
            _active.remove(self)
            if place < len(_active):  # a later one has found what this one did
                later = _active[place]
                later._found_fastpath = self._found_fastpath
                if later._found is self._ours:
                    later._found = self._found
                return
            torch.backends.mha.set_fastpath_enabled(self._found_fastpath)
            if functional.scaled_dot_product_attention is self._ours:
                functional.scaled_dot_product_attention = self._found

    def report(self) -> Report:
        """Return how many calls ours has answered, and which it has left to torch's own, and why.

        What torch.compile or torch.export traces is counted when it is traced, not when it runs.
        Calls in many threads at once may be answered without being counted; what is left is
        counted exactly.

        Returns
        -------
        dict
            `active`: whether the patch is in force. `answered`: a number of calls. `left`: by
            reason, numbers of calls. Its str() is the report.
        """
        with self._counting:
            left = dict(self._counts)
            answered = self._answered + left.pop("", 0)
        return Report(
            "fastattn.torch.patch",
            {"active": self._in_force, "answered": answered, "left": left},
        )

    def _leave(self, call: Call, why: str) -> Any:
        """Leave a call to what was found, and count it, unless torch's own would get it wrong."""
        _refuse_garbage(call)
        self._count(why)
        return self._call_found(call)

    def _call_found(self, call: Call) -> Any:
        if self._in_force:  # it would look for torch's own by name
            call = _sdpa.without_causal_bias(call)
        return _sdpa.asked_of(self._found, call)

    def _offer(self, seen: tuple[Any, ...], call: Call) -> Any:
        """Let modes and classes of tensors see a call, by torch's protocol.

        They are told the name of what stands in torch.nn.functional, where most of them look. A
        class that knows nothing of it calls it, with torch functions disabled, or declines: it is
        then told that of torch's own, so that the worst that can happen is what would without us.
        """
        named = _named(call)
        if _is_torch_function_mode_enabled():
            return handle_torch_function(self._ours, seen, *call[:6], **named)
        _refuse_garbage(call)
        overriding = _get_overloaded_args(seen)
        self._count(f"type {type(overriding[0]).__name__}")
        types = tuple(map(type, overriding))
        for x in overriding:
            if not isinstance(x, Tensor):  # what traces is to record torch's own
                continue
            rest = (types, call[:6], named)
            out, way = _told(x, self._ours, *rest)
            if way and way != _told(x, _nobodys, *rest)[1]:
                return x.__torch_function__(self._ours, *rest)
            if out is not NotImplemented:
                return out
        return self._call_found(call)

    @torch._disable_dynamo  # it breaks the graph: a class is asked when the call runs
    def _offer_untraced(self, seen: tuple[Any, ...], call: Call) -> Any:
        return self._offer(seen, call)

    def _count(self, why: str) -> bool:
        """Count a call that is left for a reason; of "", one that is traced and answered."""
        with self._counting:
            self._counts[why] = self._counts.get(why, 0) + 1
        return True


class _Offers(threading.local):
    """Whether this thread has offered a call to a class of tensors, which has not passed it on."""

    is_open = False


class _PassedOn(BaseException):
    """A class of tensors has called, with torch functions disabled, what it was told."""


_offers = _Offers()


def _told(x: Tensor, function: Callable[..., Any], *rest: Any) -> tuple[Any, Any]:
    """Tell a tensor's class a function; return its answer, and its way if it passed the call on.

    A class passes on what it does not know, and may pass on what it knows: which of the two, the
    way tells, in that it is or is not that of a function that nobody knows.
    """
    outer, _offers.is_open = _offers.is_open, True
    try:
        return x.__torch_function__(function, *rest), ()
    except _PassedOn as passed:
        way, trace = [], passed.__traceback__
        while trace is not None:
            way.append((trace.tb_frame.f_code, trace.tb_lasti))
            trace = trace.tb_next
        return NotImplemented, way[1:-1]
    finally:
        _offers.is_open = outer


def _nobodys(*_: Any, **__: Any) -> Any:
    raise _PassedOn


class _Replacement:
    """Holds what stands in the function's place: a method, for a function would not save.

    A method saves as the name of an attribute and whose it is; this saves as torch.nn.functional.
    """

    def __init__(self, patched: Patch) -> None:
        self._patched = patched

        @torch.compiler.assume_constant_result
        def count_traced(why: str) -> bool:
            return patched._count(why)

        self._count_traced = count_traced

    def __reduce__(self) -> Any:
        return importlib.import_module, (functional.__name__,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Compute what torch's own function does, under `fastattn.torch.patch`."""
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        patched = self._patched
        if not torch.compiler.is_compiling() and patched._in_force:
            try:
                out = _sdpa.fast_path(*given)
            except ERRORS as error:
                return patched._leave(Call(*given), f"{type(error).__name__}: {error}")
            if out is not None:
                patched._answered += 1
                return out
        call = Call(*given)
        seen = _sdpa.overridable(call)
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling():
                why = _foreign_type(*seen)
                if (why and has_torch_function(seen)) or not _only_default_device():
                    return patched._offer_untraced(seen, call)
            else:  # what exports has classes and modes of its own
                why = ""
            why = why or _reason(*seen)
            if why:
                _refuse_garbage(call)
            self._count_traced(why)
            return patched._call_found(call) if why else _sdpa.attended(call)
        if not patched._in_force:
            return patched._call_found(call)
        if has_torch_function(seen):
            return patched._offer(seen, call)
        why = _foreign(*seen)
        if why and _offers.is_open and not _is_torch_function_enabled():
            raise _PassedOn
        why = why or _reason(*seen)
        if why:
            return patched._leave(call, why)
        try:
            out = _sdpa.attended(call)
        except ERRORS as error:
            return patched._leave(call, f"{type(error).__name__}: {error}")
        patched._answered += 1
        return out


def _only_default_device() -> bool:
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _named(call: Call) -> dict[str, Any]:
    """Return what torch's function takes by name alone, without what says nothing."""
    named = {"scale": call.scale, "enable_gqa": call.enable_gqa}
    return {name: x for name, x in named.items() if x is not None and x is not False}


def _foreign(*tensors: Any) -> str:
    """Return why torch must see its own operators, "" if it need not."""
    why = _foreign_type(*tensors)
    return why or ("" if unobserved() else "a transform or mode is active")


def _foreign_type(*tensors: Any) -> str:
    for x in tensors:
        if x is not None and type(x) not in _tensors.PLAIN:
            return f"type {type(x).__name__}"
    return ""


def _reason(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> str:
    """Return why ours cannot, or may not, answer for these tensors, "" if it can."""
    for x, dtypes in (
        (query, _tensors.FLOATS),
        (key, _tensors.FLOATS),
        (value, _tensors.FLOATS),
        (attn_mask, _tensors.MASKS),
    ):
        if x is None:
            continue
        if x.device.type != "cpu":
            return f"device {x.device.type}"
        if x.is_nested:
            return "nested tensor"
        if x.layout is not torch.strided:
            return f"layout {x.layout}"
        if x.dtype not in dtypes:
            return f"dtype {x.dtype}"
    return "" if _get_flash_sdp_enabled() else "torch's flash attention is switched off"


def _refuse_garbage(call: Call) -> None:
    """Refuse what torch's own kernel answers from memory that is not the tensors', or at random."""
    query, key, value, scale = call.query, call.key, call.value, call.scale
    for x in (query, key, value):
        if not isinstance(x, Tensor) or overridden(torch, type(x)) or x.is_nested:
            return
    if key.dim() > 1 and value.dim() > 1 and key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "value must have as many rows as key, got "
            f"key.shape={tuple(key.shape)}, value.shape={tuple(value.shape)}"
        )
    if isinstance(scale, float) and math.isnan(scale):
        raise ValueError("scale must be finite, got scale=nan")
