# SPDX-License-Identifier: Apache-2.0
"""A model that writes down what is said becomes a map: its words, and the moments they look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn.maps import _words
from fastattn.maps._html import bounded
from fastattn.maps._words import Words, merged
from fastattn.models._log_mel import FRAMES, HOP, RATE
from fastattn.models._speech_tokens import FRAMES_OF_TIME
from fastattn.models._transcriber import samples_of
from fastattn.nn import Floats

if TYPE_CHECKING:
    from fastattn.models import Transcriber

MOMENTS = 120  # columns at most, each a multiple of a tenth of a second
BEHIND = "what is behind the sound"  # a column: the rest of the window


class Heard(NamedTuple):
    """What a model wrote of a sound, and where each of its tokens looked."""

    weights: Floats  # of shape (layers, heads, tokens, frames and one column for what is behind)
    rows: Words
    columns: Words


def heard(model: Transcriber, audio: Any, layers: Any, heads: Any) -> Heard:
    """Return what heads of a model look at as it writes of a sound, which one window must hold."""
    samples = samples_of(audio, RATE)
    window, frames = model._window, len(samples) // HOP
    if frames > window:
        rule = f"at most {window // FRAMES} s for a map, what the model hears at a time"
        raise ValueError(f"audio must be {rule}, got {frames / FRAMES:.1f} s")
    found = model.transcribe(samples)
    ids = [x for segment in found.segments for x in segment.ids]
    if not ids:
        raise ValueError("audio must have a word for a map, and the model hears none")
    prompt = [*model._tokens.prompts[found.language], model._tokens.no_times]
    if len(ids) > (most := model.config.max_target_positions - len(prompt)):
        raise ValueError(f"audio must have at most {most} tokens for a map, got {len(ids)}")
    count = -(-frames // FRAMES_OF_TIME)
    bounded(len(layers) * len(heads), len(ids), count, "audio")
    with model.capture(of="cross", layers=layers, heads=heads) as captured:
        orders, _ = model._read(ids, model._heard(model._spectrogram(samples), 0), found.language)
    weights = captured.weights[:, :, orders:-1]
    behind = weights[..., count:].sum(axis=3, keepdims=True)
    # A column is a multiple of a tenth of a second.
    step = FRAMES // FRAMES_OF_TIME // 10 * -(-frames // (FRAMES // 10 * MOMENTS))
    starts = range(0, count, step)
    names = [f"{x * FRAMES_OF_TIME / FRAMES:.1f}" for x in starts]
    pieces = _words.pieces_of_ids(model._tokens.text, ids, 0)
    return Heard(
        np.concatenate([weights[..., :count], behind], axis=3),
        merged(pieces, [False] * len(ids)),
        Words((*names, BEHIND), (*starts, count), frozenset([len(names)]), names[0]),
    )
