# SPDX-License-Identifier: Apache-2.0
"""Prints what `plan` says of usual models on usual networks: python -m fastattn.distributed."""

from __future__ import annotations

import sys
from typing import Any

from fastattn.distributed._layout import contiguous, zigzag
from fastattn.distributed._plan import plan

NETWORKS: dict[str, dict[str, Any]] = {
    "100 Gb/s InfiniBand": {"bandwidth": 11e9, "latency": 3e-6},
    "25 Gb/s Ethernet": {"bandwidth": 2.5e9, "latency": 30e-6},
    "10 Gb/s Ethernet": {"bandwidth": 1.1e9, "latency": 50e-6},
}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3-8B, a layer, 1M tokens": (2**20, {"q_heads": 32, "kv_heads": 8, "head_dim": 128}),
    "12 heads of 64, a layer, 128k tokens": (
        2**17,
        {"q_heads": 12, "kv_heads": 12, "head_dim": 64},
    ),
}
RANKS = (1, 4, 16, 64, 256, 1024)
FLOPS = 2.4e12  # of a node


def main() -> None:
    """Print the tables."""
    write = sys.stdout.write
    write(f"causal, float32, {FLOPS / 1e12} TFLOP/s a node; the share of ideal, and seconds\n")
    for model, (total, sizes) in MODELS.items():
        write(f"\n{model}\n")
        header = "".join(f"{ranks:>16}" for ranks in RANKS)
        write(f"{'':22}{'':12}{header}\n")
        for network, of_network in NETWORKS.items():
            for name, layout_of in (("zigzag", zigzag), ("contiguous", contiguous)):
                cells = []
                for ranks in RANKS:
                    found = plan(
                        layout_of(total, ranks), **sizes, is_causal=True, flops=FLOPS, **of_network
                    )
                    cells.append(f"{found['efficiency']:.0%} {found['seconds']:.3g} s")
                write(f"{network:22}{name:12}" + "".join(f"{x:>16}" for x in cells) + "\n")


if __name__ == "__main__":
    main()
