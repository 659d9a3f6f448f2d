# SPDX-License-Identifier: Apache-2.0
"""Pictures of maps: of which heads they are, and that they are written whole or not at all."""

import struct
import sys
import warnings
import zlib

import numpy as np
import pytest

from fastattn import maps

WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3, 4))
TOKENS = ["Then", "he", "$came$", "日本"]


def pixels(path):
    """Return the size of a PNG, whose parts must be whole."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    place, kinds = 8, []
    while place < len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        part = content[place + 4 : place + 8 + length]
        assert zlib.crc32(part) == struct.unpack(">I", content[place + 8 + length :][:4])[0]
        kinds.append(kind)
        place += 12 + length
    assert kinds[-1] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_pictures_of_a_head_a_layer_and_all(tmp_path):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures, make = [], Figure.savefig

    def savefig(figure, *given, **options):
        figures.append([axes.get_title() + axes.get_title(loc="left") for axes in figure.axes])
        return make(figure, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        found, path = maps.show(WEIGHTS, TOKENS), tmp_path / "map.png"
        for options in ({}, {"layer": 1}, {"layer": 1, "head": 2}, {"head": 0}):
            found.save(path, **options)
            assert min(pixels(path)) > 100
        asked = maps.show(WEIGHTS, TOKENS, word="he")
        asked.save(path)
        maps.show(WEIGHTS[0, 0], TOKENS).save(path)
    best = asked.links(count=1)[0]
    assert figures == [
        ["0, 0", "0, 1", "0, 2", "1, 0", "1, 1", "1, 2"],
        ["1, 0", "1, 1", "1, 2", ""],
        ["layer 1, head 2", ""],  # and the scale of colours
        ["0, 0", "1, 0"],
        [f"layer {best.layer}, head {best.head}", ""],
        ["layer 0, head 0", ""],
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_large_picture_is_bounded(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.PNG"
    maps.show(np.eye(400), ["word"] * 400).save(path)
    assert max(pixels(path)) <= 40 * 120


@pytest.mark.parametrize(
    ("tokens", "heads"), [(["Then"], 1), (["Then"], 4), (["\ud800", "a\ud800$", "b"], 1)]
)
def test_any_words_make_a_picture_without_a_warning(tmp_path, tokens, heads):
    pytest.importorskip("matplotlib")
    path, count = tmp_path / "map.png", len(tokens)
    weights = np.full((1, heads, count, count), 1 / count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps.show(weights, tokens).save(path)
    assert min(pixels(path)) > 100


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError) as caught:
        maps.show(WEIGHTS, TOKENS).save(tmp_path / "map.png")
    assert str(caught.value) == "a picture needs matplotlib: pip install 'fastattn[plot]'"
    assert not list(tmp_path.iterdir())


def test_layers_that_are_not_there_are_refused(tmp_path):
    for options, message in (
        ({"layer": 2}, "layer must be one of the map's, 0, 1, got 2"),
        ({"head": 3}, "head must be one of the map's, 0..2, got 3"),
    ):
        with pytest.raises(ValueError, match="must be one of") as caught:
            maps.show(WEIGHTS, TOKENS).save(tmp_path / "map.png", **options)
        assert str(caught.value) == message
