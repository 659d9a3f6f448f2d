# SPDX-License-Identifier: Apache-2.0
"""Whisper, which writes down what is said: Radford et al. 2022, https://arxiv.org/abs/2212.04356.

The encoder hears 30 seconds of sound at most, two frames of a log-mel spectrogram at a time; the
decoder writes of what it heard.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np

from fastattn.models._encoder_decoder import (
    EncoderDecoderConfig,
    EncoderDecoderModel,
    SourceContext,
)
from fastattn.models._family import Shapes, parameters
from fastattn.models._file import check, shown
from fastattn.nn import Floats, Integers, gelu

KERNEL = 3  # frames that a convolution sees


@dataclass(frozen=True, kw_only=True)
class Config(EncoderDecoderConfig):
    """What config.json and generation_config.json say of the model, under their keys."""

    num_mel_bins: int
    max_source_positions: int
    max_target_positions: int
    tie_word_embeddings: bool = True
    suppress_tokens: list[Any] | None = None
    alignment_heads: list[Any] | None = None  # by layer and head

    def __post_init__(self) -> None:
        """Refuse what the model does not compute."""
        super().__post_init__()
        self.one_of("tie_word_embeddings", True)
        self.one_of("scale_embedding", False)
        check_tokens("suppress_tokens", self.suppress_tokens, self.vocab_size)
        layers, heads = range(self.decoder_layers), range(self.decoder_attention_heads)
        for x in self.alignment_heads or ():
            if not _is_pair(x) or x[0] not in layers or x[1] not in heads:
                rule = f"pairs of a layer and a head, below {len(layers)} and {len(heads)}"
                raise ValueError(f"alignment_heads must be {rule}, got {shown.repr(x)}")

    def with_generation(self, stated: Mapping[str, Any]) -> Config:
        """Return this with the keys that generation_config.json says, if there is one."""
        keys = ("suppress_tokens", "alignment_heads") if stated else ()
        known: dict[str, Any] = {x: stated.get(x) for x in keys}
        return dataclasses.replace(self, **known)

    @property
    def aligned_heads(self) -> list[tuple[int, int]]:
        """The heads that follow the sound, by layer; if unknown, those of the later layers."""
        if self.alignment_heads:
            return [(layer, head) for layer, head in self.alignment_heads]
        later = range(self.decoder_layers // 2, self.decoder_layers)
        return list(itertools.product(later, range(self.decoder_attention_heads)))


class WhisperModel(EncoderDecoderModel[Config]):
    """The model, with its weights under the checkpoint's names."""

    norm_first = True

    @staticmethod
    def sanitize(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
        """Drop the head, which is the table of words, and make products of convolutions."""
        found = {name: x for name, x in weights.items() if name != "proj_out.weight"}
        for name in ("model.encoder.conv1.weight", "model.encoder.conv2.weight"):
            if (x := found.get(name)) is not None and len(x.shape) == 3:
                found[name] = x.transpose(0, 2, 1).reshape(len(x), -1)
        return found

    @staticmethod
    def shapes(config: Config) -> Shapes:
        """Return the shape of each weight by its name."""
        hidden = config.d_model
        found = parameters(
            {
                "model.encoder.conv1": (hidden, KERNEL * config.num_mel_bins),
                "model.encoder.conv2": (hidden, KERNEL * hidden),
                "model.encoder.layer_norm": (hidden,),
                "model.decoder.layer_norm": (hidden,),
            }
        )
        tables = {
            "model.encoder.embed_positions": (config.max_source_positions, hidden),
            "model.decoder.embed_positions": (config.max_target_positions, hidden),
            "model.decoder.embed_tokens": (config.vocab_size, hidden),
        }
        return found | parameters(tables, bias=False) | config.layers(key_bias=False)

    def encode(self, sound: Floats) -> Floats:
        """Return what the encoder hears in a log-mel spectrogram: (frames / 2, d_model).

        It has `num_mel_bins` columns, and two rows for each of `max_source_positions`.
        """
        x = gelu(self.convolution("model.encoder.conv1", sound, 1))
        x = gelu(self.convolution("model.encoder.conv2", x, 2))
        places = np.arange(len(x))
        x += self.embedding("model.encoder.embed_positions", places)
        x = self.encoder_layers(places, x, np.array([0, len(x)]))
        return self.norm("model.encoder.layer_norm", x)

    def convolution(self, name: str, x: Floats, stride: int) -> Floats:
        """Return what a convolution makes of each `stride` rows, with 0 before and behind all."""
        seen = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(1, 1), (0, 0)]), KERNEL, axis=0)
        rows = seen[::stride].swapaxes(1, 2)
        return self.linear(name, rows.reshape(len(rows), -1))

    def __call__(self, ids: Integers, context: SourceContext) -> Floats:
        """Return the last hidden states of the tokens that the context is fed."""
        x = self.embedding("model.decoder.embed_tokens", ids)
        x += self.embedding("model.decoder.embed_positions", context.positions)
        return self.norm("model.decoder.layer_norm", self.decoder_layers(ids, x, context))

    def head(self, states: Floats) -> Floats:
        """Return the logits of the token that follows each state."""
        return self.linear("model.decoder.embed_tokens", states)


def check_tokens(key: str, found: Any, vocab_size: int) -> None:
    """Refuse a key's value that is neither null nor a list of tokens."""
    check(key, found, list, NoneType)
    for x in found or ():
        if type(x) is not int or not 0 <= x < vocab_size:
            rule = f"tokens below vocab_size, {vocab_size}"
            raise ValueError(f"{key} must be {rule}, got {shown.repr(x)}")


def _is_pair(x: Any) -> bool:
    """Tell whether x is a list of two integers."""
    return type(x) is list and [type(n) for n in x] == [int, int]
