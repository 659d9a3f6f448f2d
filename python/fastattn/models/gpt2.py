# SPDX-License-Identifier: Apache-2.0
"""GPT-2, the decoder: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

A layer is attention and a feed-forward network; each is given the norm of what it adds its result
to. Positions are learnt, and added to the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastattn.models._context import Context, Reading
from fastattn.models._family import BaseConfig, DecoderModel, Shapes, of_layers, parameters
from fastattn.nn import Floats, Integers, gelu

GELU_NEW = partial(gelu, approximate="tanh")
TRANSPOSED = (  # layers whose weights the checkpoint stores as (in, out)
    *("attn.c_attn.weight", "attn.c_proj.weight"),
    *("mlp.c_fc.weight", "mlp.c_proj.weight"),
)


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """What config.json says of the model, under its keys."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None  # four times n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Refuse what the model does not compute."""
        super().__post_init__()
        self.one_of("activation_function", "gelu_new", "gelu_pytorch_tanh")
        self.one_of("add_cross_attention", False)
        self.few_layers("n_layer")
        self.multiple("n_embd", "n_head")

    @property
    def max_position_embeddings(self) -> int:
        """The most tokens of a text, under its usual name."""
        return self.n_positions

    @property
    def num_hidden_layers(self) -> int:
        """The layers, under their usual name."""
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        """The heads of a layer, under their usual name."""
        return self.n_head


class GPT2Model(DecoderModel[Config]):
    """The model, with its weights under the checkpoint's names."""

    last_norm = "ln_f"

    @staticmethod
    def sanitize(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
        """Transpose what is stored as (in, out), and drop masks and a head that is tied."""
        found = {}
        for key, x in weights.items():
            name = key.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                found[name] = np.ascontiguousarray(x.T) if name.endswith(TRANSPOSED) else x
        return found

    @staticmethod
    def shapes(config: Config) -> Shapes:
        """Return the shape of each weight by its name."""
        hidden, inner = config.n_embd, config.n_inner or 4 * config.n_embd
        tables = {"wte": (config.vocab_size, hidden), "wpe": (config.n_positions, hidden)}
        if not config.tie_word_embeddings:
            tables["lm_head"] = config.vocab_size, hidden
        layer = {
            **{"ln_1": (hidden,), "ln_2": (hidden,)},
            **{"attn.c_attn": (3 * hidden, hidden), "attn.c_proj": (hidden, hidden)},
            **{"mlp.c_fc": (inner, hidden), "mlp.c_proj": (hidden, inner)},
        }
        found = parameters(tables, bias=False) | parameters({"ln_f": (hidden,)})
        return found | of_layers("h", config.n_layer, parameters(layer))

    def context(self, sequences: int) -> Context:
        """Return what has been read of so many sequences: nothing yet."""
        heads = self.config.n_head
        return Context(sequences, self.config.n_layer, heads, self.config.n_embd // heads)

    def __call__(self, ids: Integers, context: Reading) -> Floats:
        """Return the last hidden states of the tokens that the context is fed."""
        x = self.embedding("wte", ids)
        x += self.embedding("wpe", context.positions)
        for i in self.layers(ids, x, context):
            x += self.attention(i, self.norm(f"h.{i}.ln_1", x), context)
            network = f"h.{i}.mlp.c_fc", f"h.{i}.mlp.c_proj"
            x += self.feed_forward(network, self.norm(f"h.{i}.ln_2", x), GELU_NEW)
        return self.norm(self.last_norm, x)

    def head(self, states: Floats) -> Floats:
        """Return the logits of the token that follows each state."""
        return self.linear("wte" if self.config.tie_word_embeddings else "lm_head", states)

    def attention(self, layer: int, x: Floats, context: Reading) -> Floats:
        """Return what a layer's attention adds."""
        name, heads = f"h.{layer}.attn", self.config.n_head
        both = self.linear(f"{name}.c_attn", x).reshape(len(x), 3, heads, -1)
        scale = (self.config.n_embd // heads) ** -0.5 if self.config.scale_attn_weights else 1.0
        if self.config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        seen = context.attend(layer, both[:, 0], both[:, 1], both[:, 2], scale=scale)
        return self.linear(f"{name}.c_proj", seen)

    def norm(self, name: str, x: Floats) -> Floats:
        """Return x, normalised by the weights of that name."""
        return self.layer_norm(name, x, self.config.layer_norm_epsilon)
