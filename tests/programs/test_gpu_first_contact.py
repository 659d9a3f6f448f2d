# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_first_contact.sh: its steps start, end in time and are logged, without a GPU."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_first_contact.sh"
PATIENCE = 120  # seconds
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the tests stand alone")

# Instead of Python: tests hang, the first benchmark fails, and all other commands say one word.
STAND_IN = """#!/bin/sh
case "$*" in
  "-m pytest "*) echo testing; exec sleep 600 ;;
  *"--device cuda"*) echo "nothing was measured"; exit 3 ;;
  *) echo "{word}" ;;
esac
"""


def visit(out, *options):
    """Run the script; return its exit status, what came of each step, and the last line."""
    done = subprocess.run([SCRIPT, out, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr == ""
    assert (out / "summary.txt").read_text() == done.stdout
    _, *lines, last = done.stdout.splitlines()
    found = [re.fullmatch(r"(\w+) +\d+ s  (.*)", line) for line in lines]
    return done.returncode, {x[1]: x[2] for x in found}, last


@pytest.fixture
def stand_in(tmp_path):
    """Return a function that makes a program to be taken for Python, which says a word."""

    def make(word):
        program = tmp_path / "python"
        program.write_text(STAND_IN.replace("{word}", word))
        program.chmod(0o755)
        return program

    return make


def test_rehearsal(tmp_path):
    """With this Python, and whatever PyTorch it has: the files that the steps name are there."""
    pytest.importorskip("torch", exc_type=ImportError)
    out, steps = tmp_path / "out", ["machine", "agree", "bench"]
    status, found, last = visit(
        out, "--rehearse", "--only", ",".join(steps), "--python", sys.executable
    )
    logs = {name: (out / f"{name}.log").read_text() for name in steps}
    assert found == dict.fromkeys(steps, "no GPU"), logs
    assert status == 0
    assert re.fullmatch(r"3 of 3 steps as they should be, in \d+ s", last)
    assert re.search(r"^no GPU: PyTorch .* sees none$", logs["machine"], re.M)
    assert re.search(r"^SKIPPED .* there is no GPU$", logs["agree"], re.M)
    assert re.search(r"^=+ \d+ skipped, \d+ deselected in ", logs["agree"], re.M)


def test_a_step_that_hangs_or_fails_stops_no_other(tmp_path, stand_in):
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    options = ("--only", "hardware,bench,cpu", "--limit", "hardware=1", "--archive", archive)
    status, found, last = visit(out, "--python", stand_in("measured"), *options)
    assert found == {
        "hardware": "timed out",
        "bench": "failed (3): nothing was measured",
        "cpu": "ok",
    }
    assert status == 1
    assert last.startswith("1 of 3 steps as they should be, in ")
    assert last.endswith(" s; not: hardware bench")
    log = (out / "hardware.log").read_text()
    assert re.search(r"\ntesting\n(.*\n)*--- timed out, after [12] s\n$", log)
    with tarfile.open(archive) as kept:
        names = {Path(x).name for x in kept.getnames()}
    assert names >= {"hardware.log", "bench.log", "cpu.log", "summary.txt"}


@pytest.mark.parametrize(
    ("word", "options", "expected"),
    [
        ("fine", (), "ok"),
        ("there is no GPU", (), "failed: there is no GPU"),  # though its exit status is 0
        ("there is no GPU", ("--rehearse",), "no GPU"),
        ("fine", ("--rehearse",), "failed: it does not say that there is no GPU"),
        ("fine", ("--budget", "20"), r"skipped: it may take 40 s, (20|19) s are left"),
    ],
)
def test_what_a_step_comes_to(word, options, expected, tmp_path, stand_in):
    status, found, _ = visit(
        tmp_path / "out", "--only", "machine", "--python", stand_in(word), *options
    )
    assert re.fullmatch(expected, found["machine"])
    assert status == (expected not in ("ok", "no GPU"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "bench,benhc"), "--only: no step benhc in: install machine agree "),
        (("--limit", "bench=soon"), "--budget and --limit take whole seconds, got 'soon'"),
        (("--python", "/no/python"), "no Python of at least 3.11 here: --python names one"),
        (("--wheels", "/no/wheels"), "--wheels: there is no folder /no/wheels"),
        (("--fast",), "no option --fast: --help names them"),
        (("--budget",), "--budget needs a value"),
    ],
)
def test_refusals(options, message, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([SCRIPT, out, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu_first_contact.sh: {message}")
    assert not out.exists()
