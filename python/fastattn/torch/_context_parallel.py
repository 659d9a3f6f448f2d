# SPDX-License-Identifier: Apache-2.0
"""Models over ranks: buffers are cut, and scaled_dot_product_attention is the one over ranks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastattn._sdpa import with_equal_heads
from fastattn.distributed import zigzag
from fastattn.distributed._comm import engine_of, peers_of
from fastattn.torch import distributed
from fastattn.torch._attention import autocast_to
from fastattn.torch._tensors import check, drawn_dropout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastattn.distributed._calls import Method
    from fastattn.distributed._engine import Peers
    from fastattn.distributed._layout import Layout


@contextmanager
def context_parallel(
    mesh: Any,
    *,
    buffers: list[Tensor] | None = None,
    buffer_seq_dims: list[int] | None = None,
    no_restore_buffers: set[Tensor] | None = None,
    method: Method = "ring",
    timeout: float | None = None,
) -> Iterator[None]:
    """Let a model compute one long sequence over ranks, each of which has some of its rows.

    Inside the with statement each buffer is this rank's rows of itself, and
    torch.nn.functional.scaled_dot_product_attention attends to the keys of all ranks. Its arguments
    are those of torch's own `context_parallel`, and so are the rows::

        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
        with fastattn.torch.context_parallel(
            mesh["cp"], buffers=[tokens, targets, positions], buffer_seq_dims=[1, 1, 0]
        ):
            loss = criterion(model(tokens, positions), targets)
            loss.backward()

    Parameters
    ----------
    mesh : DeviceMesh of one axis, or ProcessGroup
        The ranks; all of them enter, with the same whole buffers.
    buffers : list of Tensor, optional
        Whatever has an axis of the sequence: tokens, targets, positions, rotary tables. They are
        replaced in place, and must be no parameters.
    buffer_seq_dims : list of int, optional
        The axis of the sequence of each buffer. Lengths need not divide by the ranks.
    no_restore_buffers : set of Tensor, optional
        Buffers that stay cut; all others are whole again after the with statement.
    method : "ring", "gather" or "heads"
        As for `fastattn.distributed.attention`.
    timeout : float, optional
        Likewise.

    Raises
    ------
    TypeError, ValueError
        An argument breaks a rule; the message says which argument, the rule, and what was given.

    Notes
    -----
    Ranks have the rows of `fastattn.distributed.zigzag`. Without buffers, the rows of all ranks are
    taken to be equally many.

    A mask has this rank's rows, and a column for each key of the whole sequence. Where the torch of
    PyTorch replaces a mask or refuses to be causal on the CPU, this computes what was asked.

    Models of transformers need ``attn_implementation="fastattn"``, and their position_ids among the
    buffers: with another implementation, transformers takes a rank's rows for the whole sequence.

    Dropout takes the seed that the first rank draws from torch's default generator.

    The patch holds for all threads of the process until the with statement ends. A backward pass
    after it is over ranks too.
    """
    buffers, dims = buffers or [], buffer_seq_dims or []
    kept = no_restore_buffers or set()
    if len(buffers) != len(dims):
        raise ValueError(
            "buffer_seq_dims must have an axis for each of buffers, got "
            f"{len(dims)} for {len(buffers)}"
        )
    for i, buffer in enumerate(buffers):
        if not isinstance(buffer, Tensor):
            raise TypeError(f"buffers[{i}] must be a tensor, not {type(buffer).__name__}")
        if isinstance(buffer, nn.Parameter):
            raise TypeError(f"buffers[{i}] must be no parameter of a model")
        check(f"buffers[{i}]", buffer)
        if not -buffer.dim() <= dims[i] < buffer.dim():
            raise ValueError(
                f"buffer_seq_dims[{i}] must be an axis of buffers[{i}], got {dims[i]} for shape "
                f"{tuple(buffer.shape)}"
            )
    if not all(any(x is buffer for buffer in buffers) for x in kept):
        raise ValueError("no_restore_buffers must be among buffers")

    engine = engine_of(mesh)
    layouts = {total: zigzag(total, engine.size) for total in _totals(buffers, dims)}
    wholes = [buffer.data for buffer in buffers]
    found = functional.scaled_dot_product_attention
    ours = OverRanks(mesh, engine.rank, layouts, method, timeout)
    _entered.append(ours)
    try:
        for buffer, dim in zip(buffers, dims, strict=True):
            positions = layouts[buffer.shape[dim]].positions(engine.rank)
            buffer.data = buffer.data.index_select(dim, torch.from_numpy(positions))
        functional.scaled_dot_product_attention = ours.scaled_dot_product_attention
        yield
    finally:
        functional.scaled_dot_product_attention = found
        _entered.remove(ours)
        for buffer, whole in zip(buffers, wholes, strict=True):
            if buffer not in kept:
                buffer.data = whole


def _totals(buffers: list[Tensor], dims: list[int]) -> set[int]:
    return {buffer.shape[dim] for buffer, dim in zip(buffers, dims, strict=True)}


_entered: list[OverRanks] = []  # of this process, the innermost last


def active() -> OverRanks | None:
    """Return attention over the ranks of the innermost context_parallel, or None outside."""
    return _entered[-1] if _entered else None


class OverRanks:
    """Attention over ranks: what stands in the place of torch's function, and of transformers'."""

    def __init__(
        self,
        comm: Any,
        rank: int,
        layouts: dict[int, Layout],
        method: Method,
        timeout: float | None,
    ) -> None:
        self._comm, self.rank, self._layouts = comm, rank, layouts
        self._how: dict[str, Any] = {"method": method, "timeout": timeout}

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute torch's function over the keys of all ranks."""
        if attn_mask is not None and is_causal:
            raise ValueError("attn_mask must not be given together with is_causal=True")
        for name, x in (("query", query), ("key", key), ("value", value)):
            check(name, x)
        if not enable_gqa:
            tensors = (query, key, value)
            wanted = with_equal_heads(*(tuple(x.shape) for x in tensors))
            query, key, value = (x.expand(s) for x, s in zip(tensors, wanted, strict=True))
        return self.attention(
            query,
            key,
            value,
            dropout_p=dropout_p,
            mask=attn_mask,
            scale=scale,
            is_causal=is_causal,
            query_offset=0 if is_causal else None,
        )

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        """Attend to the keys of all ranks, with options of `fastattn.torch.distributed`."""
        query, key, value = autocast_to(query, key, value)
        out = distributed.attention(
            query,
            key,
            value,
            group=self._comm,
            layout=self.layout("query", query),
            kv_layout=self.layout("key", key),
            **options,
            **self._dropout(dropout_p),
            **self._how,
        )
        assert isinstance(out, Tensor)
        return out

    def peers(self, call: str) -> Peers:
        """Return the ranks of a call."""
        return peers_of(self._comm, call, self._how["timeout"])

    def _dropout(self, dropout_p: float) -> dict[str, Any]:
        """Return the options of dropout, with the seed that the first rank has drawn."""
        drawn = drawn_dropout(dropout_p)
        if drawn["seed"] is not None:
            mine = np.array([drawn["seed"]], np.int64).view(np.uint8)
            peers = self.peers("dropout")
            drawn["seed"] = int(peers.all_gather("sharing a seed", mine).view(np.int64)[0, 0])
        return drawn

    def layout(self, name: str, x: Tensor) -> Layout:
        """Return the layout by which this rank has so many rows."""
        rows, size = x.shape[-2], engine_of(self._comm).size
        if not self._layouts:
            return zigzag(rows * size, size)
        fitting = [y for y in self._layouts.values() if y.lengths[self.rank] == rows]
        if len(fitting) != 1:
            lengths = sorted({y.lengths[self.rank] for y in self._layouts.values()})
            raise ValueError(
                f"{name} must have as many rows as this rank has of one of the buffers, "
                f"{' or '.join(map(str, lengths))}, got {name}.shape={tuple(x.shape)}"
                + (": more than one buffer has so many" if fitting else "")
            )
        return fitting[0]
