# SPDX-License-Identifier: Apache-2.0
"""Every promise of docs/contract.md has a test, and every test names promises that are there.

Both are read as text, so that tests which need torch, jax or a GPU count too.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "contract.md"


@pytest.fixture(scope="module")
def promised():
    """Return the ids of the page, in its order."""
    if not PAGE.exists():
        pytest.skip("no docs/contract.md beside the tests")
    rows = re.findall(r"^\| (.+?) \| .+ \|$", PAGE.read_text(), re.MULTILINE)
    return [row.strip("`") for row in rows if row != "id"]


def is_mark(node):
    """Tell whether an expression is pytest.mark.promise."""
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.promise"


def marks_of(source):
    """Return the ids in the marks of each test, by its name; each mark must be a test's."""
    marks, found, placed = {}, 0, 0
    for node in ast.walk(ast.parse(source)):
        found += is_mark(node)
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and is_mark(mark.func):
                placed += 1
                assert mark.args, f"{node.name}: a mark names no promise"
                ids = [ast.literal_eval(argument) for argument in mark.args]
                marks.setdefault(node.name, []).extend(ids)
    assert found == placed, "a mark stands where it is no test's decorator, called"
    return marks


@pytest.fixture(scope="module")
def named():
    """Return (file, test, id) of all marks."""
    return [
        (str(path.relative_to(TESTS)), test, promise)
        for path in sorted(TESTS.rglob("test_*.py"))
        if path != Path(__file__) and "mark.promise" in (source := path.read_text())
        for test, ids in marks_of(source).items()
        for promise in ids
    ]


def test_ids_are_unique_and_well_formed(promised):
    assert len(promised) > 100
    assert [x for x, count in Counter(promised).items() if count > 1] == []
    assert [x for x in promised if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", x)] == []


def test_every_promise_has_a_test(promised, named):
    tested = {promise for _, _, promise in named}
    assert [x for x in promised if x not in tested] == []


def test_every_mark_names_promises(promised, named):
    assert [x for x in named if x[2] not in promised] == []
    assert [x for x, count in Counter(named).items() if count > 1] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('@pytest.mark.promise("a", "b")\n@other\ndef test_x(): ...', {"test_x": ["a", "b"]}),
        ('class TestX:\n  @pytest.mark.promise("a")\n  def test_x(self): ...', {"test_x": ["a"]}),
        ("def test_x(): ...", {}),
        ("@pytest.mark.promise()\ndef test_x(): ...", None),
        ("@pytest.mark.promise\ndef test_x(): ...", None),
        ('@pytest.mark.promise("a")\ndef helper(): ...', None),
        ('pytestmark = pytest.mark.promise("a")', None),
    ],
)
def test_a_mark_counts_where_it_is_a_tests(source, expected):
    if expected is not None:
        assert marks_of(source) == expected
        return
    with pytest.raises(AssertionError):
        marks_of(source)
