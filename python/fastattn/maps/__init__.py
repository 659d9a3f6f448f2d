# SPDX-License-Identifier: Apache-2.0
"""Where the heads of a model look: maps of words, in a terminal, on a page and as pictures.

`show` makes a `Map` of a model and a text, or of anybody's weights; `pyramid` a `LongMap` of a long
text, without the matrix of its weights. `value_weighted`, `removal_effect` and `rollout` say how
much arrives of what is looked at.
"""

from fastattn.maps._effects import removal_effect, value_weighted
from fastattn.maps._map import Link, Map
from fastattn.maps._pyramid import Level, LongMap, pyramid
from fastattn.maps._rollout import rollout
from fastattn.maps._show import show

__all__ = [
    "Level",
    "Link",
    "LongMap",
    "Map",
    "pyramid",
    "removal_effect",
    "rollout",
    "show",
    "value_weighted",
]
