# SPDX-License-Identifier: Apache-2.0
"""The command map: where a model looks in a text, in the terminal, on a page and in a picture.

`fastattn.__main__` declares it; it is run as the models' commands are, with their exit statuses.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.models._command import DECODER, _say

if TYPE_CHECKING:
    from fastattn.maps import Link

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("map", help="show where a model looks in a text")
    add = parser.add_argument
    add("text", metavar="TEXT")
    add("--word", metavar="WORD", help="the word that looks; its second occurrence: WORD:2")
    add("--to", metavar="WORD", help="the word that is looked at: rank the heads")
    add("--layer", type=int, metavar="N", help="look at this layer alone")
    add("--head", type=int, metavar="N", help="look at this head of each layer alone")
    add("--count", type=int, metavar="N", default=10, help="print so many links (10)")
    add("--generate", type=int, metavar="N", default=0, help="write N tokens, show their links")
    add("--picture", action="store_true", help="print the head of the strongest link too")
    add("--check", action="store_true", help="take that head away, then another one, and compare")
    add("--html", type=Path, metavar="FILE.html", help="write the page there")
    add("--png", type=Path, metavar="FILE.png", help="write a picture there")
    names = f"a folder, a file or an installed package ({DECODER})"
    add("-m", "--model", default=DECODER, help=names)
    parser.set_defaults(run=_map)


def _map(options: argparse.Namespace) -> None:
    """Print the strongest links and what belongs to them; write the files."""
    from fastattn import maps, models
    from fastattn.maps import _terminal
    from fastattn.maps._map import CAUSE, suffix_of

    for name, suffix in (("html", ".html"), ("png", ".png")):
        if (path := getattr(options, name)) is not None:
            suffix_of(path, (suffix,))
    model: Any = models.load(options.model)
    found = maps.show(
        model,
        options.text,
        generate=options.generate,
        layers=options.layer,
        heads=options.head,
        word=_choice(options.word),
        title=options.text,
    )
    links = found.links(count=options.count, to=_choice(options.to))
    lines = [_terminal.table(links) if links else "no word looks at another one"]
    if text := found.sink_text():
        lines.append(f"{text}; it is left out above.")
    best = links[0] if links else None
    if best and (options.word or options.to):
        found = dataclasses.replace(found, shown=(best.layer, best.head))
    if options.picture and best:
        layer, head = found.layers.index(best.layer), found.heads.index(best.head)
        lines.append(_terminal.picture(found, layer, head))
    lines.append(f"{CAUSE}:")
    if options.check and best:
        lines[-1] += "\n" + "\n".join(_checked(model, options.text, best))
    else:
        place = {"layer": best.layer, "head": best.head} if best else {"layer": 0, "head": 0}
        lines[-1] += f" --check takes the head away, as does\n  {found.code.format(**place)}"
    _say(_terminal.shown("\n\n".join(lines)) + "\n")
    for path in filter(None, (options.html, options.png)):
        found.save(path)


def _choice(word: str | None) -> Any:
    """Return the word that an option names: he:2 is the second one."""
    parts = re.fullmatch(r"(.+):(\d+)", word or "")
    return (parts[1], int(parts[2])) if parts else word


def _checked(model: Any, text: str, link: Link) -> list[str]:
    """Return what changes without the head of a link, and without one drawn at random."""
    config = model._model.config
    every = [
        (layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    ]
    best = (link.layer, link.head)
    others = [x for x in every if x != best]
    lines = []
    before = _answer(model, text)
    for what, (layer, head) in (
        ("without it", best),
        *((("without another one, drawn at random"), random.Random(0).choice(others)),)[
            : len(others)
        ],
    ):
        with model.ablate([(layer, head)]):
            after = _answer(model, text)
        lines.append(f"  {what} (layer {layer}, head {head}) {_difference(before, after)}")
    return lines


def _answer(model: Any, text: str) -> Any:
    """Return what is compared: log-probabilities of the text's tokens, or its embedding."""
    if hasattr(model, "score"):
        return float(model.score(text).log_probabilities.sum(dtype=np.float64))
    return model.encode([text])[0].astype(np.float64)


def _difference(before: Any, after: Any) -> str:
    """Return how two answers differ, in words."""
    if isinstance(before, float):
        return f"the text's log-probability is {after:.2f}, and was {before:.2f}"
    norms = np.linalg.norm(before) * np.linalg.norm(after)
    cosine = before @ after / max(norms, 1e-12)
    return f"the text's vector has a cosine of {cosine:.4f} with what it was"
