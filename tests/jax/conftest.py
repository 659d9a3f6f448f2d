# SPDX-License-Identifier: Apache-2.0
"""Tests of fastattn.jax need JAX."""

import pytest


def pytest_collect_file():
    """Skip this folder where there is no jax."""
    pytest.importorskip("jax", exc_type=ImportError)
