# SPDX-License-Identifier: Apache-2.0
"""The engine of torch.distributed: a process group with a backend for the CPU, as gloo is.

gloo moves bytes in a thread of its own.
"""

from __future__ import annotations

import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed

from fastattn.distributed._engine import Engine, Transfer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

FIRST_TAG = 0x0FA0  # of ours: a program that sends messages of its own uses smaller ones


def is_group(comm: Any) -> bool:
    """Tell whether a communicator is a process group, or a mesh of devices."""
    if not distributed.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(comm, distributed.ProcessGroup | DeviceMesh)


def engine_of(comm: Any) -> Engine:
    """Return the engine of a process group, or of the one of a mesh that has one axis."""
    if not isinstance(comm, distributed.ProcessGroup):
        if comm.ndim != 1:
            raise ValueError(
                f"comm must be a DeviceMesh of one axis, got one of {comm.ndim}: take one of its "
                'axes, as in mesh["cp"]'
            )
        comm = comm.get_group()
    engine = _engines.get(comm)
    if engine is None:
        engine = _engines[comm] = TorchEngine(comm)
    return engine


class TorchEngine(Engine):
    """The ranks of a process group."""

    def __init__(self, group: Any) -> None:
        try:
            self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
            name = group._get_backend(torch.device("cpu")).name()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "comm must be a process group in use that has a backend for the CPU, as gloo, got "
                f"one without: {' '.join(str(error).split())}"
            ) from error
        if self.rank < 0:
            raise ValueError("comm must be a process group that this process belongs to")
        self._waits_with_limit = name == "gloo"
        self._group = group

    def start(
        self, sends: list[tuple[int, Bytes]], receives: list[tuple[int, Bytes]], tag: int
    ) -> Transfer:
        group, tag = self._group, FIRST_TAG + tag
        works = [
            distributed.irecv(torch.from_numpy(x), group=group, tag=tag, group_src=rank)
            for rank, x in receives
        ]
        works += [
            distributed.isend(torch.from_numpy(x), group=group, tag=tag, group_dst=rank)
            for rank, x in sends
        ]
        return _Transfer(works)


class _Transfer(Transfer):
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def poll(self) -> bool:
        return False

    def wait(self, seconds: float | None) -> bool:
        started = time.monotonic()
        while self._works:
            if seconds is None:
                self._works[0].wait()
            else:
                left = seconds - (time.monotonic() - started)
                try:
                    self._works[0].wait(timedelta(seconds=max(left, 1e-3)))
                except RuntimeError:
                    if time.monotonic() - started < seconds:
                        raise
                    return False
            del self._works[0]
        return True


_engines: weakref.WeakKeyDictionary[Any, Engine] = weakref.WeakKeyDictionary()
