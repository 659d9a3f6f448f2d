#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the cells of the tutorial's pages, one after the other, in one namespace for each page.

    python docs/tutorial/cells.py docs/tutorial/*/*.md            # is what they print as it stands?
    python docs/tutorial/cells.py --update docs/tutorial/*/*.md   # write what they print

A cell is a block of ```python; what it prints stands in a block of ```text right behind it. The
exit status is 1 if a page says something else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

CELL = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


class Cell(NamedTuple):
    """A cell of a page: its code, and what the page says that it prints."""

    code: str
    output: str


def cells(text: str) -> list[Cell]:
    """Return the cells of a page."""
    return [Cell(found[1], found[2] or "") for found in CELL.finditer(text)]


def run(text: str, name: str) -> list[str]:
    """Return what each cell of a page prints."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for i, cell in enumerate(cells(text)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(cell.code, f"{name}, cell {i + 1}", "exec"), namespace)
        printed.append(out.getvalue())
    return printed


def updated(text: str, printed: list[str]) -> str:
    """Return a page that says what its cells print."""
    outputs = iter(printed)

    def block(found: re.Match[str]) -> str:
        output = next(outputs)
        return f"```python\n{found[1]}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return CELL.sub(block, text)


def main() -> int:
    """Run pages, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--update", action="store_true", help="write what the cells print")
    options = parser.parse_args()
    differ = []
    for path in options.pages:
        text = path.read_text()
        new = updated(text, run(text, str(path)))
        if new != text and options.update:
            path.write_text(new)
        elif new != text:
            differ.append(str(path))
    for name in differ:
        print(f"{name}: its cells print something else")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
