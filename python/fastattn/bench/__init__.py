# SPDX-License-Identifier: Apache-2.0
"""Measure how fast exact attention is on this machine, in fastattn and in other libraries.

The command `fastattn bench`, called by `__main__.py`. cases.py says what is measured, calls.py how
fastattn is asked, libraries.py how each other library is, worker.py does it in a process per
library, measure.py takes turns, accuracy.py compares with float64, report.py and chart.py show the
results. benchmarks/README.md explains the method and how to read the tables.
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
from fastattn.bench import cases, chart, measure, report
from fastattn.bench.libraries import PREPARE, missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--suite", choices=cases.SUITES, default="familiar", help="which cases (familiar)")
    add("--case", action="append", metavar="NAME", help="this case alone; may be repeated")
    add("--libraries", metavar="A,B", help="compare with these alone (all that are installed)")
    add("--threads", type=int, default=fastattn.get_num_threads(), help="(%(default)s)")
    add("--quick", action="store_true", help="fewer cases and turns, under a minute")
    add("--json", type=Path, metavar="FILE", help="keep every sample there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results there")
    add("--markdown", action="store_true", help="print the table as Markdown, all else to stderr")
    add("--check", action="store_true", help="exit with 1 if a floor is missed")
    add("--from", type=Path, metavar="FILE", dest="source", help="show a kept JSON file instead")


def main(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    interrupted = False
    run: measure.Result = {"suite": options.suite, "quick": options.quick, "results": []}
    try:
        if options.plot is not None:
            try:
                importlib.import_module("matplotlib")
            except ImportError:
                return _complain("--plot needs matplotlib: pip install 'fastattn[bench]'")
        if options.source is not None:
            run = json.loads(options.source.read_text())
        else:
            chosen, libraries = _chosen_cases(options), _chosen_libraries(options)
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
    """Fill the run; return whether it was interrupted, with what was done by then in it."""
    begin = time.perf_counter()
    stream = sys.stderr if options.markdown else sys.stdout
    run |= measure.description(libraries, options.threads)
    run["command"] = shlex.join(("fastattn", *sys.argv[1:]))
    pace = measure.QUICK_PACE if options.quick else measure.PACE
    try:
        with closing(measure.Bench(libraries, options.threads, pace, _progress)) as bench:
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


def _chosen_cases(options: argparse.Namespace) -> list[cases.Case]:
    suite = cases.SUITES[options.suite]
    every = {case.name: case for cases_ in cases.SUITES.values() for case in cases_}
    for name in options.case or ():
        if name not in every:
            raise ValueError(f"--case must be one of {', '.join(every)}, got {name}")
    if options.case:
        suite = [every[name] for name in options.case]
    elif options.quick and options.suite == "familiar":
        suite = [case for case in suite if case.name in cases.QUICK]
    if not importlib.util.find_spec("ml_dtypes"):
        for case in suite:
            if case.dtype == "bfloat16":
                raise ValueError(f"{case.name} needs ml_dtypes: pip install it")
    return suite


def _chosen_libraries(options: argparse.Namespace) -> list[str]:
    """fastattn, and those asked for or installed, in the order in which they are shown."""
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if options.libraries is None:
        return [name for name in PREPARE if not missing(name)]
    asked = {"fastattn", *options.libraries.split(",")}
    if unknown := sorted(asked - PREPARE.keys()):
        raise ValueError(f"--libraries must be of {', '.join(PREPARE)}, got {', '.join(unknown)}")
    for name in asked:
        if absent := missing(name):
            raise ValueError(f"--libraries: {name} needs {' and '.join(absent)}: pip install it")
    return [name for name in PREPARE if name in asked]


def _progress(text: str) -> None:
    """Show what is being done on one line of the terminal; nothing where there is none."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _say(text: str, stream: IO[str] | None = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)


def _complain(text: str) -> int:
    _say(f"fastattn bench: {text}", sys.stderr)
    return 2
