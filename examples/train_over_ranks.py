#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A small GPT on one long text, over processes that each have some rows of it.

    pip install torch==2.13.0
    torchrun --nproc-per-node 2 examples/train_over_ranks.py
    torchrun --nproc-per-node 1 examples/train_over_ranks.py      # the same losses

FSDP2 shards the parameters, and `fastattn.torch.context_parallel` the text: no process has all of
either. Each computes the loss of its own rows, which are equally many; FSDP2 takes the mean of the
gradients, so that the model learns from the whole. The text is this repository's own pages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastattn.torch

LAYERS, HEADS, HEAD_DIM = 2, 4, 32
WIDTH = HEADS * HEAD_DIM


class Layer(nn.Module):
    """Attention and a multilayer perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, rows, width) to the same."""
        packed = self.project(self.norms[0](x)).unflatten(-1, (3, HEADS, HEAD_DIM))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.perceptron(self.norms[1](x))


class Model(nn.Module):
    """A decoder of bytes; the positions of its rows are given."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the byte that follows each."""
        x = self.tokens(tokens) + self.places(positions)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


def text(length: int) -> Tensor:
    """Return the first bytes of the repository's pages, and one more."""
    root = Path(__file__).resolve().parent.parent
    pages = sorted(root.glob("*.md")) + sorted(root.glob("docs/*.md"))
    joined = b"\n".join(page.read_bytes() for page in pages)
    return torch.frombuffer(bytearray(joined[: length + 1]), dtype=torch.uint8).long()


def train(length: int, steps: int) -> list[float]:
    """Return the loss of each step, the mean over all rows of all ranks."""
    ranks = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    torch.manual_seed(0)
    model = Model(length)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = text(length)[None]
    tokens, targets, positions = data[:, :-1], data[:, 1:], torch.arange(length)
    losses = []
    for _ in range(steps):
        with fastattn.torch.context_parallel(
            mesh["cp"], buffers=[tokens, targets, positions], buffer_seq_dims=[1, 1, 0]
        ):
            logits = model(tokens, positions)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        distributed.all_reduce(whole)
        losses.append(whole.item() / ranks)
    return losses


def main() -> None:
    """Train, and print the losses from the first rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    distributed.init_process_group("gloo")
    losses = train(arguments.length, arguments.steps)
    if distributed.get_rank() == 0:
        for step, loss in enumerate(losses):
            sys.stdout.write(f"step {step}: loss {loss:.7f}\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
