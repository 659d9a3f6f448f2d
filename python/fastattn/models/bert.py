# SPDX-License-Identifier: Apache-2.0
"""BERT, the encoder: Devlin et al. 2018, https://arxiv.org/abs/1810.04805. MiniLM and E5 are such.

Every token of a text sees all others. A layer is attention and a feed-forward network; the input
of each is added to its result, and the sum is normalised.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastattn.nn import Floats, Integers, embedding, gelu, layer_norm, linear, multi_head_attention

MOST_LAYERS = 1000  # so that a wrong file does not fill the memory with names


@dataclass(frozen=True)
class Config:
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
        if self.hidden_size % self.num_attention_heads:
            rule = (
                f"hidden_size must be a multiple of num_attention_heads, {self.num_attention_heads}"
            )
            raise ValueError(f"{rule}, got {self.hidden_size}")
        if self.num_hidden_layers > MOST_LAYERS:
            found = self.num_hidden_layers
            raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {found}")
        for key, only in (
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
        ):
            if (found := getattr(self, key)) != only:
                raise ValueError(f"{key} must be {only!r}, got {found!r}")


class BertModel:
    """The model, with its weights under the checkpoint's names."""

    def __init__(self, config: Config, weights: Mapping[str, Floats]) -> None:
        self.config, self.weights = config, weights

    @staticmethod
    def name_of(name: str) -> str | None:
        """Return a tensor's name here; None if it is of no use to a text's embedding."""
        name = name.removeprefix("bert.")
        if name.startswith(("pooler.", "cls.")) or name == "embeddings.position_ids":
            return None
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )

    @staticmethod
    def shapes(config: Config) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight by its name."""
        hidden, inner = config.hidden_size, config.intermediate_size
        found: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
            "embeddings.position_embeddings.weight": (config.max_position_embeddings, hidden),
            "embeddings.token_type_embeddings.weight": (config.type_vocab_size, hidden),
        }
        norms, products = ["embeddings.LayerNorm"], {}
        for i in range(config.num_hidden_layers):
            layer = f"encoder.layer.{i}"
            norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                products[f"{layer}.attention.{name}"] = hidden, hidden
            products[f"{layer}.intermediate.dense"] = inner, hidden
            products[f"{layer}.output.dense"] = hidden, inner
        for name in norms:
            found |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
        for name, shape in products.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return found

    def __call__(self, ids: Integers, cu_seqlens: Integers) -> Floats:
        """Return the last hidden states of packed texts, of shape (tokens, hidden_size)."""
        x = self.embeddings(ids, cu_seqlens)
        for i in range(self.config.num_hidden_layers):
            layer = f"encoder.layer.{i}"
            x = self.attention(f"{layer}.attention", x, cu_seqlens)
            inner = gelu(self.linear(f"{layer}.intermediate.dense", x, cu_seqlens))
            x = self.add_and_norm(f"{layer}.output", inner, x, cu_seqlens)
        return x

    def embeddings(self, ids: Integers, cu_seqlens: Integers) -> Floats:
        """Return what the first layer is given: of each token its word, place and type 0."""
        words, positions, types = (
            self.weights[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        )
        place = np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        x = embedding(ids, words)
        x += types[0]
        x += embedding(place, positions)
        return self.layer_norm("embeddings.LayerNorm", x)

    def attention(self, name: str, x: Floats, cu_seqlens: Integers) -> Floats:
        """Return x after a layer's attention."""
        q, k, v = (
            self.linear(f"{name}.self.{part}", x, cu_seqlens) for part in ("query", "key", "value")
        )
        seen = multi_head_attention(q, k, v, self.config.num_attention_heads, cu_seqlens)
        return self.add_and_norm(f"{name}.output", seen, x, cu_seqlens)

    def add_and_norm(self, name: str, x: Floats, before: Floats, cu_seqlens: Integers) -> Floats:
        """Return the norm of a projection of x, plus what was there before."""
        x = self.linear(f"{name}.dense", x, cu_seqlens)
        x += before
        return self.layer_norm(f"{name}.LayerNorm", x)

    def linear(self, name: str, x: Floats, cu_seqlens: Integers) -> Floats:
        """Return x times the weight of that name."""
        weight, bias = (self.weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return linear(x, weight, bias, cu_seqlens)

    def layer_norm(self, name: str, x: Floats) -> Floats:
        """Return x, normalised by the weights of that name."""
        weight, bias = (self.weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return layer_norm(x, weight, bias, self.config.layer_norm_eps)
