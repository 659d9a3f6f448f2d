# SPDX-License-Identifier: Apache-2.0
"""Tests of fastattn.flash_attn need torch."""

import pytest


def pytest_collect_file():
    """Skip this folder where there is no torch."""
    pytest.importorskip("torch", exc_type=ImportError)
