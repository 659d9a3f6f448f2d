# SPDX-License-Identifier: Apache-2.0
"""Ours in the place of torch.nn.functional.scaled_dot_product_attention, for a while."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from fastattn._report import Report
from fastattn.torch import _attention, _tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

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
    transform of torch.func or a dispatch mode; arguments that break a rule.

    Patches nest. Each, when it is closed, restores the function and the switch that it found; one
    that is closed before another that came later leaves them to that one. If something else has
    taken the function's place meanwhile, it stays, and what it calls is then torch's own again.

    A module that has taken the function itself by ``from torch.nn.functional import`` does not
    notice any of this.

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
            self._ours = _replacement(self)
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

    def _count(self, why: str) -> bool:
        """Count a call that is left for that reason; "": one that is traced and answered."""
        with self._counting:
            self._counts[why] = self._counts.get(why, 0) + 1
        return True


def _replacement(patched: Patch) -> Callable[..., Any]:
    """Return what stands in the function's place."""

    @torch.compiler.assume_constant_result
    def count_traced(why: str) -> bool:
        return patched._count(why)

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        call = (query, key, value, attn_mask, dropout_p, is_causal)
        rest: dict[str, Any] = {
            "scale": scale,
            "enable_gqa": enable_gqa,
        }  # by name alone, in torch's own
        if torch.compiler.is_compiling():
            why = _reason(query, key, value, attn_mask)
            count_traced(why)
            return (
                patched._found(*call, **rest)
                if why
                else _attention.scaled_dot_product_attention(*call, **rest)
            )
        if not patched._in_force:
            return patched._found(*call, **rest)
        try:
            out = _attention.quickly(*call, scale, enable_gqa)
            if out is not None:
                patched._answered += 1
                return out
            why = _foreign(query, key, value, attn_mask) or _reason(query, key, value, attn_mask)
            if not why:
                out = _attention.scaled_dot_product_attention(*call, **rest)
                patched._answered += 1
                return out
        except (TypeError, ValueError, NotImplementedError) as error:
            why = f"{type(error).__name__}: {error}"
        patched._count(why)
        return patched._found(*call, **rest)

    scaled_dot_product_attention.__doc__ = patched._found.__doc__
    return scaled_dot_product_attention


def _foreign(*tensors: Any) -> str:
    """Say what in torch must see its own operators, "" if nothing."""
    if not _attention.unobserved():
        return "a transform or mode is active"
    for x in tensors:
        if x is not None and type(x) not in _tensors.PLAIN:
            return f"type {type(x).__name__}"
    return ""


def _reason(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str:
    """Say what ours cannot do with the tensors, "" if nothing."""
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
    return ""
