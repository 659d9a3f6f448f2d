# SPDX-License-Identifier: Apache-2.0
"""Long work says on one line of stderr how far it is."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PATIENCE = 1.0  # seconds before a line appears by itself
PAUSE = 0.1  # seconds between two lines: a terminal is slow
Advance = Callable[[int], None]


@contextlib.contextmanager
def progress_line(what: str, total: int, shown: bool | None) -> Iterator[Advance]:
    """Give the function that is told how much of the total is done; the line vanishes at the end.

    Where `shown` is None, it is shown if stderr is a terminal and the work takes long.
    """
    begin = time.perf_counter()
    due = begin + (PATIENCE if shown is None else 0)
    if shown is None:
        shown = sys.stderr is not None and sys.stderr.isatty()
    done, written = 0, False

    def advance(more: int) -> None:
        nonlocal done, due, written
        done += more
        now = time.perf_counter()
        if shown and now >= due:
            left = (now - begin) * (total - done) / done
            sys.stderr.write(f"\r\x1b[K{what}: {done / total:.0%}, {left:.0f} s left")
            sys.stderr.flush()
            due, written = now + PAUSE, True

    try:
        yield advance
    finally:
        if written:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
