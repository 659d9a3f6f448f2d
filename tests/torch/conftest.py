# SPDX-License-Identifier: Apache-2.0
"""Tests of fastattn.torch need torch, and leave it as it was."""

import pytest


def pytest_collect_file():
    """Skip this folder where there is no torch."""
    pytest.importorskip("torch", exc_type=ImportError)


@pytest.fixture
def fresh_compiler():
    import torch

    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # of an operator that has changed
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    from tests.torch.problems import state

    before = state()
    yield
    assert state() == before
