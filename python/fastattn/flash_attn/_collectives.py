# SPDX-License-Identifier: Apache-2.0
"""flash_attn.utils.distributed: collectives that have gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.autograd import Function

if TYPE_CHECKING:
    from torch import Tensor


def all_gather(input_: Tensor, process_group: Any) -> Tensor:
    """Return the inputs of all processes, one after the other along the first axis."""
    whole: Tensor = _AllGather.apply(input_, process_group)
    return whole


def reduce_scatter(input_: Tensor, process_group: Any) -> Tensor:
    """Return this process's part, along the first axis, of the sum of all processes' inputs."""
    part: Tensor = _ReduceScatter.apply(input_, process_group)
    return part


def all_reduce(input_: Tensor, process_group: Any) -> Tensor:
    """Return the sum of all processes' inputs; its gradient is this process's own."""
    total: Tensor = _AllReduce.apply(input_, process_group)
    return total


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """Return this process's share of dim, which is cut in multiples of multiple_of."""
    if dim % multiple_of:
        raise ValueError(f"dim must be a multiple of multiple_of, got {dim} and {multiple_of}")
    each, rest = divmod(dim // multiple_of, world_size)
    return (each + (local_rank < rest)) * multiple_of


def _gathered(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, x, group=group)
    return torch.cat(parts)


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.contiguous().clone()
    distributed.all_reduce(total, group=group)
    return total


def _part_of_sum(x: Tensor, group: Any) -> Tensor:
    size = distributed.get_world_size(group)
    if len(x) % size:
        raise ValueError(
            f"the first axis must be a multiple of {size}, the processes, got {tuple(x.shape)}"
        )
    part: Tensor = _summed(x, group).chunk(size)[distributed.get_rank(group)].clone()
    return part


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _part_of_sum(grad, ctx.group), None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _part_of_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group), None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
