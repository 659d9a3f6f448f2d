# SPDX-License-Identifier: Apache-2.0
"""The page of a map: one HTML file of bounded size that holds its data and needs no network."""

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

BOUND = 1_000_000  # bytes of the page of a text
BUDGET = 880_000  # of these, for the weights
PYRAMID_BOUND = 8_000_000
PYRAMID_BUDGET = 1_800_000  # for each level, and for the strongest links
CELLS = 100_000_000  # what a browser holds without trouble

# A byte stands for a share from its step up to the next one. From 0.5 % on there is a step at each
# half per cent, so that whole per cents are those of the floats; there are more for small shares.
STEPS = np.unique(
    [0, *np.geomspace(1e-5, 4e-3, 28).round(6), *np.arange(3, 24) / 400, *np.arange(1, 201) / 200]
)
FLOORS = (1e-5, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2)


def bounded(heads: int, rows: int, columns: int, name: str = "text") -> None:
    """Refuse a map that would be too large."""
    if (cells := heads * rows * columns) > CELLS:
        raise ValueError(
            f"{name} must be shorter, or layers= and heads= fewer, for at most {CELLS:,} numbers, "
            f"got {heads} heads of {rows} x {columns} tokens, {cells:,}; pyramid is for long texts"
        )


def page(data: Mapping[str, Any]) -> str:
    """Return the HTML that shows what `Map.data` or `LongMap.data` returns."""
    text = json.dumps({**data, "steps": STEPS.tolist()}, ensure_ascii=False, allow_nan=False)
    # No "<", no end of the script; a lone half of a surrogate pair has no UTF-8.
    text = text.replace("<", "\\u003c").encode("utf-8", "replace").decode()
    title = html.escape(str(data["title"])[:100].encode("utf-8", "replace").decode())
    template = files("fastattn.maps").joinpath("page.html").read_text("utf-8")
    before, between, after = re.split(r"\{\{(?:title|data)\}\}", template)
    result = f"{before}{title}{between}{text}{after}"
    bound = PYRAMID_BOUND if data["kind"] == "pyramid" else BOUND
    if (size := len(result.encode())) > bound:
        raise ValueError(
            f"the page would have {size:,} bytes, above its bound of {bound:,}: leave out heads "
            "(layers=, heads=) or shorten the text"
        )
    return result


def pack(shares: npt.ArrayLike, budget: int = BUDGET) -> dict[str, Any]:
    """Return shares of any shape as text for the page, without the smallest if that needs to be.

    "codes" are the bytes of the shares that are not 0, along the last axis but one, which they fill
    best where a word is looked at from everywhere; "gaps" are the steps from each to the next, a
    byte each, 255 for a step of 255 without a share. "floor" is the smallest share that is kept:
    the lowest of FLOORS with which all the text has at most `budget` bytes.
    """
    array = np.asarray(shares)
    if not np.all((array >= 0) & (array <= 1.001)):
        raise ValueError("shares must be numbers from 0 to 1")
    if array.size > CELLS:
        raise _too_much(array, array.size / CELLS, f"{array.size:,} shares, above {CELLS:,}")
    columns = array.swapaxes(-1, -2).ravel()
    packed: dict[str, Any] = {}
    for least in np.searchsorted(STEPS, FLOORS[::-1]).tolist():  # from few shares to many
        places = np.flatnonzero(columns >= float(STEPS[least]))
        codes = (np.searchsorted(STEPS, columns[places], side="right") - 1).astype(np.uint8)
        skips, rest = np.divmod(np.diff(places, prepend=0), 255)
        gaps = np.full(len(places) + skips.sum(), 255, np.uint8)
        gaps[np.arange(len(places)) + np.cumsum(skips)] = rest
        text = {"gaps": _deflate(gaps.tobytes()), "codes": _deflate(codes.tobytes())}
        size = sum(map(len, text.values()))
        if size > budget:
            break
        packed = {"floor": float(STEPS[least]), "shape": array.shape, **text}
    if not packed:
        what = f"{size:,} bytes, above {budget:,}, even without the shares below {FLOORS[-1]:.0%}"
        raise _too_much(array, size / budget, what)
    return packed


def pack_integers(integers: npt.ArrayLike) -> str:
    """Return integers from 0 to 2^32 - 1 as text for the page."""
    return _deflate(np.asarray(integers).astype("<u4").tobytes())


def _deflate(content: bytes) -> str:
    """Return bytes as the page inflates them."""
    return base64.b64encode(zlib.compress(content)).decode()


def _too_much(array: npt.NDArray[Any], factor: float, what: str) -> ValueError:
    """Return the error of an array that is `factor` times too large for the page."""
    heads = int(np.prod(array.shape[:-2]))
    fit = int(heads / factor)
    advice = f"keep at most {fit} heads by layers= and heads=" if fit else "shorten the text"
    shape = " x ".join(map(str, array.shape[-2:]))
    return ValueError(f"{heads} heads of {shape} words take {what}, in the page: {advice}")
