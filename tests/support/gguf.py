# SPDX-License-Identifier: Apache-2.0
"""Writes GGUF files, right ones and wrong ones."""

import struct

NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
TENSOR_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "BF16": 30}


def value(kind, x):
    """Return a value of metadata; an array is the type of its items and the items."""
    if kind == STRING:
        x = x.encode() if isinstance(x, str) else x
        return struct.pack("<Q", len(x)) + x
    if kind == ARRAY:
        return struct.pack("<IQ", x[0], len(x[1])) + b"".join(value(x[0], item) for item in x[1])
    return struct.pack("<" + NUMBERS[kind], x)


def key(name, kind, x):
    """Return a key with its value."""
    return value(STRING, name) + struct.pack("<I", kind) + value(kind, x)


def tensor(name, kind, shape, offset=0):
    """Return the description of a tensor of that type, a name or a number."""
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return value(STRING, name) + axes + struct.pack("<IQ", TENSOR_TYPES.get(kind, kind), offset)


def gguf(keys=(), tensors=(), data=b"", *, version=3, counts=None, alignment=32):
    """Return a file of keys, descriptions of tensors and their data."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count)
    head += b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment) + data


def keys(values):
    """Return keys of the types that Python's values have; an integer in a list is signed."""
    kinds = {bool: BOOL, int: U32, float: F32, str: STRING, bytes: STRING}
    found = []
    for name, x in values.items():
        if isinstance(x, list):
            kind = I32 if x and type(x[0]) is int else kinds[type(x[0])] if x else STRING
            found.append(key(name, ARRAY, (kind, x)))
        else:
            found.append(key(name, kinds[type(x)], x))
    return found


def file_of(values, tensors):
    """Return a file of metadata and of tensors: a type, a shape and bytes for each name."""
    described, data = [], b""
    for name, (kind, shape, stored) in tensors.items():
        described.append(tensor(name, kind, shape, len(data)))
        data += stored + bytes(-len(stored) % 32)
    return gguf(keys(values), described, data)
