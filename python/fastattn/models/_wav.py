# SPDX-License-Identifier: Apache-2.0
"""Which sound does a WAV file hold? Numbers between -1 and 1.

A file is chunks, each with a name and a size: "fmt " says what the numbers are, "data" has them.
All that they say is checked before it is used, since a file may come from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.models._file import within
from fastattn.nn import Floats

LARGEST, LONGEST = 2**30, 2**28  # bytes of a file, and its numbers, which take 4 bytes each
UNKNOWN = 2**31 - 2**16  # From this size on, whoever wrote to a pipe did not know it.
INTEGERS, FLOATS, EXTENSIBLE = 1, 3, 0xFFFE  # formats; the last says the real one further behind
NEEDED = {b"fmt ": 16, b"data": 0}  # chunks, and how many bytes they have at least
KINDS = {  # of numbers: the format and the bits, and what NumPy calls them
    **{(INTEGERS, 8): "u1", (INTEGERS, 16): "<i2", (INTEGERS, 24): "u1", (INTEGERS, 32): "<i4"},
    **{(FLOATS, 32): "<f4", (FLOATS, 64): "<f8"},
}


class Sound(NamedTuple):
    """What a file holds: samples of all channels together, and how many there are in a second."""

    samples: Floats
    rate: int


def read(path: str | os.PathLike[str]) -> Sound:
    """Return the sound of a WAV file; of several channels, their mean.

    Parameters
    ----------
    path : path
        Its numbers are integers of 8, 16, 24 or 32 bits, or floats of 32 or 64 bits.

    Returns
    -------
    Sound

    Raises
    ------
    ValueError
        The file is damaged or cut off, or has other numbers.
    """
    with within(path), Path(path).open("rb") as file:
        return of_file(file)


def of_file(file: BinaryIO) -> Sound:
    """Return the sound of an open file, which may be a pipe without an end."""
    if len(data := file.read(LARGEST + 1)) > LARGEST:
        raise ValueError(f"it must be at most {LARGEST} bytes, got more")
    return of_bytes(data)


def of_bytes(data: bytes) -> Sound:
    """Return the sound of a file's bytes."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError(f"it must begin as a WAV file, RIFF....WAVE, got {data[:12]!r}")
    chunks: dict[bytes, memoryview] = {}
    for name, chunk in _chunks(memoryview(data)):
        if name in NEEDED:
            chunks.setdefault(name, chunk)
        if len(chunks) == len(NEEDED):
            break
    for name, least in NEEDED.items():
        if name not in chunks or len(chunks[name]) < least:
            got = f"one of {len(chunks[name])}" if name in chunks else "none"
            raise ValueError(f"it must have a chunk {name!r} of at least {least} bytes, got {got}")
    kind, channels, bits = (
        int.from_bytes(chunks[b"fmt "][i : i + 2], "little") for i in (0, 2, 14)
    )
    rate = int.from_bytes(chunks[b"fmt "][4:8], "little")
    if kind == EXTENSIBLE:
        kind = int.from_bytes(chunks[b"fmt "][24:26], "little")
    if (kind, bits) not in KINDS:
        rule = "its numbers must be integers (1) of 8 to 32 bits or floats (3) of 32 or 64"
        raise ValueError(f"{rule}, got format {kind} of {bits} bits")
    if not channels or not rate:
        raise ValueError(f"channels and rate must be above 0, got {channels} and {rate}")
    sound = chunks[b"data"]
    if rest := len(sound) % (width := channels * bits // 8):
        raise ValueError(f"its sound must be whole samples of {width} bytes, got {rest} left over")
    if (count := len(sound) * 8 // bits) > LONGEST:
        raise ValueError(f"its sound must be at most {LONGEST} numbers, got {count}")
    samples = _numbers(sound, kind, bits)
    if channels > 1:
        with np.errstate(invalid="ignore", over="ignore"):  # of infinite and of huge numbers
            samples = samples.reshape(-1, channels).mean(axis=1)
    return Sound(samples, rate)


def _chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the name and the bytes of each chunk; a file may end behind the sound."""
    at = 12
    while at + 8 <= len(data):
        name, size = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if name == b"data" and size >= UNKNOWN:
            size = len(data) - at
        if size > len(data) - at:
            rule = f"chunk {name!r} must end within the {len(data)} bytes of the file"
            raise ValueError(f"{rule}, got {at + size}: it is cut off")
        yield name, data[at : at + size]
        at += size + size % 2


def _numbers(data: memoryview, kind: int, bits: int) -> Floats:
    """Return numbers between -1 and 1."""
    found: NDArray[Any] = np.frombuffer(data, KINDS[kind, bits])
    if kind == FLOATS:
        with np.errstate(over="ignore"):  # What is too large becomes infinite.
            return found.astype(np.float32)
    if bits == 8:  # from 0 on, where the others are around 0
        found = found.astype(np.int16) - 128
    if bits == 24:  # the upper three bytes of an integer of four
        wide = np.zeros((len(found) // 3, 4), np.uint8)
        wide[:, 1:] = found.reshape(-1, 3)
        found, bits = wide.reshape(-1).view("<i4"), 32
    numbers: Floats = np.divide(found, 2.0 ** (bits - 1), dtype=np.float32)
    return numbers
