# SPDX-License-Identifier: Apache-2.0
"""Tests of fastattn.transformers need transformers, one thread, and pairs of models."""

import pytest


def pytest_collect_file():
    """Skip this folder where there is no torch or no transformers."""
    pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("transformers", exc_type=ImportError)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads would wait for each other longer than such models compute."""
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture
def pair(request):
    from tests.transformers.models import model_of

    return [model_of(request.param, implementation) for implementation in ("eager", "fastattn")]
