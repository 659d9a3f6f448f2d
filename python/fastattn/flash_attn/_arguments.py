# SPDX-License-Identifier: Apache-2.0
"""What flash-attn's functions accept, and how the kernel's words say it."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def check_axes(ndim: int, axes: str, **tensors: Any) -> None:
    """Accept tensors on the CPU that have these axes."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        if x.device.type != "cpu":
            raise TypeError(f"{name} must be on the CPU, got a tensor on {x.device}: {name}.cpu()")
        if x.ndim != ndim:
            raise ValueError(f"{name} must have shape {axes}, got {name}.shape={tuple(x.shape)}")


def kernel_options(
    softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, alibi_slopes: Any
) -> dict[str, Any]:
    """Return the options of `fastattn.attention` that flash-attn's arguments mean."""
    left, right = window_sides(window_size)
    return {
        "scale": softmax_scale,
        "is_causal": bool(causal),
        "window": None if left is right is None else (left, right),
        "softcap": None if isinstance(softcap, numbers.Real) and softcap <= 0 else softcap,
        "alibi_slopes": alibi_slopes,
    }


def window_sides(window_size: Any) -> tuple[int | None, int | None]:
    """Return how far a query sees to the left and to the right; None is unlimited."""
    if window_size is None:
        return None, None
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), not {window_size!r}")
    if not all(side is None or isinstance(side, numbers.Integral) for side in window_size):
        raise TypeError(f"window_size must be a pair of integers, not {window_size!r}")
    left, right = (None if side is None or side < 0 else int(side) for side in window_size)
    return left, right


def unpacked(name: str, x: Tensor, axis: int, count: int) -> tuple[Tensor, ...]:
    """Return the parts of a packed tensor."""
    if x.shape[axis] != count:
        raise ValueError(
            f"{name} must have {count} entries along axis {axis}, got {name}.shape={tuple(x.shape)}"
        )
    parts: tuple[Tensor, ...] = x.unbind(axis)
    return parts


def starts_of(name: str, starts: Any) -> Tensor:
    """Return where each sequence starts, and the last one ends, as int64."""
    x: Tensor = torch.as_tensor(starts, device="cpu")
    if x.is_floating_point() or x.ndim != 1 or len(x) == 0:
        raise ValueError(
            f"{name} must be integers of shape (batch + 1,), got {name}.shape={tuple(x.shape)} "
            f"and {x.dtype}"
        )
    return x.long()


def indices_of(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return integers of this shape as int64."""
    if x.is_floating_point() or x.dtype == torch.bool or x.shape != shape:
        raise ValueError(
            f"{name} must be integers of shape {shape}, got {name}.shape={tuple(x.shape)} "
            f"and {x.dtype}"
        )
    return x.long()


def gathered_pages(pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Return the keys or values of sequences, packed, from the pages that a table names."""
    check_axes(4, "(pages, page_size, heads, head_dim) with block_table", k=pages)
    table = indices_of("block_table", table, (len(lengths), table.shape[-1]))
    size = pages.shape[1]
    if len(lengths) and int(lengths.max()) > table.shape[1] * size:
        raise ValueError(
            f"cu_seqlens_k must be within the {table.shape[1]} x {size} keys that block_table "
            f"names, got a sequence of {int(lengths.max())}"
        )
    parts = [pages[:0].flatten(0, 1)]
    for row, length in zip(table, lengths.tolist(), strict=True):
        used = row[: -(-length // size)]
        if len(used) and not 0 <= int(used.min()) <= int(used.max()) < len(pages):
            raise ValueError(
                f"block_table must be within 0..{len(pages) - 1}, the pages of k, "
                f"got {used.tolist()}"
            )
        parts.append(pages[used].flatten(0, 1)[:length])
    return torch.cat(parts)
