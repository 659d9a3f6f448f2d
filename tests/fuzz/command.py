# SPDX-License-Identifier: Apache-2.0
"""The command line: which cases run, in which child process, and what is said of them.

A case is its kind, seed and number; the instruction set is that of the process. Children run some
hundred cases each, one instruction set after the other, and write down what they are about to do:
if one dies or hangs, that is a failure with a name, and the next child goes on behind it.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

KINDS = (
    *("attention", "backward", "varlen", "cache", "paged", "merge", "statistics"),
    *("linear", "invalid", "gguf", "safetensors"),
    *("checkpoint" for x in ["tokenizers"] if importlib.util.find_spec(x)),
)
OPTIONAL = ("torch",)
MODULES = {"torch": "torch_gradients"}
SLICE = 400  # cases of one child
SHRINKING = 10.0  # seconds for making a failure smaller
FOLDER = Path(__file__).resolve().parent


def main(argv=None):
    """Run what the command line asks for; return 1 if anything failed."""
    asked = parser().parse_args(argv)
    unknown = {*asked.only} - {*KINDS, *OPTIONAL}
    if unknown:
        sys.exit(f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(KINDS)}, torch")
    if asked.progress:
        return work(asked)
    if asked.spec is not None or asked.case is not None:
        return once(asked)
    return supervise(asked)


def parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        "python tests/fuzz", description="Random calls against the definition and the promises."
    )
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--seconds", type=float, help="how long to run; 60 unless told otherwise")
    number.add_argument("--cases", type=int, help="how many cases to run, of all kinds together")
    number.add_argument("--case", type=int, help="run this one, in this process, with a traceback")
    number.add_argument("--spec", help="likewise, a case that a failure printed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        type=lambda text: tuple(text.split(",")),
        default=KINDS,
        help=f"kinds, of {', '.join((*KINDS, *OPTIONAL))}; all but the last unless told otherwise",
    )
    parser.add_argument("--torch", action="store_true", help="fuzz fastattn.torch, too")
    parser.add_argument(
        "--isas",
        type=lambda text: tuple(text.split(",")),
        help="instruction sets; all that this CPU has unless told otherwise",
    )
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds after which a case counts as hung"
    )
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    # Of a child: where it writes, and which case is another's.
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=int, help=argparse.SUPPRESS)
    return parser


def module_of(kind):
    """Return the module of a kind of case."""
    return importlib.import_module(f"tests.fuzz.{MODULES.get(kind, kind)}")


def spec_of(kind, seed, case):
    """Return the spec of a case, as it comes back from JSON."""
    import numpy as np

    rng = np.random.default_rng([seed, case, zlib.crc32(kind.encode())])
    return json.loads(json.dumps(module_of(kind).draw(rng)))


def attempt(kind, spec):
    """Return what goes wrong with a spec; None if nothing does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            module_of(kind).check(spec)
        except Exception as error:
            return error
    return None


def sign_of(error):
    """Return what two failures of one fault have in common."""
    return type(error), str(error).split("[")[0].split(":")[0][:30]


def smaller(spec):
    """Yield specs that ask for less: an option or operation left out, a number nearer to 0."""
    for name, x in spec.items() if isinstance(spec, dict) else enumerate(spec):
        if isinstance(x, dict):
            others = [*smaller(x)]
        elif isinstance(x, list):
            others = [x[:i] + x[i + 1 :] for i in range(len(x))] + [*smaller(x)]
        elif isinstance(x, str):
            others = ["plain"] if "layout" in str(name) and x != "plain" else []
        elif isinstance(x, bool) or not isinstance(x, int) or name in ("data", "number", "more"):
            others = []
        else:
            others = [n for n in dict.fromkeys((0, 1, 2, x // 2, x - 1)) if abs(n) < abs(x)]
        for other in others:
            yield (
                {**spec, name: other}
                if isinstance(spec, dict)
                else [*spec[:name], other, *spec[name + 1 :]]
            )
        if isinstance(spec, dict) and (name in KEYS_TO_DROP or isinstance(x, dict)):
            yield {key: y for key, y in spec.items() if key != name}


KEYS_TO_DROP = (
    *("scale", "is_causal", "query_offset", "window", "softcap", "kv_lengths", "sinks", "mask"),
    *("bias", "alibi_slopes", "dropout_p", "seed", "key_offset", "head_offset", "batch_offset"),
    *("lacks", "kv_dtype", "capacity"),
)


def shrunk(kind, spec, error):
    """Return the smallest spec found that fails in the same way."""
    deadline = time.monotonic() + SHRINKING
    sign, found = sign_of(error), True
    while found:
        found = False
        for other in smaller(spec):
            if time.monotonic() > deadline:
                return spec
            if sign_of(attempt(kind, other)) == sign:
                spec, found = other, True
                break
    return spec


def command(kind, isa, **more):
    """Return the line that runs a case again."""
    rest = " ".join(f"--{name} {value}" for name, value in more.items())
    return f"python tests/fuzz --only {kind} --isas {isa} {rest}"


def report(kind, seed, case, isa, what, spec=None):
    """Print a failure, and how to see it again."""
    lines = [f"FAILED {kind}, case {case}: {what}"]
    lines.append("  " + command(kind, isa, seed=seed, case=case))
    if spec is not None:
        lines.append("  " + command(kind, isa, spec=f"'{json.dumps(spec)}'"))
    print("\n".join(lines), flush=True)


def run(kind, seed, case, isa="", shrink=True):
    """Run one case; return whether it is right, and say so if it is not."""
    spec = spec_of(kind, seed, case)
    error = attempt(kind, spec)
    if error is None:
        return True
    notes = " ".join(getattr(error, "__notes__", ()))
    what = f"{type(error).__name__}: {error} {notes}".strip()
    small = shrunk(kind, spec, error) if shrink else None
    report(kind, seed, case, isa, what, small)
    return False


def once(asked):
    """Run one case in this process."""
    if asked.isas:
        os.environ["FASTATTN_ISA"] = asked.isas[0]
    for kind in asked.only:
        spec = json.loads(asked.spec) if asked.spec else spec_of(kind, asked.seed, asked.case)
        print(f"{kind}: {json.dumps(spec)}", flush=True)
        error = attempt(kind, spec)
        if error is not None:
            traceback.print_exception(error)
            return 1
    print("right")
    return 0


def work(asked):
    """Be a child: run cases until told to stop, and write down each before it runs."""
    kinds, deadline = asked.only, time.monotonic() + (asked.seconds or 1e9)
    state = {"counts": dict.fromkeys(kinds, 0), "failures": 0, "done": False}
    case = asked.first
    while True:
        state["case"], state["kind"] = case, kinds[case % len(kinds)]
        state["done"] = time.monotonic() > deadline or case >= asked.until
        asked.progress.write_text(json.dumps(state))
        if state["done"]:
            return 0
        right = run(state["kind"], asked.seed, case, asked.isas[0])
        state["counts"][state["kind"]] += 1
        state["failures"] += not right
        case += 1


def supervise(asked, program=(sys.executable, str(FOLDER))):
    """Run cases in children; return 1 if one of them failed."""
    kinds = (*asked.only, *(OPTIONAL if asked.torch and "torch" not in asked.only else ()))
    isas = asked.isas or supported_isas()
    begin = time.monotonic()
    seconds = asked.seconds or (1e9 if asked.cases else 60.0)
    last = asked.first + asked.cases if asked.cases else sys.maxsize
    counts, failures, case, turn = dict.fromkeys(kinds, 0), 0, asked.first, 0
    slice_seconds = seconds / len(isas) if seconds < 20 * len(isas) else seconds
    size = min(SLICE, -(-asked.cases // len(isas))) if asked.cases else SLICE
    with tempfile.TemporaryDirectory() as folder:
        while case < last and (left := seconds - (time.monotonic() - begin)) > 0:
            isa = isas[turn % len(isas)]
            until = min(case + size, last)
            state, died = child(
                asked, program, Path(folder), kinds, isa, case, until, min(left, slice_seconds)
            )
            for kind, count in state["counts"].items():
                counts[kind] += count
            failures += state["failures"]
            case = state["case"]
            if died:
                failures += 1
                counts[state["kind"]] += 1
                report(state["kind"], asked.seed, case, isa, died)
                case += 1
            if died or case >= until or slice_seconds < seconds:
                turn += 1
    taken = time.monotonic() - begin
    for kind, count in counts.items():
        print(f"  {kind:12} {count:8} cases")
    print(
        f"{sum(counts.values())} cases of seed {asked.seed} with {', '.join(isas)}, "
        f"{failures} failures, {taken:.0f} s"
    )
    return int(failures > 0)


def child(asked, program, folder, kinds, isa, first, until, seconds):
    """Run some cases in a process; return what it wrote last, and how it died if it did."""
    progress = folder / "progress"
    progress.unlink(missing_ok=True)
    arguments = {
        "--only": ",".join(kinds),
        "--isas": isa,
        "--seed": asked.seed,
        "--first": first,
        "--until": until,
        "--seconds": seconds,
        "--progress": progress,
    }
    line = [*program, *(str(x) for pair in arguments.items() for x in pair)]
    process = subprocess.Popen(line, env=os.environ | {"FASTATTN_ISA": isa})
    died, seen, since = "", 0, time.monotonic()
    while process.poll() is None:
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            now = progress.stat().st_mtime_ns if progress.exists() else 0
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > asked.patience + SHRINKING:
                process.kill()
                process.wait()
                died = f"no end after {asked.patience:.0f} s"
    try:
        state = json.loads(progress.read_text())
    except (OSError, ValueError):
        sys.exit(f"a child wrote nothing, and ended with status {process.returncode}")
    if not state["done"] and not died:
        code = process.returncode
        died = f"the process died of signal {-code}" if code < 0 else f"exit status {code}"
    elif process.returncode and not died:
        died = f"exit status {process.returncode} at the end"
    return state, died


def supported_isas():
    """Return the instruction sets that this CPU has."""
    import fastattn

    return tuple(fastattn.info()["isas"])
