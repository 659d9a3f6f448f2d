# SPDX-License-Identifier: Apache-2.0
"""Models that run on the kernel: readers of checkpoints, so far."""
