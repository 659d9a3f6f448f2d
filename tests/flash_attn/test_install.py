# SPDX-License-Identifier: Apache-2.0
"""Whether flash_attn is whole while fastattn.flash_attn is in its place, and gone after that."""

import copy
import importlib
import importlib.metadata
import importlib.util
import inspect
import pickle
import pkgutil
import re
import sys
import threading
import types
from pathlib import Path

import pytest

import fastattn.flash_attn
from fastattn.flash_attn import install
from fastattn.flash_attn._install import MODULES, VERSION
from tests.support.child import run

PAGE = Path(__file__).parents[2] / "docs" / "flash_attn.md"
ABSENT = (
    "flash_attn_interface",
    "flash_attn.cute",
    "flash_attn_2_cuda",
    "flash_attn.flash_attention",
    "flash_attn.flash_attn_triton",
    "flash_attn.nothing",
)


@pytest.fixture(autouse=True)
def _no_flash_attn():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")


@pytest.fixture
def _installed():
    with install():
        yield


def full(name):
    return f"flash_attn.{name}".removesuffix(".")


def rows_of_the_page():
    """Return what the page's table says of each module: the names, and those that are missing."""
    text = PAGE.read_text("utf-8").partition("## Modules")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `flash_attn")]
    return {re.findall("`(.+?)`", a)[0]: [re.findall("`(.+?)`", x) for x in b] for a, *b in rows}


@pytest.mark.promise("flash-attn-missing-says-so")
def test_the_page_lists_what_there_is():
    packages = {name for name, part in MODULES.items() if not (part.names or part.missing)}
    assert rows_of_the_page() == {
        full(name): [part.names.split(), part.missing.split()]
        for name, part in MODULES.items()
        if name not in packages
    }
    assert packages == {"layers", "losses", "modules", "ops", "ops.triton", "utils", "models"}


@pytest.mark.promise("flash-attn-missing-says-so")
@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", MODULES, ids=full)
def test_each_module_has_its_names(name):
    module, part = importlib.import_module(full(name)), MODULES[name]
    assert module.__name__ == module.__spec__.name == full(name)
    assert Path(module.__file__).is_file()
    assert importlib.reload(module) is module
    namespace = {}
    exec(f"from {full(name)} import *", namespace)
    for each in part.names.split():
        there = getattr(module, each)
        assert callable(there)
        assert each.startswith("_") or namespace[each] is there
        # einops's own, where that is not installed
        if not there.__module__.startswith(("flash_attn", "einops")):
            assert inspect.getmodule(there).__name__.startswith("fastattn.")
            assert pickle.loads(pickle.dumps(there)) is there
    for each in part.missing.split():
        there = getattr(module, each)
        assert inspect.isclass(there) == each[0].isupper()
        with pytest.raises(NotImplementedError) as error:
            there(1, two=2)
        assert str(error.value) == f"{full(name)}.{each} is not in fastattn.flash_attn: {part.why}"
        if inspect.isclass(there):  # programs make classes of it, and ask
            derived = type("Derived", (there,), {})
            with pytest.raises(NotImplementedError, match=re.escape(part.why)):
                derived()
            assert not isinstance(3, there)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", ABSENT)
def test_what_programs_try_by_ImportError_is_absent(name):
    with pytest.raises(ImportError, match=rf"^No module named '{name}'$"):
        importlib.import_module(name)
    assert importlib.util.find_spec(name) is None


@pytest.mark.promise("flash-attn-install-is-undone")
@pytest.mark.usefixtures("_installed")
def test_the_same_functions():
    import flash_attn
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    assert flash_attn.flash_attn_func is fastattn.flash_attn.flash_attn_func
    assert flash_attn.flash_attn_interface.flash_attn_func is flash_attn.flash_attn_func
    assert flash_attn_varlen_func is fastattn.flash_attn.flash_attn_varlen_func
    with pytest.raises(ImportError, match="cannot import name 'flash_attn_gpu'"):
        from flash_attn.flash_attn_interface import flash_attn_gpu  # noqa: F401


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", ["flash_attn", "flash-attn", "Flash.Attn", "FLASH__attn"])
def test_the_distribution(name):
    import flash_attn

    assert importlib.metadata.version(name) == flash_attn.__version__ == VERSION
    found = importlib.metadata.distribution(name)
    assert found.metadata["Name"] == "flash_attn"
    assert found.metadata["Summary"].startswith("fastattn.flash_attn")
    assert found.requires == ["torch", "einops"]
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash_attn"]
    assert "flash_attn" in [x.name for x in importlib.metadata.distributions()]
    assert not importlib.metadata.entry_points(group="flash_attn")
    for other in ("flash_attn_3", "flash-attn-4", "attn"):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(other)


@pytest.mark.usefixtures("_installed")
def test_packages_list_their_modules():
    import flash_attn

    listed = {x.name: x.ispkg for x in pkgutil.walk_packages(flash_attn.__path__, "flash_attn.")}
    assert set(listed) == {full(name) for name in MODULES if name}
    assert {x for x, is_package in listed.items() if is_package} == {
        full(name) for name, part in MODULES.items() if name and not (part.names or part.missing)
    }


@pytest.mark.promise("flash-attn-install-is-undone")
def test_nothing_remains():
    before = [list(sys.meta_path), list(sys.path_hooks), dict(sys.path_importer_cache)]
    with install() as installed:
        import flash_attn.ops.triton.layer_norm

        assert list(pkgutil.iter_modules(flash_attn.__path__))
        with pytest.raises(RuntimeError, match=r"it is already, by install$"):
            install()
    installed.close()  # a second time changes nothing
    assert not [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None
    assert "flash_attn" not in importlib.metadata.packages_distributions()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")
    after = [list(sys.meta_path), list(sys.path_hooks), dict(sys.path_importer_cache)]
    assert not [x for x in after[2] if x not in before[2] and "flash_attn" in x]
    assert after[:2] == before[:2]
    with install():
        assert importlib.metadata.version("flash_attn") == VERSION


def test_what_others_put_there_stays():
    with install():
        other = types.ModuleType("flash_attn.other")
        sys.modules["flash_attn.other"] = other
    assert sys.modules.pop("flash_attn.other") is other


@pytest.mark.promise("flash-attn-install-is-undone")
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn.flash_attn_interface"])
def test_a_real_flash_attn_is_left_alone(monkeypatch, name):
    real = types.ModuleType(name)
    real.__file__ = "somewhere/flash_attn/__init__.py"
    monkeypatch.setitem(sys.modules, name, real)
    with pytest.raises(RuntimeError, match=r"from somewhere/flash_attn/__init__.py$"):
        install()
    assert sys.modules[name] is real


def test_one_of_many_threads_installs():
    start, made, refused = threading.Barrier(8), [], []

    def install_once():
        start.wait()
        try:
            made.append(install())
        except RuntimeError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=install_once) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made[0].close()
    assert len(made) == 1
    assert len(refused) == 7


def test_threads_import_the_same():
    start, found = threading.Barrier(8), []

    def import_one():
        start.wait()
        found.append(importlib.import_module("flash_attn.layers.rotary").RotaryEmbedding)

    with install():
        threads = [threading.Thread(target=import_one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda x: x.__name__)
def test_the_handle_is_of_this_process(act):
    with (
        install() as installed,
        pytest.raises(TypeError, match=r"call install\(\) in each process"),
    ):
        act(installed)


def probe_transformers():
    """Return what transformers finds, and what a model says to attn_implementation."""
    with install():
        import warnings

        import transformers
        from transformers import utils

        warnings.simplefilter("ignore")  # one of the probes is deprecated
        transformers.logging.set_verbosity_error()
        found = [
            utils.is_flash_attn_2_available(),
            utils.is_flash_attn_greater_or_equal("2.3.3"),
            utils.is_flash_attn_greater_or_equal("2.9"),
            utils.is_flash_attn_greater_or_equal_2_10(),
            utils.import_utils.is_flash_attn_3_available(),
            utils.import_utils.is_flash_attn_4_available(),
        ]
        config = transformers.LlamaConfig(
            vocab_size=9,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        build = transformers.AutoModelForCausalLM.from_config
        try:
            build(config, attn_implementation="flash_attention_2")
        except ImportError as error:
            refusal = str(error)
        return [*found, refusal]


def test_transformers_probes():
    pytest.importorskip("transformers", exc_type=ImportError)
    *found, refusal = run(probe_transformers, env={"CUDA_VISIBLE_DEVICES": ""})
    assert found == [False, True, False, True, False, False]
    assert "FlashAttention2 is not available on CPU" in refusal
