# SPDX-License-Identifier: Apache-2.0
"""Which tensors does a safetensors checkpoint hold? Arrays over its files, which are mapped.

A file is the length of its header in 8 bytes, the header, and the bytes of the tensors, one behind
the other. The header is JSON, and says of each tensor its dtype, its shape and where its bytes are.
A checkpoint of several files, its shards, has an index, which says where each tensor is. All that
they say is checked before an array is made of it, since a file may come from anywhere.
"""

import math
import mmap
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fastattn.models._file import (
    File,
    Tensor,
    json_header,
    json_object,
    needed,
    one_of,
    shown,
    value,
    within,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MOST_AXES = 32  # of an array of NumPy 1
DTYPES = {
    **{"F32": "<f4", "F16": "<f2", "BF16": "bfloat16", "F64": "<f8", "BOOL": "?"},
    **{"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"},
    **{"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"},
}


def read(path: str | os.PathLike[str]) -> File:
    """Return the tensors of a checkpoint.

    Parameters
    ----------
    path : path
        A file, or a folder with `WEIGHTS`, or without it and with `INDEX` and the shards that it
        names. They must not change while an array is in use, which reads them when it is read.

    Returns
    -------
    File
        Its metadata are str; its tensors are arrays, read-only and not always aligned.

    Raises
    ------
    ValueError
        A file is damaged, or is not of the format, or has a dtype that is not in `DTYPES`.
    ModuleNotFoundError
        A tensor is BF16, and ml_dtypes is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    files = {x.name for x in path.iterdir() if x.is_file()}
    if WEIGHTS in files:
        return _read_file(path / WEIGHTS)
    if INDEX in files:
        return _read_shards(path, files)
    pickles = sorted(x for x in files if x.endswith(PICKLES))
    why = f": {pickles[0]} is a pickle, which may run any code, and is not read" if pickles else ""
    raise ValueError(f"{path}: the folder must hold {WEIGHTS} or {INDEX}{why}")


def _read_shards(folder: Path, files: set[str]) -> File:
    """Return the tensors of a folder with an index, which may name some of the folder's files."""
    arrays: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    with within(folder / INDEX):
        shard_of = value(json_object(folder / INDEX), "weight_map", dict)
        for name, shard in shard_of.items():
            if not isinstance(shard, str) or shard not in files:
                _refuse(f"{_tensor(name)}: its shard must be a file in the folder", shard)
        for shard in dict.fromkeys(shard_of.values()):
            found = _read_file(folder / shard)
            for name in found.tensors:
                if shard_of.setdefault(name, shard) != shard:
                    _refuse(f"{_tensor(name)}: it must be in {shard_of[name]} alone", shard)
            arrays |= found.tensors
            metadata |= found.metadata
        for name in sorted(shard_of.keys() - arrays.keys()):
            raise ValueError(f"{_tensor(name)}: it must be in {shard_of[name]}, and is not")
    return File(MappingProxyType(metadata), MappingProxyType(arrays))


def _read_file(path: Path) -> File:
    """Return the tensors of one file."""
    with within(path):
        if path.exists() and not path.is_file():
            raise ValueError("it must be a file or a folder")
        with path.open("rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if (room := size - 8 - length) < 0:
                rule = f"must be the length of a header that ends within its {size} bytes"
                _refuse(f"its first 8 bytes {rule}", length)
            header = json_header(file, length)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
            _refuse("__metadata__ must be an object of strings", metadata)
        arrays: dict[str, Tensor] = {}
        places, end = [], 0
        for name, entry in header.items():
            with within(_tensor(name)):
                arrays[name], place = _array(entry, mapped, room)
            places.append((place, name))
        for place, name in sorted(places):
            if place[0] != end:
                rule = f"data_offsets must begin at {end}, where the tensor before it ends"
                _refuse(f"{_tensor(name)}: {rule}", place)
            end = place[1]
        if end != room:
            _refuse(f"its tensors must be all {room} bytes behind the header", end)
    return File(MappingProxyType(metadata), MappingProxyType(arrays))


def _array(entry: Any, mapped: mmap.mmap, room: int) -> tuple[NDArray[Any], list[int]]:
    """Return the array of an entry of the header, and its place in the file's last `room` bytes."""
    if not isinstance(entry, dict):
        _refuse("it must be an object", entry)
    kind, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (kind := one_of("dtype", kind, DTYPES)) == "BF16":
        needed("ml_dtypes")  # which gives NumPy the dtype
    dtype = np.dtype(DTYPES[kind])
    largest = 2**63 // dtype.itemsize
    if not _are_sizes(shape, MOST_AXES) or math.prod(n or 1 for n in shape) >= largest:
        _refuse(f"shape must be at most {MOST_AXES} integers >= 0, of less than 2**63 bytes", shape)
    if not _are_sizes(place, 2) or len(place) < 2 or not place[0] <= place[1] <= room:
        _refuse(f"data_offsets must be two integers, 0 <= begin <= end <= {room}", place)
    size = math.prod(shape) * dtype.itemsize
    if place[1] - place[0] != size:
        _refuse(f"data_offsets must be {size} bytes apart for {kind} of shape {shape}", place)
    array: NDArray[Any] = np.ndarray(shape, dtype, mapped, len(mapped) - room + place[0])
    # NumPy counts by their bytes, and would write out of bounds.
    if kind == "BOOL" and (most := int(array.view(np.uint8).max(initial=0))) > 1:
        _refuse("the bytes of BOOL must be 0 or 1", most)
    return array, place


def _are_sizes(x: Any, most: int) -> TypeGuard[list[int]]:
    """Tell whether x is a list of so many integers, or fewer, and none is negative."""
    return isinstance(x, list) and len(x) <= most and all(type(n) is int and n >= 0 for n in x)


def _tensor(name: str) -> str:
    """Return what an error calls the tensor of that name."""
    return f"tensor {shown.repr(name)}"


def _refuse(rule: str, found: Any) -> NoReturn:
    """Raise the error that says which rule is broken, and what is there."""
    raise ValueError(f"{rule}, got {shown.repr(found)}")
