#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How well a machine with many cores would be used, computed without having one.

Which threads share a call, into which items it is cut and what waits for what, the library decides
by arithmetic (cpp/schedule.h), which can be asked about any number of threads. Here the items are
given to threads as a real call does, and the time that threads would stand idle is counted::

    python benchmarks/schedule.py            # all cases of the suites, and some more
    python benchmarks/schedule.py --guard    # exit with 1 if a case leaves too much idle
    python benchmarks/schedule.py --measure  # compare with the clock, at 1 and 2 threads
    python benchmarks/schedule.py --measure --threads 4,8 --case gpt2-1k --case varlen

Efficiency is the work, in seconds of one thread, over the threads times the time of the call. A
call whose work is less than 10 us for each thread cannot use them all: it counts against the team
that was chosen for it, which * marks. Waking a team is no part of efficiency but of the times in
milliseconds: a thread that is awake wakes another in 10 us.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import itertools
import re
import statistics
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import fastattn
from fastattn import _core
from fastattn.bench import cases
from fastattn.bench.calls import CALLS
from fastattn.bench.processor import FLUSH_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Call = Callable[[], Any]

THREADS = (1, 2, 8, 32, 64, 96)
LEAST = {32: 0.85, 96: 0.70}  # efficiency that the guard asks for
# Families of cases that have less at 96 threads, at most three: how much they have, and why. What
# is never cut keeps bits from depending on threads; cut finer, threads would read the same keys.
EXCEPTIONS = {
    r"decode-4k.*": (0.33, "splits of 1024 keys are never cut: 32 of 8 heads"),
    r"decode-8k.*|decode-mla|draft-\d+-gqa.*": (0.66, "splits are never cut: 64 of 8 heads"),
    r"growth-1k": (0.66, "vectors of 16 rows are never cut: 128 of 2 heads"),
}
WAKING_SECONDS = 10e-6  # of one thread by another, which then both wake the next
RISING_SECONDS = 50e-6  # the same, of one that has slept for milliseconds
SHARE_SECONDS = 10e-6  # of work for each thread: less is not worth waking it
MEASURED, TOLERANCE = (1, 2), 0.10  # threads, unless told otherwise, and of a prediction there


class Phase(NamedTuple):
    """What the threads of a team share: items, taken in order, each some steps long."""

    threads: int
    first_step: Array  # of each item, and one past the last step
    seconds: Array  # of each step, on one thread
    place: Array  # where a step must wait for its turn; -1: nowhere
    turn: Array


class Plan(NamedTuple):
    """How a call of the core is done: phase after phase."""

    scratch_bytes: int
    phases: list[Phase]

    @property
    def seconds(self) -> float:
        """The work, on one thread."""
        return float(sum(phase.seconds.sum() for phase in self.phases))


def plans_of(call: Call, threads: int) -> list[Plan]:
    """Plan what `call` asks of the core, for so many threads, instead of computing it."""
    return [
        Plan(scratch_bytes, [Phase(*phase) for phase in phases])
        for scratch_bytes, phases in _core.schedule(call, threads)
    ]


def finished(phase: Phase, ready: Sequence[float]) -> float:
    """Return when the last thread ends; ready: when each may begin.

    A thread takes the next item when it is free. A step that has a place ends after those that
    have lower turns there, and its thread waits.
    """
    first, seconds = phase.first_step.tolist(), phase.seconds.tolist()
    place, needed = phase.place.tolist(), _lower_turns(phase).tolist()
    ended: dict[int, int] = defaultdict(int)
    waiting: dict[int, list[int]] = defaultdict(list)
    events = [(begin, thread) for thread, begin in enumerate(ready)]
    heapq.heapify(events)
    step, last = [-1] * len(ready), [-1] * len(ready)  # of each thread: its step, its item's last
    items, end = iter(itertools.pairwise(first)), min(ready)
    while events:
        now, thread = heapq.heappop(events)
        at = step[thread]
        if at >= 0:
            where = place[at]
            if where >= 0:
                if ended[where] < needed[at]:
                    waiting[where].append(thread)
                    continue
                ended[where] += 1
                for other in waiting.pop(where, ()):
                    heapq.heappush(events, (now, other))
            end = max(end, now)
        if at == last[thread]:
            begin, past = next((x for x in items if x[0] < x[1]), (-1, 0))
            step[thread], last[thread] = begin, past - 1
            if begin < 0:
                continue
        else:
            step[thread] += 1
        heapq.heappush(events, (now + seconds[step[thread]], thread))
    if any(waiting.values()):
        raise ValueError("a step waits for one that never ends")
    return end


def _lower_turns(phase: Phase) -> Array:
    """Count for each step those that have a lower turn at its place."""
    order = np.lexsort((phase.turn, phase.place))
    place, turn = phase.place[order], phase.turn[order]
    index = np.arange(len(order))
    new_place = np.diff(place, prepend=-2) != 0
    new_turn = new_place | (np.diff(turn, prepend=-1) != 0)
    lower = np.empty(len(order), np.int64)
    lower[order] = np.maximum.accumulate(np.where(new_turn, index, 0)) - np.maximum.accumulate(
        np.where(new_place, index, 0)
    )
    return lower


def duration(plans: Sequence[Plan], waking_seconds: float = WAKING_SECONDS) -> float:
    """Return how long a call takes. Its team wakes at the beginning, and stays awake."""
    whole = 0.0
    for plan in plans:
        now = 0.0
        for phase in plan.phases:
            waking = (waking_seconds * thread.bit_length() for thread in range(phase.threads))
            now = finished(phase, [max(now, awake) for awake in waking])
        whole += now
    return whole


class Usage(NamedTuple):
    """How a machine is used."""

    seconds: float  # of the call, if its team sleeps before
    team: int  # the largest
    efficiency: float
    is_small: bool  # and counts against its team, not against the machine


def usage(plans: Sequence[Plan], threads: int) -> Usage:
    """Say how a call uses a machine with so many threads."""
    work, awake = sum(plan.seconds for plan in plans), duration(plans, 0.0)
    team = max((phase.threads for plan in plans for phase in plan.phases), default=1)
    is_small = work < SHARE_SECONDS * threads * len(plans)
    of = team if is_small else threads
    efficiency = work / (of * awake) if awake else 1.0
    return Usage(duration(plans), team, efficiency, is_small)


@dataclass(frozen=True)
class Job:
    """A call that is planned or measured."""

    name: str
    prepare: Callable[[bool], Call]  # whether with numbers, or with memory that nothing touches
    isa: str | None = None
    is_cold: bool = False  # other memory is read before each call, while the team sleeps


def of_case(case: cases.Case) -> Job:
    """Call what `fastattn bench` calls."""

    def prepare(with_numbers: bool) -> Call:
        inputs = cases.make_inputs(case) if with_numbers else _untouched(case)
        return CALLS[case.call](case, inputs).call

    return Job(case.name, prepare, case.isa, "read" in case.bound_by)


def _untouched(case: cases.Case) -> cases.Inputs:
    """Give operands like those of make_inputs, whose memory is not there until it is written."""
    dtype = cases.numpy_dtype(case.dtype)

    def zeros(heads: int, rows: int) -> Array:
        if case.call == "views":  # which turns them
            return np.zeros((case.batch, rows, heads, case.head_dim), dtype).swapaxes(1, 2)
        return np.zeros((case.batch, heads, rows, case.head_dim), dtype)

    kv_heads = case.kv_heads or case.q_heads
    query, grad_out = (zeros(case.q_heads, case.q_len) for _ in range(2))
    key, value = (zeros(kv_heads, case.kv_len) for _ in range(2))
    mask = bias = None
    if case.lengths:
        mask = np.arange(case.kv_len) < np.array(case.lengths)[:, None, None, None]
    if case.bias:
        bias = np.zeros((1, case.q_heads, case.q_len, case.kv_len), dtype)
    differentiates = case.call == "backward"
    return cases.Inputs(query, key, value, mask, bias, grad_out if differentiates else None)


def _of_shape(
    name: str,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value_head_dim: int = 0,
    dtype: str = "float32",
    from_memory: bool = False,
    **options: Any,
) -> Job:
    """Call `attention` with operands of these shapes."""
    value = (*key[:-1], value_head_dim or key[-1])

    def prepare(with_numbers: bool) -> Call:
        rng, kind = np.random.default_rng(1), cases.numpy_dtype(dtype)

        def operand(shape: tuple[int, ...]) -> Array:
            if not with_numbers:
                return np.zeros(shape, kind)
            return rng.standard_normal(shape, np.float32).astype(kind)

        operands = [operand(shape) for shape in (query, key, value)]
        return lambda: fastattn.attention(*operands, **options)

    return Job(name, prepare, is_cold=from_memory)


def more_jobs() -> list[Job]:
    """Shapes that leave threads idle easily."""
    short = np.arange(64) * 37 % 448 + 64
    return [
        of_case(
            cases.Case(
                "gradient-140k-window", 140_000, 140_000, 2, 64, window=(64, 0), call="backward"
            )
        ),
        _of_shape("decode-mla", (1, 128, 1, 576), (1, 1, 8192, 576), 512, "bfloat16"),
        _of_shape("128-queries-100k-keys", (1, 1, 128, 64), (1, 1, 100_000, 64)),
        _of_shape("17-queries-1m-keys", (1, 1, 17, 64), (1, 1, 1_000_000, 64), from_memory=True),
        _of_shape(
            "first-is-empty",
            (8, 12, 512, 64),
            (8, 12, 512, 64),
            kv_lengths=np.array([0, *[512] * 7]),
        ),
        _of_shape(
            "decode-64-short",
            (64, 32, 1, 128),
            (64, 8, 512, 128),
            dtype="bfloat16",
            from_memory=True,
            kv_lengths=short,
        ),
    ]


def suite_jobs() -> list[Job]:
    """All that `fastattn bench` measures on a CPU, if this one can run it.

    Left out is what the same call finds after idleness or after another library.
    """
    found = [case for suite in cases.SUITES.values() for case in suite]
    isas = (None, *_core.supported_isas())
    has_torch = importlib.util.find_spec("torch") is not None
    return [
        of_case(case)
        for case in found
        if case.isa in isas
        and not (case.sleep_ms or case.before)
        and (has_torch or not case.is_beside_torch)
    ]


def planned(job: Job, threads: Sequence[int]) -> Iterator[tuple[int, list[Plan]]]:
    """Plan the call for each number of threads."""
    _core.set_isa(job.isa)
    try:
        made: list[Call] = []
        _core.schedule(lambda: made.append(job.prepare(False)), 1)  # what comes before the call
        for n in threads:
            yield n, plans_of(made[0], n)
    finally:
        _core.set_isa(None)


def faults(name: str, used: dict[int, Usage]) -> list[str]:
    """Say where a call uses a machine too badly."""
    found = (x for family, (x, _) in EXCEPTIONS.items() if re.fullmatch(family, name))
    least = LEAST | {96: next(found, LEAST[96])}
    return [
        f"{name}: {100 * used[n].efficiency:.0f} % of {n} threads, not {100 * least[n]:.0f} %"
        for n in least
        if n in used and used[n].efficiency < least[n]
    ]


def show(jobs: Sequence[Job], threads: Sequence[int]) -> list[str]:
    """Print the table; return what is wrong."""
    wrong: list[str] = []
    width = max(len(job.name) for job in jobs)
    shown = (f"{n:>8}" for n in (*threads, f"{threads[0]}: ms", f"{threads[-1]}: ms"))
    say(f"{'efficiency / team':{width}}", *shown)
    for job in jobs:
        used = {n: usage(plans, n) for n, plans in planned(job, threads) if plans}
        if not used:
            say(f"{job.name:{width}}  computes nothing")
            continue
        row = [
            f"{100 * x.efficiency:.0f}{'*' if x.is_small else '%'}/{x.team}" for x in used.values()
        ]
        ends = used[threads[0]], used[threads[-1]]
        milliseconds = (f"{1e3 * x.seconds:8.3g}" for x in ends)
        say(f"{job.name:{width}}", *(f"{x:>8}" for x in row), *milliseconds)
        wrong += faults(job.name, used)
    say("* too small for all threads: of the team that was chosen")
    say(f"ms: with {1e6 * WAKING_SECONDS:.0f} us for one thread to wake another")
    for family, (least, why) in EXCEPTIONS.items():
        say(f"{family}: at 96 threads {100 * least:.0f} % will do: {why}")
    return wrong


class Comparison(NamedTuple):
    """Seconds of a call with so many threads, as they were predicted and as they were measured."""

    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """By how much the prediction is too long."""
        return self.predicted / self.measured - 1


def measure(job: Job, threads: Sequence[int], seconds: float) -> dict[int, Comparison]:
    """Predict a call from the times of its items, and time it, in turn.

    Threads share memory, caches and power, and slow each other down. So an item's time for n
    threads is what it takes beside n - 1 others that do the same, each alone, with their own
    operands. The prediction adds what the library decides: who does which item when.
    """
    _core.set_isa(job.isa)
    usual = fastattn.get_num_threads()
    try:
        waking = RISING_SECONDS if job.is_cold else WAKING_SECONDS
        timers = [_Timer(job.prepare(True), job.is_cold) for _ in range(max(threads))]
        recordings: dict[int, list[_Recording]] = {n: [] for n in threads}
        samples: dict[int, list[float]] = {n: [] for n in threads}
        begin = time.perf_counter()
        while len(samples[threads[0]]) < 3 or time.perf_counter() - begin < seconds:
            for n in threads:
                fastattn.set_num_threads(n)
                beside = timers[0].recorded().beside
                recordings[n] += [x._replace(beside=beside) for x in _recorded_at_once(timers[:n])]
                samples[n].append(timers[0].timed())
        return {
            n: Comparison(
                _predicted(plans_of(timers[0].call, n), recordings[n], waking),
                statistics.median(samples[n]),
            )
            for n in threads
        }
    finally:
        fastattn.set_num_threads(usual)
        _core.set_isa(None)


class _Recording(NamedTuple):
    """A call whose items ran one after the other."""

    items: list[Array]  # the seconds of each item, for each phase
    beside: float  # the seconds of all else


class _Timer:
    """Times a call, and the items that it is made of; cold: its operands are in no cache."""

    def __init__(self, call: Call, cold: bool) -> None:
        self.call = call
        self._flushed = np.ones(FLUSH_BYTES // 8) if cold else None
        self._loops = 1
        self.timed()  # the first call is slower
        if not cold:  # one that is too short for the clock is repeated
            self._loops = max(1, int(1e-3 / self.timed()))

    def timed(self, begins: threading.Barrier | None = None) -> float:
        """Return the seconds of a call, which begins when `begins` lets it."""
        if self._flushed is not None:
            self._flushed.sum()
        if begins is not None:
            begins.wait()
        begin = time.perf_counter()
        for _ in range(self._loops):
            self.call()
        return (time.perf_counter() - begin) / self._loops

    def recorded(self, begins: threading.Barrier | None = None) -> _Recording:
        """Return the seconds of a call's items."""
        _core.record_items(True)
        try:
            seconds = self.timed(begins)
            phases = [x for x in _core.recorded_items() if x.size]
        finally:
            _core.record_items(False)
        each = len(phases) // self._loops
        items = [np.mean(phases[i::each], axis=0) for i in range(each)]
        return _Recording(items, seconds - sum(x.sum() for x in items))


def _recorded_at_once(timers: Sequence[_Timer]) -> list[_Recording]:
    """Record each in a thread of its own."""
    begins = threading.Barrier(len(timers))
    with ThreadPoolExecutor(len(timers)) as pool:
        return list(pool.map(lambda timer: timer.recorded(begins), timers))


def _predicted(plans: list[Plan], recordings: list[_Recording], waking: float) -> float:
    """Give the items to threads with the times that were recorded."""
    items = [np.median(phase, axis=0) for phase in zip(*(x.items for x in recordings), strict=True)]
    recorded = iter(items)
    timed = []
    for plan in plans:
        phases = []
        for phase in plan.phases:
            if len(phase.first_step) == 1:  # it has no items
                continue
            seconds = next(recorded)
            if len(seconds) != len(phase.first_step) - 1:
                raise ValueError(f"{len(seconds)} items ran, of {len(phase.first_step) - 1}")
            phases.append(phase._replace(seconds=_spread(phase, seconds)))
        timed.append(plan._replace(phases=phases))
    return duration(timed, waking) + statistics.median(x.beside for x in recordings)


def _spread(phase: Phase, seconds: Array) -> Array:
    """Give each step its part of its item's seconds, in proportion to the arithmetic."""
    steps = np.diff(phase.first_step)
    item = np.repeat(np.arange(len(steps)), steps)
    of_item = np.bincount(item, phase.seconds, len(steps))
    parts: Array = phase.seconds / of_item[item] * seconds[item]
    return parts


def compare(jobs: Sequence[Job], threads: Sequence[int], seconds: float) -> list[str]:
    """Print predictions beside measurements; return which are too far apart."""
    wrong: list[str] = []
    worst = 0.0
    width = max(len(job.name) for job in jobs)
    say(f"{'predicted, measured':{width}}", *(f"{n:>8} thread{'s' * (n > 1):14}" for n in threads))
    for job in jobs:
        if not any(plans for _, plans in planned(job, threads)):
            say(f"{job.name:{width}}  computes nothing")
            continue
        row = []
        for n, found in measure(job, threads, seconds).items():
            worst = max(worst, abs(found.error))
            row.append(
                f"{1e3 * found.predicted:8.3g} {1e3 * found.measured:8.3g} ms {found.error:+5.0%}"
            )
            if abs(found.error) > TOLERANCE:
                wrong.append(f"{job.name}: {found.error:+.0%} at {n} threads")
        say(f"{job.name:{width}}", *row)
    say(f"worst: {worst:.0%}")
    return wrong


def say(*words: str) -> None:
    """Print a line at once."""
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Print what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--guard", action="store_true", help="exit with 1 if a case uses a machine too badly")
    add("--measure", action="store_true", help="compare predictions with the clock")
    add("--seconds", type=float, default=3.0, help="to measure each case (%(default)s)")
    add("--threads", metavar="A,B", help="these numbers of threads alone")
    add("--case", action="append", metavar="NAME", help="this case alone; may be repeated")
    options = parser.parse_args()
    jobs = {job.name: job for job in (*suite_jobs(), *more_jobs())}
    for name in options.case or ():
        if name not in jobs:
            parser.error(f"--case must be one of {', '.join(jobs)}, got {name}")
    chosen = [jobs[name] for name in options.case or jobs]
    threads = [int(n) for n in options.threads.split(",")] if options.threads else None
    if options.measure:
        wrong = compare(chosen, threads or MEASURED, options.seconds)
    else:
        wrong = show(chosen, threads or THREADS)
    if options.guard or options.measure:
        sys.stderr.write("".join(f"{each}\n" for each in wrong))
        return int(bool(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
