# SPDX-License-Identifier: Apache-2.0
"""Llama, the decoder: Touvron et al. 2023, https://arxiv.org/abs/2302.13971.

SmolLM2 is one; Mistral, Qwen2 and Qwen3 differ in config.json. A layer is attention, to which
positions turn queries and keys, and a gated feed-forward network; their input is normed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.models._context import Context, Reading
from fastattn.models._family import DecoderModel, RotaryConfig, Shapes, of_layers, parameters
from fastattn.models._file import Natural
from fastattn.nn import Floats, Integers, rotary, rotary_tables


@dataclass(frozen=True, kw_only=True)
class Config(RotaryConfig):
    """What config.json says of the model, under its keys."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # as many as the others
    head_dim: int | None = None  # what the heads are of hidden_size
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = 4096  # of Mistral, and where the next three keys say, Qwen
    use_sliding_window: bool = False
    max_window_layers: Natural = 28
    layer_types: list[Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what the model does not compute."""
        super().__post_init__()
        self.one_of("model_type", "llama", "mistral", "qwen2", "qwen3")
        self.one_of("hidden_act", "silu")
        self.few_layers("num_hidden_layers")
        if self.head_dim is None:
            self.multiple("hidden_size", "num_attention_heads")
        if self.num_key_value_heads is not None:
            self.multiple("num_attention_heads", "num_key_value_heads")
        self.rotary_dim(self.head_size)
        self.each_of("layer_types", "num_hidden_layers", "full_attention", "sliding_attention")

    @property
    def head_size(self) -> int:
        """The columns of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """The heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """Return how many of the last tokens a token of a layer sees; None: all."""
        slides = self.model_type == "mistral"
        if self.model_type.startswith("qwen") and self.use_sliding_window:
            slides = layer >= self.max_window_layers
            if self.layer_types is not None:
                slides = self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None


class LlamaModel(DecoderModel[Config]):
    """The model, with its weights under the checkpoint's names."""

    def __init__(self, config: Config, weights: Mapping[str, Any]) -> None:
        super().__init__(config, weights)
        self.frequencies = config.frequencies(config.head_size)

    @staticmethod
    def sanitize(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
        """Drop what is computed, and a head that is the table of the words."""
        spare = ("rotary_emb.inv_freq", *["lm_head.weight"] * config.tie_word_embeddings)
        return {name: x for name, x in weights.items() if not name.endswith(spare)}

    @staticmethod
    def shapes(config: Config) -> Shapes:
        """Return the shape of each weight by its name."""
        hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_size
        q, kv = config.num_attention_heads * head, config.kv_heads * head
        qwen2, qwen3 = (config.model_type == x for x in ("qwen2", "qwen3"))
        tables: Shapes = {"model.norm": (hidden,)}
        for name in ["model.embed_tokens", *["lm_head"] * (not config.tie_word_embeddings)]:
            tables[name] = config.vocab_size, hidden
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
        norms |= {f"self_attn.{x}_norm": (head,) for x in "qk" if qwen3}
        read = {f"self_attn.{x}_proj": (n, hidden) for x, n in (("q", q), ("k", kv), ("v", kv))}
        out = {"self_attn.o_proj": (hidden, q)}
        gated = {f"mlp.{x}_proj": (inner, hidden) for x in ("gate", "up")}
        layer = parameters(norms, bias=False)
        layer |= parameters(read, bias=config.attention_bias or qwen2)
        layer |= parameters(out, bias=config.attention_bias and not qwen2)
        layer |= parameters(gated | {"mlp.down_proj": (hidden, inner)}, bias=config.mlp_bias)
        layers = of_layers("model.layers", config.num_hidden_layers, layer)
        return parameters(tables, bias=False) | layers

    def context(self, sequences: int) -> Context:
        """Return what has been read of so many sequences: nothing yet."""
        config = self.config
        return Context(sequences, config.num_hidden_layers, config.kv_heads, config.head_size)

    def __call__(self, ids: Integers, context: Reading) -> Floats:
        """Return the last hidden states of the tokens that the context is fed."""
        x = self.embedding("model.embed_tokens", ids)
        turns = rotary_tables(context.positions, self.frequencies)
        for i in self.layers(ids, x, context):
            layer = f"model.layers.{i}"
            x += self.attention(i, self.norm(f"{layer}.input_layernorm", x), turns, context)
            network = [f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")]
            x += self.gated_feed_forward(network, self.norm(f"{layer}.post_attention_layernorm", x))
        return self.norm(self.last_norm, x)

    def head(self, states: Floats) -> Floats:
        """Return the logits of the token that follows each state."""
        tied = self.config.tie_word_embeddings
        return self.linear("model.embed_tokens" if tied else "lm_head", states)

    def attention(
        self, layer: int, x: Floats, turns: tuple[Floats, Floats], context: Reading
    ) -> Floats:
        """Return what a layer's attention adds."""
        name, config = f"model.layers.{layer}.self_attn", self.config
        q, k, v = (
            part.reshape(len(x), -1, config.head_size)
            for part in self.linears([f"{name}.{part}_proj" for part in "qkv"], x)
        )
        if config.model_type == "qwen3":
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        window = config.window(layer)
        options = {} if window is None else {"window": (window - 1, 0)}
        seen = context.attend(layer, rotary(q, *turns), rotary(k, *turns), v, **options)
        return self.linear(f"{name}.o_proj", seen)

    def norm(self, name: str, x: Floats) -> Floats:
        """Return x, normalised by the weight of that name."""
        return self.rms_norm(name, x, self.config.rms_norm_eps)
