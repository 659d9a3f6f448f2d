#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pair bias, the attention of models of proteins: the formula against ours, with gradients.

    pip install torch==2.13.0
    python examples/pair_bias.py

Triangle attention has a batch of rows, the same bias for all of them, and a mask of each row's
keys; a transformer with pair bias has one row. Masks and biases are given as they are and never
expanded; the gradient of a bias is summed over what shares it. The formula takes turns with ours;
the median counts, and the memory is that of all scores, which ours never holds. The exit status is
1 if a result or gradient differs by more than 1e-5 of its largest entry.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

import fastattn
import fastattn.torch

TOLERANCE = 1e-5
NAMES = ("out", "query", "key", "value", "bias")


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """Compute pair-bias attention as it is written down."""
    scores = torch.einsum("...qd,...kd->...qk", query * query.shape[-1] ** -0.5, key) + bias
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("...qk,...kd->...qd", weights, value)


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """Compute the same in one kernel."""
    return fastattn.torch.attention(query, key, value, mask=mask, bias=bias)


def problem(rows: tuple[int, ...], heads: int, tokens: int, head_dim: int) -> list[Tensor]:
    """Return query, key, value, the mask and the bias; (batch, rows, heads, tokens, head_dim)."""
    generator = torch.Generator().manual_seed(0)
    # A linear layer gives (..., tokens, heads, head_dim); its heads are seen by a transpose.
    tensors = [
        torch.randn(*rows, tokens, heads, head_dim, generator=generator).transpose(-3, -2)
        for _ in range(3)
    ]
    mask = torch.rand(*rows, 1, 1, tokens, generator=generator) > 0.1  # True: a key is there
    mask[..., 0] = True
    bias = torch.randn(rows[0], *(1 for _ in rows[1:]), heads, tokens, tokens, generator=generator)
    return [*(x.requires_grad_() for x in tensors), mask, bias.requires_grad_()]


def measured(call: Any, given: list[Tensor]) -> tuple[float, float, list[Tensor]]:
    """Return the seconds of a call, those of its gradients, the result and the gradients."""
    begin = time.perf_counter()
    out = call(*given)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(out.sin().sum(), [x for x in given if x.requires_grad])
    return middle - begin, time.perf_counter() - middle, [out.detach(), *gradients]


def main() -> int:
    """Measure, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--tokens", type=int, default=192, help="of a protein (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each case (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fastattn.set_num_threads(options.threads)
    tokens = options.tokens
    cases = {
        "triangle attention, 4 heads of 32": problem((1, tokens), 4, tokens, 32),
        "pair bias, 16 heads of 24": problem((2,), 16, tokens, 24),
    }
    titles = "attention | formula ms | fastattn ms | their gradients ms | ours ms | scores MiB"
    print(f"{tokens} tokens, {options.threads} threads\n\n| {titles} | largest difference |")
    print("|---|---:|---:|---:|---:|---:|---|")
    worst = 0.0
    for name, given in cases.items():
        turns = [(measured(formula, given), measured(ours, given)) for _ in range(options.rounds)]
        times = [
            1e3 * statistics.median(turn[side][part] for turn in turns)
            for part in (0, 1)
            for side in (0, 1)
        ]
        (*_, theirs), (*_, our) = turns[0]
        differences = [
            float((x - y).abs().max() / x.abs().max()) for x, y in zip(theirs, our, strict=True)
        ]
        worst = max(worst, *differences)
        place = NAMES[differences.index(max(differences))]
        scores = 4 * given[0].shape[:-1].numel() * tokens / 2**20
        shown = " | ".join(f"{x:.1f}" for x in (*times, scores))
        print(f"| {name} | {shown} | {max(differences):.1e}, of {place} |")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
