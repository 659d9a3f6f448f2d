# SPDX-License-Identifier: Apache-2.0
"""What tests of GPUs ask pytest for: a driver that is none, and compilers."""

import pytest

from fastattn.cuda import _build
from tests.cuda.fake_driver import fake_driver


@pytest.fixture
def gpu(monkeypatch):
    with fake_driver(monkeypatch) as fake:
        yield fake


@pytest.fixture(scope="session")
def numba_cuda():
    pytest.importorskip("numba_cuda", exc_type=ImportError)
    from numba import cuda

    return cuda


@pytest.fixture
def ptxas(numba_cuda):
    """Need an assembler."""
    if not _build.assemblers():
        pytest.skip("ptxas is not here: pip install nvidia-cuda-nvcc")
