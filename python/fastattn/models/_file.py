# SPDX-License-Identifier: Apache-2.0
"""What a reader returns of a checkpoint's file, and how an error says which file it is about."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from fastattn.models._quantised import Quantised

Tensor = NDArray[Any] | Quantised

shown = reprlib.Repr()  # An error shows the beginning of what was found.
shown.maxlevel, shown.maxstring = 2, 200


class File(NamedTuple):
    """What a file holds: what it says of itself, and tensors, which are views of it, by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@contextlib.contextmanager
def within(place: object) -> Iterator[None]:
    """Let an error say where it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
