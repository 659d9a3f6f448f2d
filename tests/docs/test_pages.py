# SPDX-License-Identifier: Apache-2.0
"""What the pages say: their examples, from the installed package alone, and their links.

Each page's blocks of Python run in one process, in an empty folder (run_page.py). The cells of the
tutorial are compared with what they print in its own test; here they are asked what is missing.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

import fastattn
from tests.docs.run_page import UNCHECKED, blocks
from tests.support.speech import RATE, one_by_one, wav

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).parent / "run_page.py"
SOUND = "speech.wav"  # which examples hear, if espeak-ng is there

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="no docs beside the tests")

FOUND = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "examples/README.md",
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FOUND if path.exists()}
WITH_EXAMPLES = [name for name, text in PAGES.items() if blocks(text)]
ELSEWHERE = ("docs/adoptions.md", "docs/tutorial/")  # tests of their own run these, and more


# Examples.


def run(name, folder, *python):
    """Run a page's examples in a folder; return the exit status and what went wrong."""
    if SOUND in "".join(blocks(PAGES[name])):
        sound = np.clip(one_by_one(["market", "river", "window"])[0], -1, 1) * (2**15 - 1)
        (folder / SOUND).write_bytes(wav(sound.astype("<i2").tobytes(), rate=RATE))
    ran = subprocess.run(
        [sys.executable, *python],
        input=PAGES[name],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return ran.returncode, ran.stderr


def missing(stderr):
    """Return the package that the error at the end of a page names, None if it names none."""
    error = ([line for line in stderr.splitlines() if "Error: " in line] or [""])[-1]
    found = re.search(r"No module named '(\w+)'|pip install (?:--no-deps )?([\w.-]+)", error)
    return found and (found[1] or found[2]).replace("_", "-")


@pytest.mark.parametrize("name", [x for x in WITH_EXAMPLES if not x.startswith(ELSEWHERE)])
def test_examples_run(name, tmp_path):
    status, stderr = run(name, tmp_path, "-P", RUNNER)
    absent = missing(stderr)
    if absent and importlib.util.find_spec(absent.replace("-", "_")) is None:
        pytest.skip(f"needs {absent}")
    assert status == 0, stderr


def only_numpy(folder, code):
    """Return what Python is to be called with, to run code where only NumPy and ours are there."""
    (folder / "packages").mkdir()
    for package in (Path(np.__file__).parent, Path(fastattn.__file__).parent):
        (folder / "packages" / package.name).symlink_to(package)
    return "-I", "-S", "-c", f"import runpy, sys; sys.path.append('packages'); {code}"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_a_missing_package_is_named_by_the_error_and_the_page(name, tmp_path):
    bare = only_numpy(tmp_path, f"runpy.run_path({str(RUNNER)!r}, run_name='__main__')")
    status, stderr = run(name, tmp_path, *bare)
    if status:
        named = missing(stderr)
        assert named, stderr
        assert re.search(rf"pip install [^`\n]*\b{named}\b", PAGES[name]), named


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("torch", "PyTorch (No module named 'torch'): pip install torch"),
        (
            "transformers",
            "transformers and torch (No module named 'torch'): pip install torch transformers",
        ),
        ("jax", "JAX (No module named 'jax'): pip install jax"),
        ("flash_attn", "PyTorch (No module named 'torch'): pip install torch"),
    ],
)
def test_a_door_names_what_it_needs(module, message, tmp_path):
    bare = only_numpy(tmp_path, f"import fastattn.{module}")
    ran = subprocess.run(
        [sys.executable, *bare], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.stderr.splitlines()[-1] == f"ImportError: fastattn.{module} needs {message}"


def test_few_blocks_are_unchecked():
    found = {
        name: sum(block.startswith(UNCHECKED) for block in blocks(text))
        for name, text in PAGES.items()
    }
    assert {name: count for name, count in found.items() if count} == {
        "docs/cuda.md": 1,  # no GPU
        "docs/models.md": 1,  # no weights of OPUS-MT
    }
    for name, text in PAGES.items():  # and no block is written in a way that is overlooked
        assert len(re.findall(r"^[ \t]*(?:```|~~~)[ \t]*py", text, re.M)) == len(blocks(text)), name


# Links, by GitHub's rules: Sphinx has its own, and checks them when it builds the site.


def prose(text):
    """Return a page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


def links(name):
    """Yield the page and the heading that each link and picture of a page leads to."""
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(PAGES[name]))):
        if not re.match(r"\w+:", link):
            path, _, heading = unquote(link).partition("#")
            yield ((ROOT / name).parent / path if path else ROOT / name).resolve(), heading


def anchors(text):
    """Return what a page's headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_headings():
    wrong = [
        f"{name}: {path.name}#{heading}"
        for name in PAGES
        for path, heading in links(name)
        if not path.exists() or (heading and heading not in anchors(path.read_text()))
    ]
    assert not wrong


def test_every_page_is_in_the_index():
    """The site's menu has the pages of the API, and chapters."""
    first = ROOT / "docs/index.md"
    folders = [ROOT, first.parent, ROOT / "benchmarks", ROOT / "examples"]
    pages = {(ROOT / name).resolve() for name in PAGES if (ROOT / name).parent in folders}
    assert pages - {first.resolve()} <= {path for path, _ in links("docs/index.md")}
