# SPDX-License-Identifier: Apache-2.0
"""A map as a picture, by matplotlib: one head with its words, or a grid of heads."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.maps._terminal import percent

if TYPE_CHECKING:
    from fastattn.maps._map import Map

CELL, PANEL = 0.22, 1.1  # inches
LONGEST = 24  # characters of a word
MOST_WORDS = 120  # that have names beside a head
INCHES = 40  # of a side, at most
DOTS = 120  # per inch
NOTHING = "no other\nword to\nlook at"


def picture(map_: Map, layer: int | None, head: int | None) -> bytes:
    """Return a PNG of the head, of a layer's heads, or of what `Map.save` takes by default."""
    chosen = map_.chosen() if layer is None and head is None else None
    layers = [map_.layers.index(layer)] if layer is not None else range(len(map_.layers))
    heads = [map_.heads.index(head)] if head is not None else range(len(map_.heads))
    if chosen is not None:
        layers, heads = [chosen[0]], [chosen[1]]
    figure = (
        _one(map_, layers[0], heads[0])
        if len(layers) == len(heads) == 1
        else _grid(map_, list(layers), list(heads))
    )
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box is drawn instead
        figure.savefig(content, format="png", dpi=DOTS)
    return content.getvalue()


def _figure(width: float, height: float) -> Any:
    """Return an empty figure, which no window and no other figure knows."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        how = "pip install 'fastattn[plot]'"
        raise ImportError(f"a picture needs matplotlib: {how}") from error
    return Figure((min(width, INCHES), min(height, INCHES)), layout="constrained")


def _one(map_: Map, layer: int, head: int) -> Any:
    """Return the figure of a head: a row for each word, a column for each word it can look at."""
    shown = [i for i in range(len(map_.keys)) if i not in map_.special]
    weights = map_.weights[layer, head][:, shown]
    rows, columns = weights.shape
    figure = _figure(2.5 + CELL * columns, 2.5 + CELL * rows)
    axes = figure.add_subplot()
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto") if columns else None
    if image is None:
        _note(axes, rows)
    for ticks, names, turn in (
        (axes.set_xticks, [map_.keys[i] for i in shown], 90),
        (axes.set_yticks, map_.queries, 0),
    ):
        places = range(len(names)) if len(names) <= MOST_WORDS else ()
        ticks(places, [_name(names[i]) for i in places], rotation=turn)
    axes.xaxis.tick_top()
    axes.set_title(f"layer {map_.layers[layer]}, head {map_.heads[head]}", loc="left")
    if text := map_.sink_text():
        share = map_.sink[layer, head] if map_.sink is not None else 0
        text = f"{text},\nin this head {percent(share)}; left out here"
        axes.set_xlabel(_plain(text), loc="left")
    if image is not None:
        bar = figure.colorbar(image, shrink=0.6)
        bar.set_label("share of the row's word")
    return figure


def _grid(map_: Map, layers: list[int], heads: list[int]) -> Any:
    """Return the figure of many heads, without words: a row for each layer."""
    if len(layers) == 1:  # A layer's heads fill some rows.
        across = int(np.ceil(len(heads) ** 0.5))
        table = [heads[i : i + across] for i in range(0, len(heads), across)]
        panels = [[(layers[0], head) for head in row] for row in table]
    else:
        panels = [[(layer, head) for head in heads] for layer in layers]
    down, across = len(panels), len(panels[0])
    size = PANEL if len(layers) > 1 else 2 * PANEL
    figure = _figure(1 + size * across, 1 + size * down)
    shown = [i for i in range(len(map_.keys)) if i not in map_.special]
    all_axes = figure.subplots(down, across, squeeze=False)
    for row, of_row in zip(all_axes, panels, strict=True):
        for axes in row:
            axes.axis("off")
        for axes, (layer, head) in zip(row, of_row, strict=False):
            image = map_.weights[layer, head][:, shown]
            if shown:
                axes.imshow(image, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            else:
                _note(axes, len(image), size=5)
            axes.set_title(f"{map_.layers[layer]}, {map_.heads[head]}", fontsize=7, pad=2)
            axes.axis("on")
            axes.set_xticks([])
            axes.set_yticks([])
    text = "layer, head; a row for each word, a column for each word it looks at"
    if sink := map_.sink_text():
        text += f"\n{sink}; left out here"
    figure.supxlabel(_plain(text), fontsize=8)
    return figure


def _note(axes: Any, rows: int, **font: Any) -> None:
    """Say in a head's place that there is no column to draw."""
    axes.set_ylim(rows - 0.5, -0.5)
    axes.text(0.5, 0.5, NOTHING, ha="center", va="center", transform=axes.transAxes, **font)


def _name(word: str) -> str:
    """Return a word of bounded length."""
    return _plain(word if len(word) <= LONGEST else word[: LONGEST - 3] + "...")


def _plain(text: str) -> str:
    """Return a text that matplotlib shows as it is, without mathematics; ? where it cannot."""
    text = text.encode("utf-8", "replace").decode()  # Half of a character, a lone surrogate.
    return text.replace("\\", "\\\\").replace("$", r"\$") if "$" in text else text
