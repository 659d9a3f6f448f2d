# SPDX-License-Identifier: Apache-2.0
"""Safetensors files with damage: what is read is what the bytes are, and all else a ValueError."""

import json
import tempfile
from pathlib import Path

import numpy as np

from fastattn.models import _safetensors
from tests.fuzz.compare import ml_dtypes
from tests.fuzz.problem import chance, choice, number
from tests.support.safetensors import checkpoint, file_of

KINDS = tuple(x for x in _safetensors.DTYPES if x != "BF16" or ml_dtypes)
NUMBERS = (-1, 0, 1, 3, 4, 2**31, 2**61, 2**62, 2**63, 2**64, 10**30, 1.0, 1e30, True, None, "4")
LIES = (*NUMBERS, *([x] for x in NUMBERS), [], [0, 2**62], [4, 0], [[]], {}, "F32", "BF16", "F8")
BYTES = tuple(b'{}[],:"0149\\u-.eE \0\xff\x80nt')


def draw(rng):
    """Draw which tensors there are, and what is wrong with their file."""
    names = [f"{choice(rng, ('a', 'b.weight', 'é'))}{i}" for i in range(rng.integers(4))]
    shape = (0, 1, 1, 2, 3)
    return {
        "data": number(rng),
        "tensors": [
            [name, choice(rng, KINDS), [choice(rng, shape) for _ in range(rng.integers(4))]]
            for name in names
        ],
        "lies": [
            [number(rng), choice(rng, ("dtype", "shape", "data_offsets", "")), choice(rng, LIES)]
            for _ in range(choice(rng, (0, 0, 0, 1, 2)))
        ],
        "edits": [
            [choice(rng, ("set", "insert", "delete", "cut")), number(rng), choice(rng, BYTES)]
            for _ in range(choice(rng, (0, 0, 1, 1, 1, 2, 5)))
        ],
        "early": chance(rng, 0.7),  # edits are in the header
    }


def check(spec):
    """Raise if anything but the tensors of the file comes out, or an error that is not promised."""
    rng, arrays = np.random.default_rng(spec["data"]), {}
    for name, kind, shape in spec["tensors"]:
        dtype = np.dtype(_safetensors.DTYPES[kind])
        bits = rng.integers(0, 2 if kind == "BOOL" else 256, int(np.prod(shape)) * dtype.itemsize)
        arrays[name] = kind, bits.astype(np.uint8).view(dtype).reshape(shape)
    text = checkpoint(arrays)
    length = int.from_bytes(text[:8], "little")
    header, data = json.loads(text[8 : 8 + length]), text[8 + length :]
    for which, key, lie in spec["lies"] if header else ():
        name = [*header][which % len(header)]
        if key and isinstance(header[name], dict):
            header[name][key] = lie
        elif not key:
            header[name] = lie
    edited = bytearray(file_of(header, data))
    for edit, where, byte in spec["edits"]:
        at = where % (1 + (min(len(edited), 8 + length) if spec["early"] else len(edited)))
        edited[at : {"insert": at, "cut": None}.get(edit, at + 1)] = (
            [byte] if edit in ("set", "insert") else []
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.safetensors")
        path.write_bytes(edited)
        tensors, refused = None, ""
        try:
            tensors = _safetensors.read(path).tensors
        except ValueError as error:
            refused = str(error)
        if tensors is None:
            assert refused.startswith(f"{path}: "), "the error does not name the file"
            assert len(refused) < 2000, "the error is long"
            assert spec["lies"] or spec["edits"], "a file that is right is refused"
            return
        end = len(edited)
        begin = 8 + int.from_bytes(edited[:8], "little")
        stored = json.loads(edited[8:begin])
        stored.pop("__metadata__", None)
        assert tensors.keys() == stored.keys(), "other tensors"
        for name, x in tensors.items():
            said = stored[name]
            first, last = said["data_offsets"]
            assert x.dtype == np.dtype(_safetensors.DTYPES[said["dtype"]]), "another dtype"
            assert [*x.shape] == said["shape"], "another shape"
            assert x.tobytes() == edited[begin + first : begin + last], "other bytes"
            assert not x.flags.writeable, "an array can be written"
            end -= x.nbytes
        assert end == begin, "bytes of none"
        if not spec["lies"] and not spec["edits"]:
            assert all(x.tobytes() == tensors[name].tobytes() for name, (_, x) in arrays.items())
