# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows of a map, whatever it can write and however wide it is."""

import io
import sys

import numpy as np
import pytest

from fastattn import maps

WEIGHTS = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.1, 0.2, 0], [0.1, 0.8, 0.06, 0.04]])
PICTURE = """\
came -> he    layer 0, head 0    80 %
his -> he     layer 0, head 0    10 %
came -> his   layer 0, head 0     6 %

43 % of the attention goes to the first token, "Then"; it is left out above.

layer 0, head 0 (░░ from 5%, ▒▒ from 20%, ▓▓ from 40%, ██ from 70%)
          c
        h a
      h i m
      e s e
Then |
he   |▓▓
his  |░░▒▒
came |██░░"""


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """Let the terminal be 80 columns wide, and say what it can write."""
    monkeypatch.setenv("COLUMNS", "80")

    def of(encoding):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))

    of("utf-8")
    return of


def test_links_and_the_head_of_the_strongest():
    assert str(maps.show(WEIGHTS, ["Then", "he", "his", "came"])) == PICTURE


def test_a_terminal_without_unicode(terminal):
    terminal("ascii")
    found = str(maps.show(WEIGHTS, ["Then", "hé", "his", "came"]))
    assert found.isascii()
    assert "(.. from 5%, :: from 20%, ** from 40%, ## from 70%)" in found
    assert "came |##.." in found
    assert "came -> h?" in found


def test_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    found = str(maps.show(WEIGHTS, ["Then", "he", "his", "came"]))
    assert found.endswith(
        "layer 0, head 0: its 3 columns do not fit into the terminal; save the page"
    )


def test_words_cannot_command_the_terminal():
    words = ["Then", "he\x1b[31m", "a" * 60, "日本"]
    found = str(maps.show(WEIGHTS, words))
    assert "\x1b" not in found
    assert "aaaaaaaaaaaaa..." in found
    assert "a" * 20 not in found
    rows = [line for line in found.splitlines() if " |" in line]
    assert [line.index("|") for line in rows] == [17, 17, 17, 15]  # two characters are wide


def test_a_map_without_links():
    found = str(maps.show(np.eye(2), ["a", "b"]))
    assert found == (
        "no word looks at another one, but for what is left out\n\n"
        '0 % of the attention goes to the first token, "a"; it is left out above.'
    )
