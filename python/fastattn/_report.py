# SPDX-License-Identifier: Apache-2.0
"""A dict whose str() is a report for a person: what `info` and `explain` return."""

from __future__ import annotations

from typing import Any

PREFIXES = ("", " K", " M", " G", " T", " P", " E")


class Report(dict[str, Any]):
    """A dict that prints as a title and a line per item; an item's name decides its unit."""

    def __init__(self, title: str, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.title = title

    def copy(self) -> Report:
        """Return a report of the same items."""
        return Report(self.title, self)

    def __str__(self) -> str:
        """Return the report."""
        shown = {name.removesuffix("_bytes"): _shown(name, value) for name, value in self.items()}
        width = max(map(len, shown))
        lines = [f"  {name.replace('_', ' '):{width}}  {text}" for name, text in shown.items()]
        return "\n".join((self.title, *lines))


def _shown(name: str, value: Any) -> str:
    if name == "skipped":
        return f"{value:.1%}"
    if name == "flops":
        return _scaled(value, 1000, "FLOP")
    if name.endswith("bytes"):
        return _scaled(value, 1024, "iB").replace(" iB", " B")
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def _scaled(value: float, base: int, unit: str) -> str:
    power = 0
    while value >= base and power + 1 < len(PREFIXES):
        value /= base
        power += 1
    return f"{value:.4g}{PREFIXES[power] or ' '}{unit}"
