# SPDX-License-Identifier: Apache-2.0
"""Measure how fast exact attention is on this machine, in fastattn and in other libraries.

The command `fastattn bench`, called by `__main__.py`. cases.py says what is measured, calls.py how
fastattn is called, libraries.py how each other library is, rivals.py how those are that are
installed apart, operands.py what all of these need. worker.py calls one library in a process of its
own, measure.py gives the workers turns, accuracy.py compares results with float64, report.py and
chart.py show them. processor.py has what is measured differently on the CPU than on a GPU (gpu.py);
gpu_libraries.py calls libraries there. This process itself never touches CUDA.
benchmarks/README.md explains the method and how to read the tables.
"""

import argparse
import importlib.util
import json
import shlex
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import IO

import fastattn
from fastattn.bench import cases, chart, measure, report, rivals
from fastattn.bench.libraries import LIBRARIES, missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    suites = [name for suites in cases.SUITES_OF.values() for name in suites]
    add("--device", choices=cases.SUITES_OF, default="cpu", help="where to measure (cpu)")
    add("--suite", choices=suites, help="which cases (familiar; with --device cuda: gpu)")
    add("--case", action="append", metavar="NAME", help="this case alone; may be repeated")
    add("--libraries", metavar="A,B", help="compare with these alone (all that are installed)")
    threads = fastattn.get_num_threads()
    add("--threads", type=int, help=f"({threads}; with --device cuda: 1)")
    add("--quick", action="store_true", help="fewer cases and turns, under a minute")
    add("--json", type=Path, metavar="FILE", help="keep every sample there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results there")
    add("--markdown", action="store_true", help="print the table as Markdown, all else to stderr")
    add("--check", action="store_true", help="exit with 1 if a floor is missed")
    add("--from", type=Path, metavar="FILE", dest="source", help="show a kept JSON file instead")


def main(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    interrupted = False
    device = options.device
    suite = options.suite or next(iter(cases.SUITES_OF[device]))
    run: measure.Result = {
        "suite": suite,
        "device": device,
        "quick": options.quick,
        "results": [],
    }
    if options.threads is None:
        options.threads = 1 if device == "cuda" else fastattn.get_num_threads()
    try:
        if options.plot is not None:
            try:
                importlib.import_module("matplotlib")
            except ImportError:
                return _complain("--plot needs matplotlib: pip install 'fastattn[bench]'")
        if options.source is not None:
            run = json.loads(options.source.read_text())
        else:
            chosen, libraries = _chosen_cases(options, suite), _chosen_libraries(options)
            interrupted = _measure(run, chosen, libraries, options)
    except (OSError, ValueError, measure.Failure) as error:
        return _complain(str(error))
    if options.json is not None:
        options.json.write_text(json.dumps(run, indent=1) + "\n")
    if not run["results"]:
        return _complain("nothing was measured")
    if options.plot is not None:
        chart.save(run, options.plot)
    _say(report.table(run, options.markdown))
    if run["suite"] == "growth":
        _say("\n" + report.growth(run))
    promises, kept = report.floors(run)
    if promises:
        _say("\n" + promises)
    return 130 if interrupted else int(options.check and not kept)


def _measure(
    run: measure.Result,
    chosen: list[cases.Case],
    libraries: list[str],
    options: argparse.Namespace,
) -> bool:
    """Add what is measured to the run; return whether the user interrupted it before the end."""
    begin = time.perf_counter()
    stream = sys.stderr if options.markdown else sys.stdout
    device, threads = options.device, options.threads
    run |= measure.description(libraries, threads, device)
    run["command"] = shlex.join(("fastattn", *sys.argv[1:]))
    if options.libraries is None and device == "cuda":
        run["left_out"] = {x: why for x in LIBRARIES[device] if (why := missing(x))}
    pace = measure.pace(options.quick, device)
    try:
        with closing(measure.Bench(libraries, threads, pace, _progress, device)) as bench:
            if device == "cuda":
                run["machine"] |= bench.describe()
            run["limits"] = bench.limits()
            _progress("")
            _say(report.heading(run), stream)
            for result in bench.run(chosen):
                run["results"].append(result)
                _progress("")
                _say("\n" + report.block(result), stream)
    except KeyboardInterrupt:
        _progress("")
        _say("\ninterrupted", sys.stderr)
        return True
    _say(f"\n{time.perf_counter() - begin:.0f} s in all\n", stream)
    return False


def _chosen_cases(options: argparse.Namespace, suite_name: str) -> list[cases.Case]:
    suites = cases.SUITES_OF[options.device]
    if suite_name not in suites:
        raise ValueError(
            f"--suite must be one of {', '.join(suites)} with --device {options.device}, got "
            f"{suite_name}"
        )
    suite = suites[suite_name]
    every = {case.name: case for cases_ in suites.values() for case in cases_}
    for name in options.case or ():
        if name not in every:
            raise ValueError(f"--case must be one of {', '.join(every)}, got {name}")
    if options.case:
        suite = [every[name] for name in options.case]
    elif options.quick and suite_name == next(iter(suites)):
        suite = [case for case in suite if case.name in cases.QUICK + cases.GPU_QUICK]
    if not importlib.util.find_spec("ml_dtypes"):
        for case in suite:
            if case.dtype == "bfloat16":
                raise ValueError(f"{case.name} needs ml_dtypes: pip install it")
    return suite


def _chosen_libraries(options: argparse.Namespace) -> list[str]:
    """Name fastattn and the libraries asked for, or all installed, in the order of the report."""
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    known = LIBRARIES[options.device]
    if options.libraries is None:
        return [name for name in known if not missing(name)]
    asked = {"fastattn", *options.libraries.split(",")}
    if unknown := sorted(asked - known.keys()):
        raise ValueError(f"--libraries must be of {', '.join(known)}, got {', '.join(unknown)}")
    for name in asked:
        if absent := missing(name):
            remedy = "run benchmarks/rivals.sh" if name in rivals.PREPARE else "pip install it"
            raise ValueError(f"--libraries: {name} needs {' and '.join(absent)}: {remedy}")
    return [name for name in known if name in asked]


def _progress(text: str) -> None:
    """Show on one line of the terminal what is being done, if stderr is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _say(text: str, stream: IO[str] | None = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)


def _complain(text: str) -> int:
    _say(f"fastattn bench: {text}", sys.stderr)
    return 2
