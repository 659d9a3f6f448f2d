# SPDX-License-Identifier: Apache-2.0
"""The command map: where a model looks in a text, in the terminal, on a page and in a picture.

`fastattn.__main__` declares it; it is run as the models' commands are, with their exit statuses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.models._command import DECODER, _read, _say

if TYPE_CHECKING:
    from fastattn.maps import Link

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DRAWN = 8  # heads that are compared with the best one


def add_command(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("map", help="show where a model looks in a text")
    add = parser.add_argument
    add("text", metavar="TEXT", help="- is stdin; a WAV file's path for a model that transcribes")
    add("--word", metavar="WORD", help="the word that looks; its second occurrence: WORD:2")
    add("--to", metavar="WORD", help="the word that is looked at: rank the heads")
    add("--layer", type=int, metavar="N", help="look at this layer alone")
    add("--head", type=int, metavar="N", help="look at this head of each layer alone")
    add("--count", type=int, metavar="N", default=10, help="print so many links (10)")
    add("--generate", type=int, metavar="N", default=0, help="write N tokens, show their links")
    add("--picture", action="store_true", help="print the head of the strongest link too")
    add("--check", action="store_true", help="take away that head, or others, and compare")
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
    text = options.text
    if text == "-" and hasattr(model, "transcribe"):
        kind = type(model).__name__
        raise ValueError(f"TEXT must be the path of a WAV file for a model of type {kind}, got -")
    if text == "-":
        text = _read("-", "a TEXT").removesuffix("\n")
    if options.check and not hasattr(model, "score") and not hasattr(model, "encode"):
        rule = "--check needs a model that scores or encodes a text"
        raise ValueError(f"{rule}, got {options.model}, of type {type(model).__name__}")
    found = maps.show(
        model,
        text,
        generate=options.generate,
        layers=options.layer,
        heads=options.head,
        word=_choice(options.word),
        title=text,
    )
    links = found.links(count=options.count, to=_choice(options.to))
    lines = [_terminal.table(links) if links else _no_link(options.word, options.to)]
    if sink := found.sink_text():
        lines.append(f"{sink}; it is left out above.")
    best = links[0] if links else None
    if best and (options.word or options.to):
        found = dataclasses.replace(found, shown=(best.layer, best.head))
    if options.picture and best:
        layer, head = found.layers.index(best.layer), found.heads.index(best.head)
        lines.append(_terminal.picture(found, layer, head))
    lines.append(f"{CAUSE}:")
    if options.check and best:
        lines[-1] += "".join(f"\n  {x}" for x in _checked(model, text, best))
    else:
        place = {"layer": best.layer, "head": best.head} if best else {"layer": 0, "head": 0}
        lines[-1] += f" --check takes the head away, as does\n  {found.code.format(**place)}"
    _say(_terminal.shown("\n\n".join(lines)) + "\n")
    for path in filter(None, (options.html, options.png)):
        found.save(path)


def _no_link(word: str | None, to: str | None) -> str:
    """Return the sentence that says that there are no links of what is asked about."""
    if to is None:
        said = "no word looks at another one" if word is None else f"{word} looks at no other word"
        return f"{said}, but for what is left out"
    return f"no other word looks at {to}" if word is None else f"{word} does not look at {to}"


def _choice(word: str | None) -> Any:
    """Return the word that an option names: he:2 is the second one."""
    parts = re.fullmatch(r"(.+):(\d+)", word or "")
    return (parts[1], int(parts[2])) if parts else word


def _checked(model: Any, text: str, link: Link) -> list[str]:
    """Return what changes without the head of a link, and without others drawn at random."""
    config, best = model._model.config, (link.layer, link.head)
    heads = range(config.num_attention_heads)
    others = [(x, y) for x in range(config.num_hidden_layers) for y in heads if (x, y) != best]
    drawn = random.Random(0).sample(others, min(DRAWN, len(others)))
    if hasattr(model, "score"):
        what = "the text's log-probability is"
    else:
        what = "the cosine of the text's vector with what it is otherwise is"
        vector = _unit(model.encode([text])[0])

    def answer(*heads: tuple[int, int]) -> float:
        """Return what the model says without heads."""
        with model.ablate(heads) if heads else contextlib.nullcontext():
            if hasattr(model, "score"):
                return float(model.score(text).log_probabilities.sum(dtype=np.float64))
            return float(_unit(model.encode([text])[0]) @ vector)

    found = [
        f"{what} {answer():.4f}",
        f"without layer {best[0]}, head {best[1]}: {answer(best):.4f}",
    ]
    if drawn:
        least, most = (f([answer(x) for x in drawn]) for f in (min, max))
        found.append(
            f"without one of {len(drawn)} others, drawn at random: {least:.4f} to {most:.4f}"
        )
    return found


def _unit(vector: Any) -> Any:
    """Return a vector of length 1."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
