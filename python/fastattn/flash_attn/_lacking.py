# SPDX-License-Identifier: Apache-2.0
"""Names of flash_attn that are here so that they can be imported, and that say what they lack."""

from __future__ import annotations

from typing import Any


def lacking(module: str, name: str, why: str) -> Any:
    """Return a class or a function, as flash_attn has it, that raises NotImplementedError.

    Names of classes begin with a capital, so that one can be subclassed or asked by isinstance.
    """

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"{module}.{name} is not in fastattn.flash_attn: {why}")

    about = {"__doc__": f"Not here: {why}.", "__module__": module}
    if name.lstrip("_")[:1].isupper():
        return type(name, (), {"__init__": refuse, "apply": staticmethod(refuse), **about})
    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__, refuse.__module__ = about["__doc__"], module
    return refuse
