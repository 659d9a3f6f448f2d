# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's files say is checked before it is used: they may come from anywhere.

An error says which file and which key it is about, the rule, and what was found.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, BinaryIO, NamedTuple

from numpy.typing import NDArray

from fastattn._quantised import Quantised

LARGEST_FILE = 100_000_000  # bytes, but for tensors: what safetensors allow a header
MOST_ITEMS = 10_000_000  # of JSON: one of three bytes takes some hundred in memory
Tensor = NDArray[Any] | Quantised
Natural = Annotated[int, "or 0"]
Power = Annotated[float, "of any sign"]

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
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{place}: {error}", name=error.name) from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def needed(package: str) -> Any:
    """Return a package that the extra `models` brings."""
    try:
        return importlib.import_module(package)
    except ImportError:
        absent = f"it needs the package {package}: pip install 'fastattn[models]'"
        raise ModuleNotFoundError(absent, name=package) from None


def is_unicode(x: str) -> bool:
    """Tell whether a string has no half of a surrogate pair, as none in UTF-8 has."""
    try:
        x.encode()
    except UnicodeEncodeError:
        return False
    return True


KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {  # of a value: the rule, and its check
    int: ("an integer from 1 to 2**31 - 1", lambda x: type(x) is int and 0 < x < 2**31),
    Natural: ("an integer from 0 to 2**31 - 1", lambda x: type(x) is int and 0 <= x < 2**31),
    float: (
        "a number from 1e-30 to 1e30",
        lambda x: type(x) in (int, float) and 1e-30 <= x <= 1e30,
    ),
    Power: (
        "a number from -30 to 30",
        lambda x: type(x) in (int, float) and -30 <= x <= 30,
    ),
    bool: ("true or false", lambda x: type(x) is bool),
    str: ("a string in UTF-8", lambda x: type(x) is str and is_unicode(x)),
    dict: ("an object", lambda x: type(x) is dict),
    list: ("a list", lambda x: type(x) is list),
    NoneType: ("null", lambda x: x is None),
}


def check(key: str, found: Any, *kinds: Any) -> None:
    """Refuse a key's value that is of none of these kinds."""
    if not any(KINDS[kind][1](found) for kind in kinds):
        rule = " or ".join(KINDS[kind][0] for kind in kinds)
        raise ValueError(f"{key} must be {rule}, got {shown.repr(found)}")


def one_of(key: str, found: Any, names: Collection[str]) -> str:
    """Return a key's value, which must be one of these names."""
    if not isinstance(found, str) or found not in names:
        raise ValueError(f"{key} must be one of {', '.join(names)}, got {shown.repr(found)}")
    return found


def value(stated: Mapping[str, Any], key: str, kind: Any, *default: Any) -> Any:
    """Return a key's value, which must be of a kind; the default where there is none, or null."""
    if (found := stated.get(key)) is None:
        if default:
            return default[0]
        raise ValueError(f"{key} must be there, and is not")
    check(key, found, kind)
    return found


def content(path: Path) -> bytes:
    """Return the bytes of a file of a folder, which must not be large."""
    if not path.is_file():
        raise ValueError("the folder must hold this file, and does not")
    with path.open("rb") as file:
        return _bytes(file, os.fstat(file.fileno()).st_size)


def json_object(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object of a file, or what stands for it where there is none."""
    if absent is not None and not path.exists():
        return absent
    return _object(content(path))


def json_objects(path: Path) -> list[dict[str, Any]]:
    """Return the list of JSON objects of a file."""
    found = _json(content(path))
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise ValueError(f"it must hold a list of objects, got {shown.repr(found)}")
    return found


def json_header(file: BinaryIO, length: int) -> dict[str, Any]:
    """Return the JSON object that the next bytes of a file are."""
    return _object(_bytes(file, length))


def _bytes(file: BinaryIO, length: int) -> bytes:
    """Return the next bytes of a file, if they are not too many."""
    if length > LARGEST_FILE:
        raise ValueError(f"it must be at most {LARGEST_FILE} bytes, got {length}")
    return file.read(length)


def _object(text: bytes) -> dict[str, Any]:
    """Return the JSON object that a text is."""
    found = _json(text)
    if not isinstance(found, dict):
        raise ValueError(f"its JSON must be an object, got {shown.repr(found)}")
    return found


def _json(text: bytes) -> Any:
    """Return what JSON says, if it is not too much."""
    if (items := sum(map(text.count, (b"{", b"[", b",")))) > MOST_ITEMS:
        raise ValueError(f"its JSON must be at most {MOST_ITEMS} items, got {items}")
    try:
        return json.loads(text.decode(), object_pairs_hook=_distinct)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"it must hold JSON in UTF-8: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object, whose names must be distinct."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(x for x, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"names must be distinct, got {shown.repr(twice)}")
    return found
