# SPDX-License-Identifier: Apache-2.0
"""How a run is shown to a person: tables in text or Markdown.

Called by the command (`__init__.py`) with the dicts that measure.py makes or a JSON file keeps.
"""

from typing import Any

from fastattn.bench.measure import BASELINE, BUSY, Result

TOLERANCE_POINTS = 2.0  # a floor missed by less counts as met
PLAIN = ("fastattn", BASELINE, "numpy")  # these are no peers
UNITS = {  # of each limit: the divisor of a second's work, and its unit then
    "float32": (1e9, "GFLOP/s", "fp32 FMA"),
    "float64": (1e9, "GFLOP/s", "fp64 FMA"),
    "bfloat16": (1e9, "GFLOP/s", "bf16 dot"),
    "read": (1e9, "GB/s", "memory read"),
    "matmul": (1e12, "TFLOP/s", "bf16 matrix product"),
    "copy": (1e9, "GB/s", "memory copy"),
}
MEGAHERTZ = {"clock_mhz": "", "memory_clock_mhz": " memory"}
NOISY = 1.1  # ratio of the limit's extremes from which a run is called noisy
Rows = list[list[str]]


def duration(seconds: float) -> str:
    """Write a time with three digits: 1.23 ms."""
    size, unit = (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    return f"{_digits(seconds / size)} {unit}"


def memory(size: int | None) -> str:
    """Write a number of bytes: 1.2 MiB."""
    if size is None:
        return "-"
    mebibytes = size / 2**20
    return f"{mebibytes:.1f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def percent(outcome: Result) -> str:
    """Write how much of the limit was reached, if it is known."""
    share = outcome.get("percent")
    if share is None:
        return "-"
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %"


def limits(rates: dict[str, float]) -> str:
    """Write the machine's limits in one line."""
    return ", ".join(_in_units(limit, rate) for limit, rate in rates.items())


def _in_units(limit: str, *rates: float) -> str:
    size, unit, what = UNITS[limit]
    return f"{' to '.join(f'{rate / size:.4g}' for rate in rates)} {unit} {what}"


def place(run: Result) -> str:
    """Name the CPU or GPU of the run in short."""
    machine = run["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"


def heading(run: Result) -> str:
    """Describe the machine, the libraries and the machine's limits."""
    machine, versions = run["machine"], run["versions"]
    return "\n".join(
        (
            *_gpu(machine),
            f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, "
            f"{machine['platform']}, Python {machine['python']}",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            *(
                f"left out: {library}, which needs {' and '.join(modules)}"
                for library, modules in run.get("left_out", {}).items()
            ),
            f"limits: {limits(run['limits'])}",
        )
    )


def _gpu(machine: Result) -> list[str]:
    """Describe the GPU in a line, if the run was on one."""
    if "gpu" not in machine:
        return []
    known = [
        machine["gpu"],
        f"compute capability {machine['compute_capability']}",
        f"{machine['multiprocessors']} multiprocessors",
        memory(machine["gpu_memory_bytes"]),
    ]
    clocks = [f"{machine[x]} MHz{of}" for x, of in MEGAHERTZ.items() if x in machine]
    if clocks:
        known.append(f"at most {', '.join(clocks)}")
    if "power_limit_w" in machine:
        known.append(f"{machine['power_limit_w']} W")
    known += [f"driver {machine['driver']}"] if "driver" in machine else []
    return [", ".join((*known, f"CUDA {machine['cuda']}"))]


def block(result: Result) -> str:
    """Show one case, a line per library."""
    title = result["title"].replace("\n", ", ")
    header = ["", "time", "of limit", "fastattn is", "max error", "extra memory", ""]
    rows = [header, *(_line(*item) for item in result["libraries"].items())]
    if _on_gpu(result):
        shown = (_rate(result, outcome) for outcome in result["libraries"].values())
        for row, cell in zip(rows, ("rate", *shown), strict=True):
            row.insert(2, cell)
    name = "" if title == result["name"] else f"{result['name']}: "
    return "\n".join((name + title, *(_aligned(rows, left=(0, len(rows[0]) - 1)))))


def _on_gpu(result: Result) -> bool:
    return bool(result.get("device") == "cuda")


def _rate(result: Result, outcome: Result) -> str:
    """Write the work per second, if it is of one kind."""
    if "seconds" not in outcome or len(result["work"]) != 1:
        return "-"
    [(limit, amount)] = result["work"].items()
    size, unit, _ = UNITS[limit]
    return f"{_digits(amount / outcome['seconds'] / size)} {unit}"


def _cell(result: Result, outcome: Result) -> str:
    """Write the share of the limit that a library reaches; on a GPU the rate; and its time."""
    share, seconds = percent(outcome), duration(outcome["seconds"])
    if _on_gpu(result):
        share = _rate(result, outcome)
        if share == "-":
            return seconds
    return f"{share} ({seconds})"


def _line(library: str, outcome: Result) -> list[str]:
    if "failure" in outcome:
        return [library, "-", "-", "-", "-", "-", outcome["failure"]]
    return [
        library,
        duration(outcome["seconds"]),
        percent(outcome),
        _speedup(outcome["speedup"]) + " as fast" if "speedup" in outcome else "",
        f"{outcome['max_error']:.1e}",
        memory(outcome["extra_bytes"]),
        outcome["how"],
    ]


def table(run: Result, markdown: bool) -> str:
    """Show all cases of a run, a line per case, with what is missing explained below."""
    libraries = shown_libraries(run)
    reasons: dict[str, int] = {}
    rows = [["case", *libraries, "speed-up", "max error", "extra memory"]]
    for result in run["results"]:
        outcomes = result["libraries"]
        row = [result["title"].replace("\n", ", ")]
        for library in libraries:
            outcome = outcomes.get(library)
            if outcome is None:  # the case is not for this library
                row.append("")
            elif "failure" in outcome:
                reason = f"{library}: {outcome['failure']}"
                row.append(f"- [{reasons.setdefault(reason, len(reasons) + 1)}]")
            else:
                row.append(_cell(result, outcome))
        ours = outcomes.get("fastattn", {})
        peer = best_peer(outcomes)
        row.append(f"{_speedup(outcomes[peer]['speedup'])} {peer}" if peer else "-")
        row.append(f"{ours['max_error']:.1e}" if "max_error" in ours else "-")
        row.append(memory(ours.get("extra_bytes")))
        rows.append(row)
    notes = [f"[{number}] {reason}" for reason, number in reasons.items()] + _noise(run)
    if not markdown:
        return "\n".join((*_aligned(rows), *notes))
    for row in rows[1:]:
        row[1] = f"**{row[1]}**"
    rows.insert(1, ["---", *(["---:"] * (len(rows[0]) - 1))])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    about = (*heading(run).splitlines(), f"`{run['command']}`")
    return "\n\n".join(("\n".join(lines), *notes, *about))


def shown_libraries(run: Result) -> list[str]:
    """Name the libraries of all cases: fastattn, its baseline, then the others."""
    named = dict.fromkeys(x for result in run["results"] for x in result["libraries"])
    return sorted(named, key=lambda x: ("fastattn", BASELINE, x).index(x))


def best_peer(outcomes: Result) -> str | None:
    """Name the fastest of the peers; None if there is none."""
    peers = set(outcomes) - set(PLAIN)
    times = {x: outcomes[x]["speedup"] for x in peers if "speedup" in outcomes[x]}
    return min(times, key=times.__getitem__, default=None)


def floors(run: Result) -> tuple[str, bool]:
    """
    Compare the results with fastattn's promises; the second item tells whether all are kept.

    The text is empty if no case has a promise.
    """
    on_gpu = any(map(_on_gpu, run["results"]))
    rows = [
        [
            *("case", "of limit", "floor"),
            *(("rate", "floor", "launch", "floor") if on_gpu else ()),
            *("speed-up", "floor", "extra memory", "floor", "verdict"),
        ]
    ]
    kept = True
    for result in run["results"]:
        floor, outcomes = result["floor"], result["libraries"]
        if not any(floor.values()):
            continue
        ours = outcomes.get("fastattn", {})
        peer = best_peer(outcomes)
        named = [(peer or x if x == "best" else x, least) for x, least in floor["speedups"].items()]
        shown = named or ([(peer, None)] if peer else [])
        speedups = {x: outcomes.get(x, {}).get("speedup") for x, _ in shown}
        extra = ours.get("extra_bytes")
        short = [  # by how many points (of percent, hundredths of a ratio) each promise is missed
            (floor["percent"], ours.get("percent"), 1.0),
            *((least, speedups[x], 100.0) for x, least in named),
            (
                floor["extra_mebibytes"] and -floor["extra_mebibytes"],
                None if extra is None else -extra / 2**20,
                100.0,
            ),
        ]
        row = [
            result["name"],
            percent(ours),
            f"{floor['percent']} %" if floor["percent"] else "",
            ", ".join(f"{_speedup(y) if y else '-'} {x}" for x, y in speedups.items()) or "-",
            ", ".join(f"{least:.3g}x" for _, least in named),
            memory(extra),
            f"{floor['extra_mebibytes']:g} MiB" if floor["extra_mebibytes"] else "",
        ]
        if on_gpu:
            cells, more = _gpu_floors(result)
            row[3:3] = cells
            short += more
        row.append(verdict([(least, got, points) for least, got, points in short if least]))
        if floor.get("gpu", "") not in run["machine"].get("gpu", ""):
            row[-1] = f"for {floor['gpu']}: {row[-1]}"
        elif row[-1] not in ("met", "within 2 points"):
            kept = False
        rows.append(row)
    if not rows[1:]:
        return "", True
    return "\n".join((*_aligned(rows, left=(0, len(rows[0]) - 1)), *_noise(run))), kept


def _gpu_floors(result: Result) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Show the floors that only GPUs have; return them as `verdict` takes them, too.

    Two percent of a floor count as its two points.
    """
    floor, outcomes = result["floor"], result["libraries"]
    ours = outcomes.get("fastattn", {})
    tflops = launch = None
    if "seconds" in ours and "matmul" in result["work"]:
        tflops = result["work"]["matmul"] / ours["seconds"] / 1e12
    theirs = [
        x["seconds"] for name, x in outcomes.items() if name.startswith("torch") and "seconds" in x
    ]
    if "seconds" in ours and theirs:
        launch = (ours["seconds"] - min(theirs)) * 1e6
    least, most = floor["tflops"], floor["launch_microseconds"]
    cells = [
        _rate(result, ours),
        f"{least:g} TFLOP/s" if least else "",
        f"{launch:+.1f} us" if most and launch is not None else "",
        f"{most:g} us" if most else "",
    ]
    return cells, [
        (least, tflops, 100 / (least or 1)),
        (most and -most, None if launch is None else -launch, 100 / (most or 1)),
    ]


def verdict(promises: list[tuple[float, float | None, float]]) -> str:
    """Judge (least, measured, points per unit) of each promise: the worst of them counts."""
    if any(got is None for _, got, _ in promises):
        return "not measured"
    short = max((least - (got or 0.0)) * points for least, got, points in promises)
    return "met" if short <= 0 else "within 2 points" if short < TOLERANCE_POINTS else "missed"


def growth(run: Result) -> str:
    """Show the time per pair of a query and a key, which should not grow with the length."""
    libraries = shown_libraries(run)
    rows = [["ns per query-key pair", *libraries]]
    for result in run["results"]:
        row = [result["title"].replace("\n", ", ")]
        for library in libraries:
            seconds = result["libraries"].get(library, {}).get("seconds")
            row.append(_digits(seconds * 1e9 / result["pairs"]) if seconds else "-")
        rows.append(row)
    return "\n".join(_aligned(rows))


def _noise(run: Result) -> list[str]:
    """Warn if the machine's limit was not the same all the time."""
    notes = []
    rounds = [x["disturbance"] for result in run["results"] for x in result["rounds"]]
    if disturbed := sum(disturbance > BUSY for disturbance in rounds):
        notes.append(f"Other programs disturbed {disturbed} of {len(rounds)} rounds.")
    rates: dict[str, list[float]] = {}
    for result in run["results"]:
        if result["isa"] is None:
            for limit, rate in result["limits"].items():
                rates.setdefault(limit, []).append(rate)
    return notes + [
        f"The machine was not quiet: its limit varied from {_in_units(limit, min(r), max(r))}."
        for limit, r in rates.items()
        if max(r) > NOISY * min(r)
    ]


def _speedup(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _digits(value: float) -> str:
    """Write three digits, or all those before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _aligned(rows: Rows, left: tuple[int, ...] = (0,)) -> list[str]:
    """Pad the cells to columns; those in `left` begin together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells: list[Any] = [
            f"{cell:{'<' if i in left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
