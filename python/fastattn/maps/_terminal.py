# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows of a map: its strongest links, and one head as shaded rows of words."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastattn.maps._map import Link, Map

SHADES, PLAIN = " ░▒▓█", " .:*#"
STEPS = (0.05, 0.2, 0.4, 0.7)  # the share from which on a cell has the next shade
LONGEST = 16  # characters of a word
LINKS = 5


def render(map_: Map) -> str:
    """Return the links, the sentence about sinks, and the head of the strongest link."""
    links = map_.links(count=LINKS)
    parts = [table(links)] if links else ["no word looks at another one, but for what is left out"]
    if text := map_.sink_text():
        parts.append(f"{text}; it is left out above.")
    if links:
        layer, head = map_.layers.index(links[0].layer), map_.heads.index(links[0].head)
        parts.append(picture(map_, layer, head))
    return shown("\n\n".join(parts))


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{int(100 * float(share) + 0.5)} %"


def table(links: list[Link]) -> str:
    """Return a line for each link."""
    pairs = [f"{cut(x.query)} -> {cut(x.key)}" for x in links]
    places = [f"layer {x.layer}, head {x.head}" for x in links]
    wide, broad = max(map(width, pairs)), max(map(len, places))
    return "\n".join(
        f"{pad(pair, wide)}   {where:{broad}}   {percent(link.share):>5}"
        for pair, where, link in zip(pairs, places, links, strict=True)
    )


def picture(map_: Map, layer: int, head: int) -> str:
    """Return a head: a row for each word that looks, a column for each that is looked at."""
    columns = [i for i in range(len(map_.keys)) if i not in map_.special]
    title = f"layer {map_.layers[layer]}, head {map_.heads[head]}"
    names = [cut(x) for x in map_.queries]
    wide = max(map(width, names))
    if wide + 3 + 2 * len(columns) > shutil.get_terminal_size().columns:
        return f"{title}: its {len(columns)} columns do not fit into the terminal; save the page"
    shades = SHADES if can_show(SHADES) else PLAIN
    rows = map_.weights[layer, head][:, columns]
    lines = [
        f"{pad(name, wide)} |"
        + "".join(2 * shades[sum(x >= step for step in STEPS)] for x in row).rstrip()
        for name, row in zip(names, rows.tolist(), strict=True)
    ]
    depth = max((width(cut(map_.keys[i])) for i in columns), default=0)
    heading = [
        " " * (wide + 2) + "".join(f"{letter(map_.keys[i], line, depth)} " for i in columns)
        for line in range(depth)
    ]
    legend = ", ".join(f"{2 * x} from {s:.0%}" for x, s in zip(shades[1:], STEPS, strict=True))
    return "\n".join([f"{title} ({legend})", *(x.rstrip() for x in heading), *lines])


def letter(word: str, line: int, depth: int) -> str:
    """Return what a word that is written downwards, to end at the depth, has in a line."""
    name = [x for x in cut(word) if width(x) == 1]
    i = line - (depth - len(name))
    return name[i] if i >= 0 else " "


def cut(word: str) -> str:
    """Return a word of bounded length, without what a terminal would obey."""
    text = "".join(x if x.isprintable() else "?" for x in word)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def width(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(x) in "WF" for x in text)
    return len(text) + wide - sum(bool(unicodedata.combining(x)) for x in text)


def pad(text: str, cells: int) -> str:
    """Return a text that fills so many cells."""
    return text + " " * (cells - width(text))


def can_show(text: str) -> bool:
    """Return whether stdout can write a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def shown(text: str) -> str:
    """Return a text whose characters stdout can write: ? stands for others."""
    if can_show(text):
        return text
    name = sys.stdout.encoding
    return text.encode(name, "replace").decode(name)
