# SPDX-License-Identifier: Apache-2.0
"""Long work says on stderr how far it is: on one line of a terminal, or in a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

PATIENCE = 1.0  # seconds before a line appears by itself
PAUSE = 0.1  # seconds between two lines: a terminal is slow
LINE_PAUSE = 10.0  # seconds between two lines that stay
Advance = Callable[[int], None]


@contextlib.contextmanager
def progress_line(
    what: str, total: int, shown: bool | None, *, stays: bool = False
) -> Iterator[Advance]:
    """Give the function that is told how much of the total is done; the line vanishes at the end.

    Where `shown` is None, it is shown if stderr is a terminal and the work takes long. With
    `stays`, what is no terminal gets lines that stay, but only of work that takes longer still.
    """
    begin = time.perf_counter()
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    stays = stays and not is_terminal
    pause = LINE_PAUSE if stays else PAUSE
    due = begin + (PATIENCE if shown is None else LINE_PAUSE if stays else 0)
    if shown is None:
        shown = is_terminal
    before, behind = ("", "\n") if stays else ("\r\x1b[K", "")
    done, written = 0, False

    def advance(more: int) -> None:
        nonlocal done, due, written
        done += more
        now = time.perf_counter()
        if shown and now >= due:
            left = (now - begin) * (total - done) / done
            line = f"{what}: {done / total:.0%}, {left:.0f} s left"
            sys.stderr.write(before + line + behind)
            sys.stderr.flush()
            due, written = now + pause, True

    try:
        yield advance
    finally:
        if written and not stays:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
