# SPDX-License-Identifier: Apache-2.0
"""Attention on NVIDIA GPUs, by kernels that are written in Python and compiled by Numba."""

from fastattn.cuda._attention import attention, attention_backward, explain, is_available

__all__ = ["attention", "attention_backward", "explain", "is_available"]
