# SPDX-License-Identifier: Apache-2.0
"""BERT, the encoder: Devlin et al. 2018, https://arxiv.org/abs/1810.04805. MiniLM and E5 are such.

Every token of a text sees all others. A layer is attention and a feed-forward network; the input
of each is added to its result, and the sum is normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn.models._context import Texts
from fastattn.models._family import BaseConfig, EncoderModel, Shapes, of_layers, parameters
from fastattn.nn import Floats, Integers, gelu


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """What config.json says of the model, under its keys."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    def __post_init__(self) -> None:
        """Refuse what the model does not compute."""
        super().__post_init__()
        self.multiple("hidden_size", "num_attention_heads")
        self.few_layers("num_hidden_layers")
        self.one_of("hidden_act", "gelu")
        self.one_of("position_embedding_type", "absolute")
        self.one_of("is_decoder", False)


class BertModel(EncoderModel[Config]):
    """The model, with its weights under the checkpoint's names."""

    @staticmethod
    def sanitize(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
        """Drop what is of no use to a text's embedding, and give the rest its present name."""
        found = {}
        for key, x in weights.items():
            name = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
            if not name.startswith(("pooler.", "cls.")) and name != "embeddings.position_ids":
                found[name.replace("LayerNorm.beta", "LayerNorm.bias")] = x
        return found

    @staticmethod
    def shapes(config: Config) -> Shapes:
        """Return the shape of each weight by its name."""
        hidden, inner = config.hidden_size, config.intermediate_size
        tables = {
            "embeddings.word_embeddings": (config.vocab_size, hidden),
            "embeddings.position_embeddings": (config.max_position_embeddings, hidden),
            "embeddings.token_type_embeddings": (config.type_vocab_size, hidden),
        }
        parts = ("self.query", "self.key", "self.value", "output.dense")
        layer: Shapes = dict.fromkeys([f"attention.{part}" for part in parts], (hidden, hidden))
        layer |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
        layer |= {"attention.output.LayerNorm": (hidden,), "output.LayerNorm": (hidden,)}
        found = parameters(tables, bias=False) | parameters({"embeddings.LayerNorm": (hidden,)})
        return found | of_layers("encoder.layer", config.num_hidden_layers, parameters(layer))

    def __call__(self, ids: Integers, texts: Texts) -> Floats:
        """Return the last hidden states of the texts' tokens, of shape (tokens, hidden_size)."""
        self.begin(ids, texts.lengths)
        x = self.states(0, self.embeddings(ids, texts))
        for i in range(self.config.num_hidden_layers):
            layer = f"encoder.layer.{i}"
            x = self.attention(i, x, texts)
            network = f"{layer}.intermediate.dense", f"{layer}.output.dense"
            inner = self.feed_forward(network, x, gelu)
            x = self.states(i + 1, self.norm(f"{layer}.output.LayerNorm", x + inner))
        return x

    def embeddings(self, ids: Integers, texts: Texts) -> Floats:
        """Return what the first layer is given: of each token its word, place and type 0."""
        x = self.embedding("embeddings.word_embeddings", ids)
        x += self.embedding("embeddings.token_type_embeddings", np.zeros(1, np.int64))
        x += self.embedding("embeddings.position_embeddings", texts.positions)
        return self.norm("embeddings.LayerNorm", x)

    def attention(self, layer: int, x: Floats, texts: Texts) -> Floats:
        """Return x after a layer's attention."""
        name = f"encoder.layer.{layer}.attention"
        q, k, v = self.linears([f"{name}.self.{part}" for part in ("query", "key", "value")], x)
        seen = self.attend(layer, q, k, v, self.config.num_attention_heads, texts)
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", seen))

    def norm(self, name: str, x: Floats) -> Floats:
        """Return x, normalised by the weights of that name."""
        return self.layer_norm(name, x, self.config.layer_norm_eps)
