# SPDX-License-Identifier: Apache-2.0
"""A call that was made before, with arrays of the same layout: its launches, without questions.

A `Tape` notes what the first such call does: which memory it takes, which kernels it launches, and
where the addresses of its arrays stand among their arguments. `Tape.play` does the same
with other addresses, in a tenth of the time of the checks and views. Called by `_attention.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from fastattn.cuda import _arrays, _driver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastattn.cuda._arrays import DeviceArray

MOST = 1024  # layouts that are remembered


class Address(int):
    """An address that knows which of a call's arrays it is in, and how far from its beginning."""

    number: int
    offset: int

    def __new__(cls, value: int, number: int, offset: int = 0) -> Self:
        """Return the address of array `number`, or one at so many bytes from it."""
        address = super().__new__(cls, value)
        address.number, address.offset = number, offset
        return address

    def __add__(self, step: int) -> Address:
        """Return an address in the same array."""
        return Address(int(self) + step, self.number, self.offset + step)


class MapOf(NamedTuple):
    """What a tensor map is made of."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    dtype: str
    device: Any


class Launch(NamedTuple):
    """A launch, but for the addresses."""

    function: Any
    blocks: int
    arguments: tuple[Any, ...]
    addresses: tuple[tuple[int, int, int], ...]  # which argument, of which array, how far in it
    maps: tuple[tuple[int, int, int, MapOf], ...]


class Tape:
    """What a call did."""

    def __init__(self) -> None:
        self.arrays = 0  # so far: those given, then those made
        self.results: list[tuple[tuple[int, ...], str, bool]] = []
        self.launches: list[Launch] = []

    def given(self, array: DeviceArray) -> DeviceArray:
        """Return an array that the call was given, with an address that is known again."""
        self.arrays += 1
        return array._replace(pointer=Address(array.pointer, self.arrays - 1))

    def taken(self, array: DeviceArray, is_result: bool) -> DeviceArray:
        """Note memory that was taken for a result, or on the way to one; return it likewise."""
        self.results.append((array.shape, array.dtype, is_result))
        return self.given(array)

    def launch(self, function: Any, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Note a launch."""
        addresses = [
            (i, x.number, x.offset) for i, x in enumerate(arguments) if isinstance(x, Address)
        ]
        maps = []
        for i, x in enumerate(arguments):
            if isinstance(x, MapOf):
                assert isinstance(x.address, Address)
                maps.append((i, x.address.number, x.address.offset, x))
        self.launches.append(Launch(function, blocks, arguments, tuple(addresses), tuple(maps)))

    def play(self, inputs: Sequence[DeviceArray], stream: int) -> list[DeviceArray]:
        """Launch the same for other arrays; return the memory that was taken for it."""
        query = inputs[0]
        results = [
            _arrays.empty(query, shape, dtype, stream, is_result)
            for shape, dtype, is_result in self.results
        ]
        pointers = [x.pointer for x in (*inputs, *results)]
        for function, blocks, arguments, addresses, maps in self.launches:
            given = list(arguments)
            for i, number, offset in addresses:
                given[i] = pointers[number] + offset
            for i, number, offset, made_of in maps:
                given[i] = _driver.tensor_map(pointers[number] + offset, *made_of[1:])
            function.launch((blocks,), stream, tuple(given))
        return results


tapes: dict[Any, Tape] = {}


def remember(layout: Any, tape: Tape) -> None:
    """Keep a tape for calls with the same layout."""
    if len(tapes) >= MOST:
        tapes.clear()
    tapes[layout] = tape
