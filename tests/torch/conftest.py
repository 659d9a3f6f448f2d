# SPDX-License-Identifier: Apache-2.0
"""Tests of fastattn.torch leave torch as it was."""

import pytest


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
