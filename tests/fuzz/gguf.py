# SPDX-License-Identifier: Apache-2.0
"""The reader of GGUF files: a right file is what was written, a wrong one a ValueError."""

import math
import tempfile
from pathlib import Path

from fastattn._quantised import Quantised
from fastattn.models._gguf import read
from tests.fuzz.problem import chance, choice, generator, number
from tests.support.gguf import ARRAY, NUMBERS, STRING, U32, gguf, key, tensor

SIZES = {"F32": (1, 4), "F16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}
FLOAT16 = {"Q8_0": (1,), "Q4_0": (1,), "Q4_1": (1, 3)}  # the high bytes of those in a block
INTEGERS = (0, 1, 3, 8, 9, 31, 33, 2**31, 2**32 - 1, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 1)


def draw(rng):
    """Draw what a file holds, which of its bytes become others, and how many are cut off."""
    edits = [
        {
            "number": number(rng),
            "size": choice(rng, (1, 1, 4, 8)),
            "more": choice(rng, INTEGERS) if chance(rng, 0.6) else int(rng.integers(256)),
        }
        for _ in range(choice(rng, (0, 1, 1, 2, 3)))
    ]
    return {
        "data": number(rng),
        "keys": int(rng.integers(6)),
        "tensors": int(rng.integers(6)),
        "alignment": int(rng.integers(4)),
        "edits": edits,
        "cut": int(rng.integers(1, 200)) if chance(rng, 0.3) else 0,
    }


def value(rng, depth=0):
    """Return the type and the value of a key."""
    kind = choice(rng, (*NUMBERS, *(STRING, ARRAY) * 4))
    if kind == ARRAY and depth < 3:
        inner, x = value(rng, depth + 1)
        return ARRAY, (inner, [x] * int(rng.integers(4)))
    if kind in (STRING, ARRAY):
        return STRING, rng.bytes(rng.integers(9))
    return kind, int(rng.integers(2))


def plain(x):
    """Return a value, written or read, as numbers, bytes and lists."""
    if isinstance(x, str):
        return x.encode(errors="surrogateescape")
    items = x[1] if isinstance(x, tuple) else x if hasattr(x, "__iter__") else None
    return x if items is None or isinstance(x, bytes) else [plain(item) for item in items]


def check(spec):
    """Raise if a right file is read as another, or a damaged one is more than refused."""
    rng, alignment = generator(spec["data"], "gguf"), 8 << spec["alignment"] % 4
    values = {f"k{i}": value(rng) for i in range(spec["keys"])}
    values["general.alignment"] = U32, alignment
    described, data, stored = [], b"", {}
    for name in (f"t{i}" for i in range(spec["tensors"])):
        kind = choice(rng, [*SIZES])
        columns, size = SIZES[kind]
        *outer, last = (int(x) for x in rng.integers(1, 4, rng.integers(1, 5)))
        numbers = bytearray(rng.bytes(math.prod(outer) * last * size))
        for at in FLOAT16.get(kind, ()):  # without this bit of the exponent they are finite
            numbers[at::size] = bytes(x & 0xBF for x in numbers[at::size])
        stored[name] = (*outer, last * columns), bytes(numbers)
        described.append(tensor(name, kind, stored[name][0], len(data)))
        data += stored[name][1] + bytes(-len(stored[name][1]) % alignment)
    keys = [key(name, *x) for name, x in values.items()]
    content = bytearray(gguf(keys, described, data, alignment=alignment))
    for edit in spec["edits"]:
        at = edit["number"] % (len(content) - len(data))
        content[at : at + edit["size"]] = edit["more"].to_bytes(8, "little")[: edit["size"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(content[: max(len(content) - spec["cut"], 0)])
        try:
            metadata, tensors = read(path)
        except (ValueError, ImportError) as error:  # The latter, if a type became BF16.
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert spec["edits"] or spec["cut"], f"a right file is refused: {refusal}"
        named = tuple(f"{path}: {place}" for place in ("header: ", "key ", "tensor "))
        assert refusal.startswith(named), f"an error names no place: {refusal}"
        return
    found = {}
    for name, x in tensors.items():
        quantised = isinstance(x, Quantised)
        found[name] = x.shape, (x.blocks if quantised else x).tobytes()
        assert not quantised or x.dequantised().shape == x.shape
    if not spec["edits"]:
        assert found == stored, "tensors are not what was written"
        assert {k: plain(x) for k, x in metadata.items()} == {
            k: plain(x) for k, (_, x) in values.items()
        }, "metadata is not what was written"
