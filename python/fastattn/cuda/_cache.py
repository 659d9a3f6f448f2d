# SPDX-License-Identifier: Apache-2.0
"""Was this kernel built before? Machine code in memory and on disk, so that Numba compiles it once.

Called by `_launch.py` for every kernel that is launched; calls `_build.py` for what is not there.
Files lie in FASTATTN_CACHE_DIR (empty: no files), else in the user's cache directory. A file is
named by a hash of all that the code depends on, written whole or not at all, checked when it is
read, and holds what launching takes: `read` needs no Numba.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import struct
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.cuda._build import Binary, Capability, assemblers, build

if TYPE_CHECKING:
    from fastattn.cuda.kernels import Kernel

VARIABLE = "FASTATTN_CACHE_DIR"
MAGIC = b"fastattn"
HEADER = struct.Struct("<8sQQ32s")  # MAGIC, bytes of description and of code, SHA-256 of both
PACKAGES = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm")

_built: dict[tuple[Kernel, Capability], Binary] = {}
# The same by a kernel's id, for its hash takes long; the kernel is kept, so the id stays its own.
_at_hand: dict[tuple[int, Capability], tuple[Kernel, Binary]] = {}
_lock = threading.Lock()
_directories_warned_of: set[Path] = set()


def load(kernel: Kernel, capability: Capability) -> Binary:
    """Return a kernel's machine code for a compute capability, from where it is found first."""
    known = _at_hand.get((id(kernel), capability))
    if known is not None:
        return known[1]
    with _lock:
        binary = _built.get((kernel, capability))
        if binary is None:
            binary = _built[kernel, capability] = _from_disk_or_built(kernel, capability)
        _at_hand[id(kernel), capability] = kernel, binary
    return binary


def directory() -> Path | None:
    """Return where files are kept; None if nowhere."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is to be ignored, its specification says.
    if Path(base).is_absolute():
        return Path(base) / "fastattn"
    with contextlib.suppress(RuntimeError):  # no home
        return Path.home() / ".cache" / "fastattn"
    return None


def key(kernel: Kernel, capability: Capability) -> str:
    """Return the name of all that decides a kernel's machine code."""
    described = (
        kernel.name,
        [str(kind) for kind in kernel.signature],
        kernel.threads,
        kernel.shared_bytes,
        kernel.blocks_per_sm,
        kernel.tensor_maps,
        kernel.needs,
        capability,
        _sources(),
        _versions(),
    )
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def write(path: Path, binary: Binary) -> None:
    """Write a file that appears whole, whoever writes or reads it at the same time."""
    fields = binary._asdict()
    code = fields.pop("cubin")
    del fields["ptx"]
    description = json.dumps(fields).encode()
    digest = hashlib.sha256(description + code).digest()
    header = HEADER.pack(MAGIC, len(description), len(code), digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header + description + code)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def read(path: Path) -> Binary | None:
    """Return what `write` wrote; None if that is not what the file holds."""
    data = path.read_bytes()
    if len(data) < HEADER.size:
        return None
    magic, described, coded, digest = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    if magic != MAGIC or len(body) != described + coded or hashlib.sha256(body).digest() != digest:
        return None
    fields = json.loads(body[:described])
    if fields.keys() != set(Binary._fields) - {"cubin", "ptx"}:
        return None
    fields["parameters"] = tuple(fields["parameters"])
    return Binary(cubin=body[described:], **fields)


def _from_disk_or_built(kernel: Kernel, capability: Capability) -> Binary:
    place = directory()
    if place is None:
        return build(kernel, capability)
    path = place / f"{key(kernel, capability)}.cubin"
    try:
        found = read(path)
        if found is not None:
            return found
        path.unlink()  # damaged
    except OSError:  # most often: not there yet
        pass
    binary = build(kernel, capability)
    try:
        write(path, binary)
    except OSError as error:
        if place not in _directories_warned_of:
            _directories_warned_of.add(place)
            warnings.warn(
                f"fastattn.cuda compiles its kernels in every process, for it cannot write to its "
                f"cache: {error}; set {VARIABLE} to a directory of yours, or to nothing for no "
                "cache",
                RuntimeWarning,
                stacklevel=2,
            )
    return binary


@functools.cache
def _sources() -> str:
    """Return a hash of every file that can change the code."""
    here = Path(__file__).parent
    files = [*here.glob("kernels/*.py"), *here.glob("ptx*.py"), here / "_build.py"]
    files.append(here.parent / "_arguments.py")  # whose limits the kernels clamp to
    sources = [(x.relative_to(here.parent).as_posix(), x.read_text()) for x in sorted(files)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


@functools.cache
def _versions() -> dict[str, Any]:
    """Return the versions of all that compiles; "" for a package that is not there."""
    versions: dict[str, Any] = {"python": "{}.{}".format(*sys.version_info)}
    with contextlib.suppress(ImportError):  # without cuda-pathfinder, nothing is compiled either
        known = [(path, Path(path).stat()) for path in assemblers()]
        versions["ptxas"] = [(path, x.st_size, x.st_mtime_ns) for path, x in known]
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return versions
