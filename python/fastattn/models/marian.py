# SPDX-License-Identifier: Apache-2.0
"""Marian, the translator: Junczys-Dowmunt et al. 2018, https://arxiv.org/abs/1804.00344.

An encoder and a decoder, whose blocks normalise their sums. Positions are sines and cosines, added
to the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.models._encoder_decoder import (
    EncoderDecoderConfig,
    EncoderDecoderModel,
    SourceContext,
)
from fastattn.models._family import Shapes, parameters
from fastattn.nn import Floats, Integers

READ, WRITTEN, HEAD = "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"
SHARED = "model.shared"  # what the three are, where they are one
COMPUTED = "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"


@dataclass(frozen=True, kw_only=True)
class Config(EncoderDecoderConfig):
    """What config.json says of the model, under its keys."""

    max_position_embeddings: int
    decoder_vocab_size: int | None = None  # vocab_size
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True
    static_position_embeddings: bool = True
    normalize_before: bool = False
    normalize_embedding: bool = False
    add_final_layer_norm: bool = False

    def __post_init__(self) -> None:
        """Refuse what the model does not compute."""
        super().__post_init__()
        for key in ("is_encoder_decoder", "static_position_embeddings"):
            self.one_of(key, True)
        for key in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
            self.one_of(key, False)
        if self.share_encoder_decoder_embeddings:
            self.one_of("decoder_vocab_size", None, self.vocab_size)

    @property
    def target_vocab_size(self) -> int:
        """How many tokens can be written."""
        return self.decoder_vocab_size or self.vocab_size


class MarianMTModel(EncoderDecoderModel[Config]):
    """The model, with its weights under the checkpoint's names."""

    @staticmethod
    def sanitize(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
        """Drop what is computed, give a table all its names, and the head its bias."""
        found = {name: x for name, x in weights.items() if name not in COMPUTED}
        tied = [f"{x}.weight" for x in (HEAD, WRITTEN) if config.tie_word_embeddings]
        if config.share_encoder_decoder_embeddings and tied:
            tied += [f"{x}.weight" for x in (READ, SHARED)]
        for table in [found[x] for x in tied if x in found][-1:]:
            found |= dict.fromkeys(tied, table)
        found.pop(f"{SHARED}.weight", None)
        bias = found.pop("final_logits_bias", np.zeros(config.target_vocab_size, np.float32))
        return found | {f"{HEAD}.bias": bias.reshape(-1)}

    @staticmethod
    def shapes(config: Config) -> Shapes:
        """Return the shape of each weight by its name."""
        written = config.target_vocab_size, config.d_model
        tables = {READ: (config.vocab_size, config.d_model), WRITTEN: written}
        head = parameters({HEAD: written})
        return parameters(tables, bias=False) | head | config.layers()

    def encode(self, ids: Integers, cu_seqlens: Integers) -> Floats:
        """Return the encoder's last hidden states of packed texts, (total, d_model)."""
        places = np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        return self.encoder_layers(ids, self.embeddings(READ, ids, places), cu_seqlens)

    def __call__(self, ids: Integers, context: SourceContext) -> Floats:
        """Return the last hidden states of the tokens that the context is fed, (total, d_model)."""
        x = self.embeddings(WRITTEN, ids, context.positions)
        return self.decoder_layers(ids, x, context)

    def head(self, states: Floats) -> Floats:
        """Return the logits of the token that follows each state."""
        return self.linear(HEAD, states)

    def embeddings(self, table: str, ids: Integers, places: Integers) -> Floats:
        """Return what the first layer is given: of each token its word and its place."""
        columns = self.config.d_model
        powers = np.arange(0, columns, 2) / columns
        angles = places[:, None] / np.power(10000, powers)
        waves = np.concatenate([np.sin(angles), np.cos(angles[:, : columns // 2])], axis=1)
        return self.embedding(table, ids) * self.config.embed_scale + waves.astype(np.float32)
