# SPDX-License-Identifier: Apache-2.0
"""Tests of fastattn.transformers need one thread, and pairs of models."""

import pytest


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
