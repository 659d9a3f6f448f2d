# SPDX-License-Identifier: Apache-2.0
"""Attention over ranks: each process has some rows of a sequence that is too long for one.

`attention` and `attention_backward` are those of fastattn, over the ranks of an mpi4py communicator
or of a process group of torch.distributed; a `Layout` says which rank has which rows. `combine` is
for decoding, where every rank has the queries and some of the keys. `plan` says what a call will
cost. Neither package is needed to import this one.
"""

from fastattn.distributed._calls import attention, attention_backward
from fastattn.distributed._combine import combine
from fastattn.distributed._layout import Layout, contiguous, zigzag
from fastattn.distributed._plan import plan

__all__ = [
    "Layout",
    "attention",
    "attention_backward",
    "combine",
    "contiguous",
    "plan",
    "zigzag",
]
