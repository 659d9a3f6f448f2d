#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run ranks in network namespaces, with an address each, over a network of known rate and delay.

    pip install torch==2.13.0 .
    sudo python benchmarks/ranks_over_a_network.py
    sudo python benchmarks/ranks_over_a_network.py --cut

Linux, iproute2 and root are needed. Each rank is a process of torch.distributed (gloo) in a
namespace of its own, whose only way out is a virtual network card (TAP). `tc tbf` limits what a
card sends; a relay holds every packet for the delay before it hands it to the card that it is for.
The relay takes a part of the machine's cores, as a real network would not.

The first command tells how long the ranks compute when nothing travels, how long the same bytes
travel when nothing is computed, how long both take in the call, and what `plan` says to that. With
--cut the card of the last rank is taken down in the middle of a call, and each rank tells how it
ended.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

CARD, PORT = "link0", 29600
# <linux/if_tun.h>: packets of the card with a header in front, in which up to 64 KiB stay together.
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x1000, 0x4000
CHECKSUM, TSO4 = 0x1, 0x2
HEADER, LARGEST = 10, 65536 + 64
CLONE_NEWNET = 0x40000000


def run(*command: str) -> None:
    """Run a command of iproute2."""
    subprocess.run(command, check=True)


def card_in(namespace: str, number: int, rate: str) -> int:
    """Create a card in a namespace, with address and rate; return the file of its other side."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open() as home, Path("/run/netns", namespace).open() as away:
        if libc.setns(away.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {namespace} cannot be entered")
        try:
            side = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            kind = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
            fcntl.ioctl(side, TUNSETIFF, struct.pack("16sH22x", CARD.encode(), kind))
            fcntl.ioctl(side, TUNSETOFFLOAD, CHECKSUM | TSO4)
            run("ip", "link", "set", "lo", "up")
            run("ip", "link", "set", CARD, "address", mac(number).hex(":"))
            run("ip", "address", "add", f"{address(number)}/24", "dev", CARD)
            run("ip", "link", "set", CARD, "up")
            # The burst is one packet of the largest size, so that the card need not cut it.
            shape = ("rate", rate, "burst", "128kb", "latency", "500ms")
            run("tc", "qdisc", "add", "dev", CARD, "root", "tbf", *shape)
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)
    return side


def mac(number: int) -> bytes:
    """Return the hardware address of a rank's card."""
    return bytes((2, 0, 0, 0, 0, number))


def address(number: int) -> str:
    """Return the IP address of a rank."""
    return f"10.77.0.{number + 1}"


def relay(sides: list[int], delay: float) -> None:
    """Hand each packet to the cards that it is for, so many seconds after it was sent."""
    owner = {mac(number): side for number, side in enumerate(sides)}
    held: list[tuple[float, int, int, bytes]] = []  # when, in which order, to whom, a packet
    order = 0
    while True:
        wait = max(held[0][0] - time.monotonic(), 0) if held else None
        ready, _, _ = select.select(sides, [], [], wait)
        for side in ready:
            for _ in range(16):
                try:
                    packet = os.read(side, LARGEST)
                except (BlockingIOError, OSError):  # nothing more, or the card is down
                    break
                to = owner.get(packet[HEADER : HEADER + 6])
                for other in [to] if to is not None else [x for x in sides if x != side]:
                    order += 1
                    heapq.heappush(held, (time.monotonic() + delay, order, other, packet))
        while held and held[0][0] <= time.monotonic():
            _, _, side, packet = heapq.heappop(held)
            with contextlib.suppress(OSError):  # a card that is full, or down, loses packets
                os.write(side, packet)


@contextlib.contextmanager
def network(ranks: int, rate: str, delay: float) -> Iterator[list[str]]:
    """Yield the names of the ranks' namespaces, which are connected inside the `with`."""
    names = [f"fastattn{number}" for number in range(ranks)]
    with contextlib.ExitStack() as stack:
        for name in names:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
        sides = [card_in(name, number, rate) for number, name in enumerate(names)]
        for side in sides:
            stack.callback(os.close, side)
        child = os.fork()
        if child == 0:  # a process of its own: threads of one would wait for each other
            try:
                relay(sides, delay)
            finally:
                os._exit(0)
        stack.callback(os.waitpid, child, 0)
        stack.callback(os.kill, child, 9)
        yield names


def start(names: list[str], options: argparse.Namespace) -> list[subprocess.Popen[str]]:
    """Start the ranks."""
    asked = ["--ranks", options.ranks, "--rows", options.rows, "--rounds", options.rounds]
    asked += ["--cut"] if options.cut else []
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, __file__, "--rank", str(rank)]
            + [str(x) for x in asked],
            env=os.environ | {"FASTATTN_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CARD},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(names)
    ]


def seconds_of(call: Any, rounds: int, barrier: Any) -> float:
    """Return the median time of a call that ranks begin together."""
    times = []
    for _ in range(rounds):
        barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def rank_main(options: argparse.Namespace) -> None:
    """Be a rank; print what was measured, or how it ended, as JSON."""
    import torch
    from torch import distributed

    import fastattn
    import fastattn.distributed as fd

    rank, ranks = options.rank, options.ranks
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{address(0)}:{PORT}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    group = distributed.group.WORLD
    layout = fd.zigzag(options.rows * ranks, ranks)
    rng = np.random.default_rng(rank)
    shape = (1, options.heads, options.rows, options.head_dim)
    query, key, value = rng.standard_normal((3, *shape), np.float32)

    def call() -> Any:
        how = {"is_causal": options.is_causal, "timeout": 5.0 if options.cut else None}
        return fd.attention(query, key, value, comm=group, layout=layout, **how)

    if options.cut:
        begin, ended = time.monotonic(), "without an error"
        print(json.dumps({"rank": rank, "ready": True}), flush=True)
        try:
            while time.monotonic() - begin < 30:
                begin_of_call = time.monotonic()
                call()
        except Exception as error:
            took = time.monotonic() - begin_of_call
            ended = f"after {took:.1f} s of the call: {type(error).__name__}: {error}"
        print(json.dumps({"rank": rank, "ended": ended}), flush=True)
        os._exit(0)  # a group whose network is gone cannot be left in good order

    def alone() -> None:  # what a rank computes, with its own rows in the place of others'
        for _ in range(ranks):
            fastattn.attention(query, key, value, is_causal=False, return_lse=True)

    block = torch.empty(2, *shape)
    into = torch.empty_like(block)

    def travel() -> None:  # what a ring sends
        for _ in range(ranks - 1):
            sent = distributed.isend(block, (rank + 1) % ranks)
            distributed.recv(into, (rank - 1) % ranks)
            sent.wait()

    def empty() -> None:
        token = torch.zeros(1)
        other = (rank + 1) % ranks
        if rank == 0:
            distributed.send(token, other)
            distributed.recv(token, other)
        elif rank == 1:
            distributed.recv(token, 0)
            distributed.send(token, 0)

    for once in (call, travel):
        once()
    measured = {
        "computing": seconds_of(alone, options.rounds, distributed.barrier),
        "travelling": seconds_of(travel, options.rounds, distributed.barrier),
        "call": seconds_of(call, options.rounds, distributed.barrier),
        "round trip": seconds_of(empty, options.rounds, distributed.barrier),
    }
    if rank == 0:
        print(json.dumps(measured), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def report(measured: dict[str, float], options: argparse.Namespace) -> None:
    """Print the times, what of them was hidden, and what `plan` says."""
    import fastattn.distributed as fd

    computing, travelling, call = (measured[x] for x in ("computing", "travelling", "call"))
    pairs = options.rows**2 * options.ranks * options.heads
    steps = options.ranks - 1
    plan = fd.plan(
        fd.zigzag(options.rows * options.ranks, options.ranks),
        options.heads,
        options.heads,
        options.head_dim,
        flops=4 * pairs * options.head_dim / computing,
        bandwidth=8 * options.heads * options.rows * options.head_dim * steps / travelling,
        latency=measured["round trip"] / 2,
    )
    hidden = (computing + travelling - call) / min(computing, travelling)
    print(f"{options.ranks} ranks of {options.rows} rows, {options.rate}, {options.delay} ms")
    for name, x in measured.items():
        print(f"  {name:11} {x * 1e3:8.1f} ms")
    print(f"  hidden      {hidden:8.0%} of the shorter of computing and travelling")
    print(f"  plan        {plan['seconds'] * 1e3:8.1f} ms, {plan['seconds'] / call - 1:+.0%}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2048, help="of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate", default="1gbit", help="as tc writes it")
    parser.add_argument("--delay", type=float, default=1.0, help="milliseconds of a packet")
    parser.add_argument("--cut", action="store_true", help="take a card down in mid-call")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(heads=8, head_dim=64, is_causal=False)
    return parser


def main() -> None:
    """Build the network, start the ranks and tell what they told."""
    options = parser().parse_args()
    if options.rank is not None:
        rank_main(options)
        return
    with network(options.ranks, options.rate, options.delay / 1e3) as names:
        processes = start(names, options)
        if options.cut:
            for process in processes:
                assert process.stdout
                process.stdout.readline()
            time.sleep(2.1)
            run("ip", "-n", names[-1], "link", "set", CARD, "down")
            print(f"the card of rank {options.ranks - 1} is down")
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    if options.cut:
        for output in outputs:
            told = json.loads(output)
            print(f"rank {told['rank']} ended {told['ended']}")
    else:
        report(json.loads(outputs[0]), options)


if __name__ == "__main__":
    main()
