# SPDX-License-Identifier: Apache-2.0
"""Who runs when: cases and libraries in turn, so that a noisy machine is noisy for all of them.

Called by the command (`__init__.py`); starts a worker (worker.py) for each library. In each round
of a case the machine's limit is probed and every library has one turn, while all the others sleep.
What comes out is plain dicts, which report.py and chart.py show and a JSON file keeps.
"""

import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import fastattn
from fastattn.bench import rivals
from fastattn.bench.accuracy import expected, max_error
from fastattn.bench.cases import Case, work
from fastattn.bench.libraries import BESIDE_TORCH, NEEDS
from fastattn.bench.worker import start

PROBE_SECONDS = 0.06
BUSY = 0.05  # CPUs missing on average in a round that is called disturbed
LIMITS = {"cpu": ("float32", "float64", "bfloat16", "read"), "cuda": ("matmul", "copy")}
GPU_PACKAGES = ("numba-cuda", "cuda-bindings", "nvidia-nvvm")  # whose versions a report names too
BASELINE = "baseline"  # the name under which fastattn's other call of a case is kept
CPU_TIME = slice(11, 13)  # user and system, in /proc/PID/stat behind the name

Result = dict[str, Any]


@dataclass(frozen=True)
class Pace:
    """How long a run may take."""

    rounds: int = 5
    most_rounds: int = 8  # where other programs disturb; the least disturbed rounds count
    quiet_seconds: int = 10  # at most, to wait after a disturbed round
    turn_seconds: float = 0.25
    share_seconds: float = 4.0  # a library that used this much on a case takes no more turns
    patience_seconds: float = 60.0  # for one answer


PACE = Pace()
QUICK_PACE = Pace(
    rounds=3,
    most_rounds=4,
    quiet_seconds=3,
    turn_seconds=0.1,
    share_seconds=1.0,
    patience_seconds=20.0,
)
GPU_PATIENCE_SECONDS = 300.0  # kernels may have to be compiled, inputs are large


class Failure(Exception):
    """A library gave no answer; the message says why."""


class Member:
    """A library's worker; it starts at the first request, and again at the next after it died."""

    def __init__(
        self, library: str, threads: int, isa: str | None = None, device: str = "cpu"
    ) -> None:
        self._who = (library, threads, isa, device)
        self._process: Any = None
        self._connection: Any = None
        self._errors: IO[bytes]

    def ask(self, patience_seconds: float, request: str, *arguments: Any) -> Any:
        """Return the answer to a request, or raise Failure."""
        if self._process is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes it)
            self._process, self._connection = start(*self._who, self._errors)
        try:
            self._connection.send((request, *arguments))
            if not self._connection.poll(patience_seconds):
                self.close()
                raise Failure(f"no answer within {patience_seconds:g} s")
            succeeded, answer = self._connection.recv()
        except (EOFError, OSError):
            raise Failure(self._last_words()) from None
        if not succeeded:
            raise Failure(answer)
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._errors.close()
            self._process = None

    def ticks(self) -> int:
        """Return the CPU time that the process has used so far, if it lives."""
        return 0 if self._process is None else _ticks(f"/proc/{self._process.pid}/stat", CPU_TIME)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        if code == -signal.SIGKILL:
            return "killed, as happens when memory runs out"
        end = f"died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{end}: {lines[-1][:120]}" if lines else end


class Bench:
    """The workers of a run, until it is closed."""

    def __init__(
        self,
        libraries: Iterable[str],
        threads: int,
        pace: Pace,
        progress: Callable[[str], None],
        device: str = "cpu",
    ) -> None:
        self._libraries = list(libraries)
        self._threads = threads
        self._device = device
        self._pace = pace
        self._progress = progress
        self._members: dict[tuple[str, str, str | None], Member] = {}

    def close(self) -> None:
        """End the workers."""
        for member in self._members.values():
            member.close()

    def describe(self) -> Result:
        """Describe the GPU; raise Failure without one."""
        return dict(self._ask("fastattn", None, "describe"))

    def limits(self) -> dict[str, float]:
        """Measure the machine's limits."""
        found = {}
        for limit in LIMITS[self._device]:
            self._progress(f"limit of the machine: {limit}")
            with contextlib.suppress(Failure):  # the outcomes say why
                samples = [self._probe(None, limit) for _ in range(self._pace.rounds)]
                found[limit] = statistics.median(samples)
        return found

    def run(self, cases: Iterable[Case]) -> Iterator[Result]:
        """Measure one case after the other."""
        return map(self._run, cases)

    def _run(self, case: Case) -> Result:
        pace = self._pace
        self._progress(f"{case.name}: float64 reference")
        truth = expected(case)
        outcomes: dict[str, Result] = {}
        for library, its_case in self._asked(case).items():
            self._progress(f"{case.name}: {library}, first call")
            with self._reasons(outcomes, library):
                outcome, rows = self._ask(library, case, "prepare", its_case)
                its_truth = truth if its_case is case else expected(its_case)
                outcomes[library] = outcome | {"max_error": max_error(rows, its_truth)}
                if its_case is not case:
                    outcomes[library]["how"] += f", {its_case.name}"
        rounds: list[Result] = []
        used = {x: outcome.get("first_seconds", 0.0) for x, outcome in outcomes.items()}
        while _quiet(rounds) < pace.rounds and len(rounds) < pace.most_rounds:
            if rounds and not _quiet(rounds[-1:]):
                self._await_quiet()
            self._progress(f"{case.name}: round {len(rounds) + 1}")
            takers = [x for x, seconds in used.items() if seconds <= pace.share_seconds]
            rounds.append(self._round(case, takers, outcomes))
            if _quiet(rounds[-1:]):
                for library, samples in rounds[-1]["samples"].items():
                    used[library] += max(pace.turn_seconds, *samples)
        rounds.sort(key=lambda a_round: a_round["disturbance"])
        return _summary(case, rounds[: pace.rounds], outcomes)

    def _asked(self, case: Case) -> dict[str, Case]:
        """Return the case of each library; fastattn may have two, in two processes."""
        asked = {}
        for library in self._libraries:
            if not case.libraries or library in case.libraries:
                asked[library] = case
            if library == "fastattn" and case.baseline is not None:
                asked[BASELINE] = case.baseline
        return asked

    def _round(self, case: Case, libraries: list[str], outcomes: dict[str, Result]) -> Result:
        """Probe the limits and give a turn to each of the libraries that has not failed."""
        clocks = self._clocks()
        rates = {}
        with contextlib.suppress(Failure):  # fastattn's own outcome says why
            for limit in work(case):
                rates[limit] = self._probe(case, limit)
        samples = {}
        for library in libraries:
            if "failure" not in outcomes[library]:
                with self._reasons(outcomes, library):
                    turn = self._pace.turn_seconds
                    samples[library] = self._ask(library, case, "measure", turn)
        return {"disturbance": self._disturbance(clocks), "rates": rates, "samples": samples}

    @contextlib.contextmanager
    def _reasons(self, outcomes: dict[str, Result], library: str) -> Iterator[None]:
        try:
            yield
        except Failure as failure:
            outcomes[library] = {"failure": str(failure)}

    def _clocks(self) -> tuple[float, float]:
        """Return the seconds that CPUs have worked for other programs, and those of the clock."""
        busy = _ticks("/proc/stat", slice(1, 9)) - _ticks("/proc/stat", slice(4, 6))  # less idle
        for member in self._members.values():
            busy -= member.ticks()
        ours = os.times()
        return busy / os.sysconf("SC_CLK_TCK") - sum(ours[:4]), ours.elapsed

    def _disturbance(self, since: tuple[float, float]) -> float:
        """Tell how many CPUs were missing because other programs used them."""
        busy, wall = (now - then for now, then in zip(self._clocks(), since, strict=True))
        return max(busy / (wall or 1) - max((os.cpu_count() or 1) - self._threads, 0), 0.0)

    def _await_quiet(self) -> None:
        self._progress("waiting for other programs")
        for _ in range(self._pace.quiet_seconds):
            clocks = self._clocks()
            time.sleep(1)
            if self._disturbance(clocks) < BUSY:
                break

    def _ask(self, library: str, case: Case | None, request: str, *arguments: Any) -> Any:
        """Ask the library's process; fastattn has several, by instruction set, one with torch."""
        isa = None if case is None else case.isa
        worker = "fastattn" if library == BASELINE else library
        if worker == "fastattn" and case is not None and case.is_beside_torch:
            worker = BESIDE_TORCH
        member = library, worker, isa
        if member not in self._members:
            self._members[member] = Member(worker, self._threads, isa, self._device)
        return self._members[member].ask(self._pace.patience_seconds, request, *arguments)

    def _probe(self, case: Case | None, limit: str) -> float:
        return float(self._ask("fastattn", case, "probe", limit, PROBE_SECONDS))


def _quiet(rounds: list[Result]) -> int:
    return sum(a_round["disturbance"] < BUSY for a_round in rounds)


def _ticks(file: str, fields: slice) -> int:
    """Sum fields of a file that counts CPU time; they follow a name that may have blanks."""
    return sum(map(int, Path(file).read_text().splitlines()[0].rpartition(")")[2].split()[fields]))


def _summary(case: Case, rounds: list[Result], outcomes: dict[str, Result]) -> Result:
    """Put medians beside the raw samples."""
    amounts = work(case)
    rates = {
        limit: statistics.median(found)
        for limit in amounts
        if (found := [x["rates"][limit] for x in rounds if limit in x["rates"]])
    }
    least = None  # seconds, where the machine's limits are known
    if amounts and amounts.keys() == rates.keys():
        least = sum(amounts[limit] / rates[limit] for limit in amounts)
    for library, outcome in outcomes.items():
        if "failure" not in outcome:
            samples = [s for x in rounds for s in x["samples"].get(library, ())]
            seconds = statistics.median(samples or [outcome["first_seconds"]])
            outcome |= {"seconds": seconds, "percent": least and 100 * least / seconds}
    fastest = outcomes.get("fastattn", {}).get("seconds")
    for library, outcome in outcomes.items():
        if fastest and library != "fastattn" and "seconds" in outcome:
            outcome["speedup"] = outcome["seconds"] / fastest
    return {
        "name": case.name,
        "isa": case.isa,
        "device": case.device,
        "title": case.title,
        "work": amounts,
        "pairs": case.batch * case.q_heads * case.q_len * case.kv_len,
        "limits": rates,
        "rounds": rounds,
        "floor": asdict(case.floor),
        "libraries": outcomes,
    }


def pace(quick: bool, device: str) -> Pace:
    """Return how long a run may take."""
    chosen = QUICK_PACE if quick else PACE
    return replace(chosen, patience_seconds=GPU_PATIENCE_SECONDS) if device == "cuda" else chosen


def description(libraries: Iterable[str], threads: int, device: str = "cpu") -> Result:
    """Say what is compared, and on what."""
    names = [name for library in libraries for name in NEEDS.get(library, (library,))]
    names += GPU_PACKAGES if device == "cuda" else ()
    versions = {name: _version(name) for name in names}
    versions |= {name: rivals.version(name) for name in libraries if name in rivals.PREPARE}
    machine = dict(fastattn.info()) | {"threads": threads}
    return {"machine": machine, "versions": versions}


def _version(name: str) -> str:
    """Return the version of the distribution that has the module; their names may differ."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"
