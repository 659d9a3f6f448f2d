# SPDX-License-Identifier: Apache-2.0
"""What a map says of its links and of itself, and how its files are put in their place."""
# ruff: noqa: E501 - the tables have a line per case

import os
import stat

import numpy as np
import pytest

from fastattn import maps
from fastattn.maps import _map

WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.7, 0.2, 0.1]])
TOKENS = ["The", "cat", "sat"]
SINK = '60 % of the attention goes to the first token, "The"'


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "The"}, ValueError, f"to must be a word that is not left out, got 'The': {SINK}"),
        ({"to": ("The", 1), "word": "sat"}, ValueError, "to must be a word that is not left out, got ('The', 1): 70 % of the attention of 'sat' goes there"),
        ({"to": 0, "word": 1}, ValueError, "to must be a word that is not left out, got 0: 50 % of the attention of 'cat' goes there"),
        ({"to": "sat", "word": "sat"}, ValueError, "to must be another word than the one that looks, got 'sat'"),
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"count": -1}, ValueError, "count must be at least 1, got -1"),
        ({"count": 1.5}, TypeError, "count must be an int, not float"),
        ({"count": None}, TypeError, "count must be an int, not NoneType"),
    ],
)  # fmt: skip
def test_links_that_are_not_there_are_refused(options, error, message):
    with pytest.raises(error) as caught:
        maps.show(WEIGHTS, TOKENS).links(**options)
    assert str(caught.value) == message


def test_links_to_a_word():
    found = maps.show(WEIGHTS, TOKENS, word="sat")
    assert found.links(to="cat", count=np.int64(1)) == [("sat", "cat", 0, 0, pytest.approx(0.2))]
    assert maps.show(WEIGHTS, TOKENS, word="cat").links(to="sat") == []  # a later word
    with pytest.raises(ValueError, match="70 % of the attention of 'sat'"):
        found.links(to="The")
    across = maps.show(WEIGHTS, TOKENS, key_tokens=["Le", "chat", "assis"])
    assert across.links("sat", to=2)[0].key == "assis"


def test_a_map_is_one_line():
    found = maps.show(np.stack([[WEIGHTS] * 4] * 2), TOKENS)
    assert repr(found) == "<Map: 3 x 3 words, 2 x 4 heads>"


@pytest.mark.parametrize("name", ["語" * 80 + ".html", "a" * 250 + ".html"])
def test_names_as_long_as_the_file_system_allows(tmp_path, name):
    _map.write(tmp_path / name, b"page")
    assert [x.name for x in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o666])
def test_the_mode_of_what_is_replaced_stays(tmp_path, mode):
    path = tmp_path / "map.html"
    path.write_bytes(b"before")
    path.chmod(mode)
    _map.write(path, b"after")
    assert path.read_bytes() == b"after"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.html").mkdir()
    for path in ("file/map.html", "none/map.html", "folder.html", "a" * 300 + ".html"):
        with pytest.raises(OSError, match="Errno") as caught:
            _map.write(tmp_path / path, b"page")
        assert caught.value.filename == os.fspath(tmp_path / path)
        assert str(caught.value).endswith(repr(os.fspath(tmp_path / path)))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "folder.html"]
