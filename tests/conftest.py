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
