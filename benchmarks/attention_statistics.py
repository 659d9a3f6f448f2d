# SPDX-License-Identifier: Apache-2.0
"""Measure what the statistics of attention cost beside attention itself.

    python benchmarks/attention_statistics.py [--tokens 32768] [--rounds 5]

One causal head of 64 columns in float32. Each round runs every case once, in turn; printed are the
medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

import fastattn


def main() -> None:
    """Measure, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokens = options.tokens
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, tokens, 64), np.float32) for _ in range(3))
    starts = np.unique(np.arange(256) * tokens // 256)
    asked = {
        "maximum": {"maximum": True},
        "entropy": {"entropy": True},
        "top 8": {"top": 8},
        "column sums": {"column_sums": True, "row_weights": rng.random(tokens, np.float32)},
        "256 x 256 blocks": {"blocks": (starts, starts)},
    }
    asked["all at once"] = {name: x for case in asked.values() for name, x in case.items()}
    seconds: dict[str, list[float]] = {case: [] for case in asked}
    for _ in range(options.rounds):
        whole = timed(lambda: fastattn.attention(query, key, value, is_causal=True))
        for case, what in asked.items():
            seconds[case].append(
                timed(
                    lambda what=what: fastattn.attention_statistics(
                        query, key, is_causal=True, **what
                    )
                )
                / whole
            )
    for case, ratios in seconds.items():
        print(f"{case:17} {np.median(ratios):.2f} x attention")  # noqa: T201


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
