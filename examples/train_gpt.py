#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A real training: a small GPT on this repository's own pages, torch's attention against ours.

    pip install torch==2.13.0
    python examples/train_gpt.py

The model has 6 layers of 8 heads of 32 and a context of 512 bytes; both start from the same seed
and see the same batches. Without dropout in the attention the two losses are compared step by step;
with it, the runs draw other random numbers and only their times are compared. The last run has a
learned bias for each head. The implementations take turns, a step each; the median of a step's time
counts. The exit status is 1 if a loss differs by more than 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
import fastattn.torch

LAYERS, HEADS, HEAD_DIM, CONTEXT, BATCH = 6, 8, 32, 512, 4
WIDTH = HEADS * HEAD_DIM
TOLERANCE = 0.01  # of a loss
IMPLEMENTATIONS: dict[str, Any] = {
    "torch": nn.functional.scaled_dot_product_attention,
    "fastattn": fastattn.torch.scaled_dot_product_attention,
}
VARIANTS = {"plain": 0.0, "dropout 0.1": 0.1, "learned bias": 0.0}


class Layer(nn.Module):
    """Attention and a multilayer perceptron, each behind a norm."""

    def __init__(self, attention: Any, dropout_p: float, biased: bool) -> None:
        super().__init__()
        self.attention, self.dropout_p = attention, dropout_p
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        hidden = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        self.register_buffer("hidden", hidden, persistent=False)
        self.bias = nn.Parameter(torch.zeros(HEADS, CONTEXT, CONTEXT)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, context, width) to the same."""
        packed = self.project(self.norms[0](x)).view(BATCH, CONTEXT, 3, HEADS, HEAD_DIM)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        options: dict[str, Any] = {"is_causal": True}
        if self.bias is not None:
            options = {"attn_mask": self.bias + self.hidden}
        mixed = self.attention(query, key, value, dropout_p=self.dropout_p, **options)
        x = x + self.out(mixed.transpose(1, 2).reshape(BATCH, CONTEXT, WIDTH))
        return x + self.perceptron(self.norms[1](x))


class Training:
    """A model and its optimiser."""

    def __init__(self, attention: Any, dropout_p: float, biased: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {
                "tokens": nn.Embedding(256, WIDTH),
                "positions": nn.Embedding(CONTEXT, WIDTH),
                "layers": nn.Sequential(
                    *(Layer(attention, dropout_p, biased) for _ in range(LAYERS))
                ),
                "head": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)),
            }
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Take one step, and keep its loss and seconds."""
        begin = time.perf_counter()
        x = self.model["tokens"](inputs) + self.model["positions"].weight
        logits = self.model["head"](self.model["layers"](x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.times.append(time.perf_counter() - begin)
        self.losses.append(loss.item())


def text() -> Tensor:
    """Return the bytes of the repository's pages."""
    root = Path(__file__).resolve().parent.parent
    pages = sorted(root.glob("*.md")) + sorted(root.glob("docs/*.md"))
    joined = b"\n".join(page.read_bytes() for page in pages)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def batches(data: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and what follows them, the same for every run."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(len(data) - CONTEXT - 1, (steps, BATCH), generator=generator)
    windows = data[starts[..., None] + torch.arange(CONTEXT + 1)]
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def show(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Train, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--steps", type=int, default=200, help="of the plain run (%(default)s)")
    parser.add_argument("--timed-steps", type=int, default=20, help="of the others (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fastattn.set_num_threads(options.threads)
    data = text()
    show(
        f"{LAYERS} layers, {HEADS} heads of {HEAD_DIM}, context {CONTEXT}, batch {BATCH}, "
        f"{options.threads} threads, {len(data)} bytes of text\n"
    )
    show(
        "| attention | torch ms/step | fastattn ms/step | speed-up | largest difference of a loss |"
    )
    show("|---|---:|---:|---:|---:|")
    worst = 0.0
    for name, dropout_p in VARIANTS.items():
        runs = {
            library: Training(attention, dropout_p, name == "learned bias")
            for library, attention in IMPLEMENTATIONS.items()
        }
        steps = options.steps if name == "plain" else options.timed_steps
        for inputs, targets in batches(data, steps):
            for run in runs.values():
                run.step(inputs, targets)
        theirs, ours = (runs[library] for library in ("torch", "fastattn"))
        difference = max(abs(a - b) / a for a, b in zip(theirs.losses, ours.losses, strict=True))
        shown = "other random numbers" if dropout_p else f"{100 * difference:.4f} %"
        worst = max(worst, 0.0 if dropout_p else difference)
        before, after = (1e3 * statistics.median(run.times[1:]) for run in (theirs, ours))
        show(f"| {name} | {before:.0f} | {after:.0f} | {before / after:.2f}x | {shown} |")
        if name == "plain":
            first, last = theirs.losses[0], theirs.losses[-1]
            losses = f"{first:.3f} to {last:.3f} (torch), {ours.losses[-1]:.3f} (fastattn)"
    show(f"\nLoss of the plain run, step 1 to {options.steps}: {losses}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
