# SPDX-License-Identifier: Apache-2.0
"""What pytest finds by itself: fixtures and settings. What tests import is in support/."""

import os

import hypothesis
import pytest

import fastattn
from fastattn import _core

pytest.register_assert_rewrite("tests.support", "tests.cuda.cases")
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# What the tests of a folder need.
NEEDS = dict(torch="torch", flash_attn="torch", jax="jax", transformers="torch transformers")


def pytest_collect_file(file_path):
    """Skip a folder whose framework is not installed."""
    for module in NEEDS.get(file_path.parent.name, "").split():
        pytest.importorskip(module, exc_type=ImportError)


@pytest.fixture(params=_core.supported_isas(), scope="module")
def isa(request):
    """Run every test that asks for it on every variant of the kernel that this CPU has."""
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


@pytest.fixture
def threads():
    """Let a test change the number of threads."""
    usual = fastattn.get_num_threads()
    yield fastattn.set_num_threads
    fastattn.set_num_threads(usual)


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", exc_type=ImportError)


@pytest.fixture(scope="session")
def jax():
    jax = pytest.importorskip("jax", exc_type=ImportError)
    jax.config.update("jax_platforms", "cpu")
    return jax


@pytest.fixture
def core_addresses(monkeypatch):
    """Return a list that will hold the addresses of query, key, value and out in the core."""
    seen, core = [], _core.attention

    def attention(*given):
        seen.extend(x.ctypes.data for x in given[:4])
        core(*given)

    monkeypatch.setattr(_core, "attention", attention)
    return seen
