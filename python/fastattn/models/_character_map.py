# SPDX-License-Identifier: Apache-2.0
"""What does SentencePiece make of a text before it cuts it? Other characters, by a table.

The table is the length of a trie in 4 bytes, the trie, and texts, each with a byte 0 behind it. The
trie is a double array: Aoe 1989, https://doi.org/10.1109/32.31365. From the unit of a node, the
byte that comes next leads to the unit at the node's offset, exclusive or with the byte, if that is
labelled with it. Where a text ends, the unit at the offset alone says what it becomes.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from fastattn.models._file import shown

LONGEST = (
    1000  # bytes that are replaced together, and by which: a wrong table could make texts huge
)


class CharacterMap:
    """A function of texts, which replaces what it knows, the longest there is, from left to right.

    Parameters
    ----------
    table : bytes
        Nothing is replaced where it is empty.
    kept : collection of str
        What is never replaced.
    """

    def __init__(self, table: bytes, kept: Collection[str] = ()) -> None:
        size = int.from_bytes(table[:4], "little")
        if table and (len(table) < 4 + size or size < 4 or size % 4):
            rule = f"a multiple of 4 that fits into its {len(table)} bytes"
            raise ValueError(f"the trie of its characters must be {rule}, got {size}")
        self._units, self._texts = memoryview(table[4 : 4 + size]).cast("I"), table[4 + size :]
        if re.search(rb"[^\0]{%d}" % (LONGEST + 1), self._texts):
            raise ValueError(f"characters must become at most {LONGEST} bytes, and become more")
        self._kept = sorted((x.encode() for x in kept), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return a text with its characters replaced."""
        if not self._units:
            return text
        data, found, place = text.encode(), bytearray(), 0
        while place < len(data):
            length, new = self._at(data, place)
            found += new
            place += length
        try:
            return found.decode()
        except UnicodeDecodeError:
            rule = "characters must become whole ones"
            raise ValueError(f"{rule}, got {shown.repr(bytes(found))}") from None

    def _at(self, data: bytes, place: int) -> tuple[int, bytes]:
        """Return how many bytes are replaced at a place, and by which."""
        for kept in self._kept:
            if data.startswith(kept, place):
                return len(kept), kept
        units = self._units
        node, end, value = _offset(units[0]), place, -1
        for i in range(place, len(data)):
            node ^= data[i]
            if node >= len(units) or units[node] & 0x800000FF != data[i]:
                break
            if i == place + LONGEST:
                raise ValueError(f"characters that become others must be at most {LONGEST} bytes")
            is_end, node = units[node] & 0x100, node ^ _offset(units[node])
            if is_end and node < len(units):
                end, value = i + 1, units[node] & 0x7FFFFFFF
        if value < 0:  # It is not known: a whole character stays.
            lead = data[place]
            length = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
            return length, data[place : place + length]
        return end - place, self._texts[value : max(self._texts.find(b"\0", value), value)]


def _offset(unit: int) -> int:
    """Return the offset of a unit."""
    return unit >> 10 << (unit >> 6 & 8)
