# SPDX-License-Identifier: Apache-2.0
"""Are kernels built once, and kept? The cache in memory and on disk."""

import json
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastattn.cuda import _cache
from tests.cuda.kernels import KNOWN, PACKAGE, Asked, small
from tests.support.child import run, start


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Return an empty directory, that the cache uses with nothing in memory."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    forget(monkeypatch)
    monkeypatch.setattr(_cache, "_directories_warned_of", set())
    return tmp_path / "deep" / "cache"


@pytest.fixture
def builds(monkeypatch):
    """Return the list of what is built, each in no time."""
    built = []

    def build(kernel, capability):
        built.append((kernel.name, capability))
        return KNOWN._replace(name=kernel.name, ptx="the PTX")

    monkeypatch.setattr(_cache, "build", build)
    return built


def forget(monkeypatch):
    monkeypatch.setattr(_cache, "_built", {})
    monkeypatch.setattr(_cache, "_at_hand", {})


@pytest.mark.promise("gpu-kernels-are-kept")
def test_a_kernel_is_built_once(cache, builds, monkeypatch):
    first = _cache.load(Asked(), (8, 0))
    assert _cache.load(Asked(), (8, 0)) is first
    forget(monkeypatch)  # as in another process
    assert _cache.load(Asked(), (8, 0)) == first._replace(ptx=None)
    assert builds == [("asked", (8, 0))]
    assert [x.suffix for x in cache.iterdir()] == [".cubin"]
    _cache.load(Asked(), (8, 9))
    assert builds == [("asked", (8, 0)), ("asked", (8, 9))]


def test_many_threads_build_once(cache, builds, monkeypatch):
    built = _cache.build
    monkeypatch.setattr(_cache, "build", lambda *x: (threading.Event().wait(0.05), built(*x))[1])
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: _cache.load(Asked(), (8, 0)), range(8)))
    assert all(x is loaded[0] for x in loaded)
    assert len(builds) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "other"},
        {"signature": ("int64", "float32")},
        {"threads": 128},
        {"shared_bytes": 16},
        {"blocks_per_sm": 2},
        {"tensor_maps": (0,)},
        {"needs": (8, 0)},
    ],
)
def test_every_field_of_a_kernel_is_in_the_key(fields):
    assert _cache.key(Asked(**fields), (8, 0)) != _cache.key(Asked(), (8, 0))
    assert _cache.key(Asked(), (8, 0)) == _cache.key(Asked(), (8, 0))


def test_sources_and_versions_are_in_the_key(monkeypatch, tmp_path):
    before = _cache.key(Asked(), (8, 0))
    copy = tmp_path / "cuda"
    (copy / "kernels").mkdir(parents=True)
    for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("kernels/*.py")):
        (copy / path.relative_to(PACKAGE)).write_text(path.read_text())
    (tmp_path / "_arguments.py").write_text((PACKAGE.parent / "_arguments.py").read_text())
    monkeypatch.setattr(_cache, "__file__", str(copy / "_cache.py"))

    def key():
        _cache._sources.cache_clear()
        return _cache.key(Asked(), (8, 0))

    assert key() == before
    seen = {before}
    for name in (
        "kernels/__init__.py",
        "kernels/mma.py",
        "ptx.py",
        "_build.py",
        "../_arguments.py",
    ):
        with (copy / name).open("a") as file:
            file.write("# changed\n")
        seen.add(key())
    assert len(seen) == 6
    (copy / "_driver.py").write_text("")  # decides nothing about the code
    assert key() in seen
    _cache._sources.cache_clear()
    for package in (*_cache.PACKAGES, "python", "ptxas"):
        changed = _cache._versions() | {package: "another"}
        with monkeypatch.context() as patch:
            patch.setattr(_cache, "_versions", lambda changed=changed: changed)
            seen.add(_cache.key(Asked(), (8, 0)))
    assert len(seen) == 6 + len(_cache.PACKAGES) + 2


def test_versions_of_packages_that_are_not_there(monkeypatch):
    monkeypatch.setattr(_cache, "PACKAGES", ("numpy", "no-such-package-at-all"))
    monkeypatch.setattr(_cache, "assemblers", lambda: [sys.executable])
    _cache._versions.cache_clear()
    try:
        size = Path(sys.executable).stat().st_size
        versions = _cache._versions()
        assert versions.pop("python") == "{}.{}".format(*sys.version_info)
        assert versions.pop("ptxas")[0][:2] == (sys.executable, size)
        assert versions == {"numpy": np.__version__, "no-such-package-at-all": ""}
    finally:
        _cache._versions.cache_clear()


@pytest.mark.promise("gpu-kernels-are-kept")
@pytest.mark.parametrize("length", [0, 10, 55, 56, 300, -1])
def test_a_truncated_file_is_built_again(cache, builds, monkeypatch, length):
    _cache.load(Asked(), (8, 0))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    forget(monkeypatch)
    assert _cache.load(Asked(), (8, 0)).cubin == KNOWN.cubin
    assert len(builds) == 2
    assert path.read_bytes() == whole


@pytest.mark.promise("gpu-kernels-are-kept")
def test_a_file_with_any_byte_changed_is_not_read(tmp_path):
    path = tmp_path / "known.cubin"
    _cache.write(path, KNOWN)
    whole = path.read_bytes()
    assert _cache.read(path) == KNOWN
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert _cache.read(path) is None, position
    path.write_bytes(whole + b"x")
    assert _cache.read(path) is None


def test_a_file_of_other_fields_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "known.cubin"
    fields = KNOWN._asdict() | {"new": 1}

    class Other:
        _asdict = staticmethod(lambda: dict(fields))

    _cache.write(path, Other())
    assert _cache.read(path) is None


def test_a_damaged_file_that_cannot_be_replaced(cache, builds, monkeypatch):
    """The kernel is built; the next process tries again."""
    _cache.load(Asked(), (8, 0))
    (path,) = cache.iterdir()
    path.write_bytes(b"")
    forget(monkeypatch)

    def refused(*_, **__):
        raise PermissionError("Read-only file system")

    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(_cache.tempfile, "mkstemp", refused)
    with pytest.warns(RuntimeWarning, match="compiles its kernels in every process"):
        assert _cache.load(Asked(), (8, 0)).cubin == KNOWN.cubin


def test_a_directory_that_cannot_be_written_costs_one_warning(builds, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(blocked))
    forget(monkeypatch)
    monkeypatch.setattr(_cache, "_directories_warned_of", set())
    with pytest.warns(RuntimeWarning, match="compiles its kernels in every process") as warned:
        _cache.load(Asked(), (8, 0))
    assert len(warned) == 1
    assert str(warned[0].message).endswith(
        "set FASTATTN_CACHE_DIR to a directory of yours, or to nothing for no cache"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _cache.load(Asked(), (8, 9))
    assert builds == [("asked", (8, 0)), ("asked", (8, 9))]


def test_a_failed_write_leaves_nothing(cache, builds, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(_cache.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        _cache.load(Asked(), (8, 0))
    assert list(cache.iterdir()) == []


def test_an_empty_variable_means_no_files(builds, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    for _ in range(2):
        _cache.load(Asked(), (8, 0))
    assert len(builds) == 1
    assert list(tmp_path.iterdir()) == []


def test_where_files_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _cache.directory() == tmp_path / "own"
    monkeypatch.delenv("FASTATTN_CACHE_DIR")
    assert _cache.directory() == tmp_path / "cache" / "fastattn"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert _cache.directory() == tmp_path / "home" / ".cache" / "fastattn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _cache.directory() == tmp_path / "home" / ".cache" / "fastattn"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert _cache.directory() is None


def write_and_read(path, rounds):
    """Write a file over and over, and count what was read that was not whole."""
    path = Path(path)
    broken = 0
    for i in range(rounds):
        code = bytes([i % 256]) * (50_000 + i)
        _cache.write(path, KNOWN._replace(cubin=code))
        broken += _cache.read(path) is None
    return broken


def test_processes_may_write_one_file_at_once(tmp_path):
    path = tmp_path / "known.cubin"
    processes = [start(write_and_read, str(path), 200) for _ in range(4)]
    for process in processes:
        stdout, stderr = process.communicate(timeout=100)
        assert (process.returncode, stdout) == (0, "0\n"), stderr
    assert _cache.read(path) is not None
    assert list(tmp_path.iterdir()) == [path]


def load_small():
    """Load a kernel by way of the cache."""
    binary = _cache.load(small(), (8, 0))
    return [len(binary.cubin), binary.registers]


def test_processes_may_build_one_kernel_at_once(numba_cuda, tmp_path):
    env = {"FASTATTN_CACHE_DIR": str(tmp_path)}
    processes = [start(load_small, env=env) for _ in range(4)]
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        results.append(json.loads(stdout))
    (path,) = tmp_path.iterdir()
    binary = _cache.read(path)
    assert results == [[len(binary.cubin), binary.registers]] * 4


def read_without_numba(path):
    """Read a file where neither Numba nor NVIDIA's libraries are."""
    for name in ("numba", "llvmlite", "cuda", "numba_cuda"):
        sys.modules[name] = None
    binary = _cache.read(Path(path))
    return [binary.name, binary.threads, binary.shared_bytes, *binary.parameters]


def test_a_file_can_be_launched_without_numba(tmp_path):
    path = tmp_path / "known.cubin"
    _cache.write(path, KNOWN)
    assert run(read_without_numba, str(path)) == [
        "known",
        128,
        70_000,
        "int64",
        "tensor_map",
        "float32",
    ]
