# SPDX-License-Identifier: Apache-2.0
"""What was built and how it loads: symbols, OpenMP runtimes, variants, import cost, versions, README."""

import doctest
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from child import command, environment, run

ROOT = Path(__file__).parent.parent
X86 = platform.machine() == "x86_64"


def output_of(*arguments):
    """Return what a program prints; skip if it is not installed."""
    if shutil.which(arguments[0]) is None:
        pytest.skip(f"{arguments[0]} is not installed")
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def built_module():
    from fastattn import _core

    return _core.__file__


# The kernel objects, by variant. An inline function in one of them would be shared with the rest of the
# module, and a CPU that lacks the variant's instructions would run it.


def kernel_objects():
    objects = sorted(ROOT.glob("build/*/CMakeFiles/kernel_*.dir/**/*.o"))
    return [pytest.param(path, id="/".join(path.parts[-4:-2])) for path in objects] or [
        pytest.param(None, marks=pytest.mark.skip(reason="no build tree beside the tests"))
    ]


@pytest.mark.parametrize("path", kernel_objects())
def test_kernel_objects_export_their_table_alone(path):
    symbols = [line.split() for line in output_of("nm", "--defined-only", path).splitlines()]
    variant = next(part for part in path.parts if part.startswith("kernel_")).removesuffix(".dir")
    exported = [(kind, name) for _, kind, name in symbols if kind.isupper() or kind in "vwu"]
    assert len(exported) == 1, exported
    kind, name = exported[0]
    assert kind in "DR"  # data; the dynamic linker may have to fill in addresses
    assert variant in name
    assert not [name for _, _, name in symbols if "_GLOBAL__sub_I_" in name]  # runs at load
    undefined = output_of("nm", "--undefined-only", path).split()[1::2]
    allowed = {"_GLOBAL_OFFSET_TABLE_", "memcpy", "memset", "memmove", "__stack_chk_fail"}
    assert set(undefined) <= allowed


def test_symbol_versions():
    needed = set(re.findall(r"\b(G?OMP)_([0-9.]+)", output_of("readelf", "-V", built_module())))
    assert needed
    for name, version in needed:
        newest = tuple(int(part) for part in version.split("."))
        assert newest <= (4, 5), f"{name}_{version}: older OpenMP runtimes lack it"


def test_exported_symbols():
    lines = output_of("nm", "-D", "--defined-only", built_module()).splitlines()
    assert [line.split()[-1] for line in lines] == ["PyInit__core"]


def openmp_runtimes(order):
    """Import both libraries, let each compute on its threads, and return the runtimes loaded."""
    for name in order:
        __import__(name)
    import fastattn
    import numpy as np
    import torch

    torch.set_num_threads(2)
    fastattn.set_num_threads(2)
    query = np.ones((1, 4, 512, 64), np.float32)
    assert np.all(fastattn.attention(query, query, query) == 1)
    assert torch.arange(1 << 20, dtype=torch.float32).sqrt().sum() > 0
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in maps if re.search(r"lib[gi]?omp|gomp", line)})


@pytest.mark.parametrize(
    "order", [("fastattn", "torch"), ("torch", "fastattn")], ids=" first, ".join
)
def test_one_openmp_runtime_beside_torch(order):
    pytest.importorskip("torch", exc_type=ImportError)
    runtimes = run(openmp_runtimes, order)
    assert len(runtimes) == 1, runtimes


def isa_in_use():
    import fastattn
    import numpy as np

    query = np.ones((1, 2, 20, 16), np.float32)
    assert np.all(fastattn.attention(query, query, query) == 1)
    return [fastattn.info()["isa"], fastattn.explain(query, query, query)["isa"]]


def isa_error():
    """Return the error of the first call; the import itself succeeds."""
    import fastattn
    import numpy as np

    query = np.ones((1, 2, 20, 16), np.float32)
    try:
        fastattn.attention(query, query, query)
    except (ValueError, RuntimeError) as error:
        return [type(error).__name__, str(error)]
    return None


def supported_isas():
    from fastattn import _core

    return _core.supported_isas()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_isa_variable_is_obeyed(isa):
    supported = supported_isas()
    if isa in supported:
        assert run(isa_in_use, env={"FASTATTN_ISA": isa}) == [isa, isa]
    else:
        kind, message = run(isa_error, env={"FASTATTN_ISA": isa})
        assert kind == "RuntimeError"
        assert f"FASTATTN_ISA='{isa}'" in message


@pytest.mark.parametrize("unset", [None, ""])
def test_the_best_isa_is_the_default(unset):
    best = supported_isas()[0]
    assert run(isa_in_use, env={"FASTATTN_ISA": unset}) == [best, best]


@pytest.mark.parametrize("name", ["avx521", "AVX2", "avx2 ", "none"])
def test_unknown_isa(name):
    from fastattn import _core

    kind, message = run(isa_error, env={"FASTATTN_ISA": name})
    assert kind == "ValueError"
    assert f"FASTATTN_ISA='{name}' is not one of: " in message
    assert sorted(message.split(": ")[1].split(", ")) == sorted(_core.isas())


# Other CPUs, emulated: what a CPU lacks is an illegal instruction there.


def compute_a_little(isa):
    """Compare every kind of call, small, with the definition, on the CPU that is there."""
    import fastattn
    import numpy as np

    rng = np.random.default_rng(0)
    for dtype, gate in ((np.float32, 1e-5), (np.float64, 1e-12)):
        for q_len, kv_len, head_dim in ((5, 37, 20), (70, 70, 64)):
            query = rng.normal(size=(1, 2, q_len, head_dim)).astype(dtype)
            key = rng.normal(size=(1, 1, kv_len, head_dim)).astype(dtype)
            arguments = {
                "mask": rng.random((q_len, kv_len)) < 0.8,
                "bias": rng.normal(size=(q_len, kv_len)),
                "softcap": 10.0,
                "window": (40, 3),
                "query_offset": kv_len - q_len,
                "alibi_slopes": np.array([0.5, 0.1]),
                "sinks": np.array([0.0, 1.0]),
            }
            out = fastattn.attention(query, key, key, **arguments)
            expected = fastattn.reference.attention(query, key, key, **arguments)
            np.testing.assert_allclose(out, expected, rtol=gate, atol=gate)
    from fastattn import _core

    assert _core.isa() == isa
    return _core.supported_isas()


@pytest.mark.skipif(not X86, reason="emulates x86-64 on itself")
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "generic"), ("Haswell", "avx2")])
def test_older_cpus(cpu, isa):
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed")
    emulator = ("qemu-x86_64", "-cpu", cpu)
    # One thread of NumPy's own: creating threads is slow there.
    env = {"OPENBLAS_NUM_THREADS": "1", "FASTATTN_NUM_THREADS": "2"}
    supported = run(compute_a_little, isa, env=env, prefix=emulator, timeout=240)
    assert supported[0] == isa
    assert "avx512" not in supported
    kind, message = run(
        isa_error, env={**env, "FASTATTN_ISA": "avx512"}, prefix=emulator, timeout=240
    )
    assert kind == "RuntimeError"
    assert message.startswith("this CPU cannot run FASTATTN_ISA='avx512' (missing avx512f")


# Importing.


def modules_after_import():
    import fastattn

    assert fastattn.__name__ in sys.modules
    return sorted({name.split(".")[0] for name in sys.modules})


def test_import_needs_numpy_alone():
    loaded = set(run(modules_after_import))
    optional = {
        "torch",
        "jax",
        "numba",
        "matplotlib",
        "ml_dtypes",
        "onnxruntime",
        "openvino",
        "scipy",
    }
    assert not loaded & optional


def seconds_over_numpy():
    import numpy as np

    assert np.__name__ == "numpy"
    start = time.perf_counter()
    import fastattn

    assert fastattn.__name__ == "fastattn"
    return time.perf_counter() - start


def test_import_is_quick():
    assert statistics.median(run(seconds_over_numpy) for _ in range(5)) < 0.1


def dir_of_package():
    import fastattn

    return [
        sorted(fastattn.__all__),
        [name for name in fastattn.__all__ if not hasattr(fastattn, name)],
    ]


def test_public_names_exist():
    names, missing = run(dir_of_package)
    assert names
    assert not missing


# What the files beside the code say.


def in_checkout(name):
    if not (ROOT / name).exists():
        pytest.skip(f"no {name} beside the tests")
    return (ROOT / name).read_text()


def test_versions_agree():
    import fastattn

    version = tomllib.loads(in_checkout("pyproject.toml"))["project"]["version"]
    assert fastattn.__version__ == version == importlib.metadata.version("fastattn")
    assert re.search(r"^version: (.+)$", in_checkout("CITATION.cff"), re.M)[1] == version
    assert re.search(r"^## \[(\d.*?)\]", in_checkout("CHANGELOG.md"), re.M)[1] == version
    # CMake is told the version by the build, and must not have one of its own.
    assert "VERSION ${SKBUILD_PROJECT_VERSION}" in in_checkout("CMakeLists.txt")


def test_readme_examples():
    blocks = re.findall(r"^```python\n(.*?)^```$", in_checkout("README.md"), re.M | re.S)
    examples = [block for block in blocks if block.startswith(">>>")]
    assert examples
    names = {}
    for number, block in enumerate(examples):
        test = doctest.DocTestParser().get_doctest(block, names, f"README {number}", "README.md", 0)
        report = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert not runner.run(test, out=report.append, clear_globs=False).failed, "".join(report)
        names.update(test.globs)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#\s]+)", in_checkout(name))
    here = [link for link in links if "://" not in link]
    assert not [link for link in here if not (ROOT / link).exists()]


def test_readme_names_every_environment_variable():
    readme = in_checkout("README.md")
    sources = [*ROOT.glob("cpp/*"), *ROOT.glob("src/*"), *ROOT.glob("python/fastattn/**/*.py")]
    text = "".join(path.read_text() for path in sources)
    variables = set(re.findall(r"(?:getenv|environ\S*?)\W+(FASTATTN_\w+)", text))
    private = {"FASTATTN_CGROUP_ROOT"}
    assert not [name for name in variables - private if name not in readme]
