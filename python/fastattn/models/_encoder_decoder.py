# SPDX-License-Identifier: Apache-2.0
"""What families share that write of a source: an encoder reads it, a decoder looks at that.

The layers are those of the first Transformer, Vaswani et al. 2017,
https://arxiv.org/abs/1706.03762, under the names of BART's checkpoints, which Marian's and
Whisper's have too. A family adds what its layers are given, and its head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from fastattn import nn, varlen_attention
from fastattn.models._capture import Ablation, Attention, Capture, Observed, Watched, observing
from fastattn.models._context import Context
from fastattn.models._family import BaseConfig, Model, Shapes, of_layers, parameters
from fastattn.models._file import one_of
from fastattn.nn import Floats, Integers

EPS = 1e-5  # of the norms, which no configuration says
ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {  # by their names in config.json
    "gelu": nn.gelu,
    "gelu_new": partial(nn.gelu, approximate="tanh"),
    "relu": lambda x: np.maximum(x, np.float32(0)),
    **dict.fromkeys(("silu", "swish"), lambda x: nn.swiglu(x, np.ones_like(x))),
}


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(BaseConfig):
    """What config.json says of the layers, under its keys."""

    vocab_size: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    activation_function: str = "gelu"
    scale_embedding: bool = False  # by the root of d_model

    def __post_init__(self) -> None:
        """Refuse what the layers do not compute."""
        super().__post_init__()
        for side in ("encoder", "decoder"):
            self.few_layers(f"{side}_layers")
            self.multiple("d_model", f"{side}_attention_heads")
        self.one_of("activation_function", *ACTIVATIONS)

    @property
    def embed_scale(self) -> np.float32:
        """What the embeddings of tokens are multiplied by."""
        return np.float32(self.d_model**0.5 if self.scale_embedding else 1)

    def layers(self, *, key_bias: bool = True) -> Shapes:
        """Return the shapes of the weights of all layers; the keys may have no bias."""
        found: Shapes = {}
        for side, attentions in (("encoder", ("self",)), ("decoder", ("self", "encoder"))):
            inner = getattr(self, f"{side}_ffn_dim")
            layer: Shapes = {"fc1": (inner, self.d_model), "fc2": (self.d_model, inner)}
            layer["final_layer_norm"] = (self.d_model,)
            for name in attentions:
                parts = [f"{name}_attn.{x}_proj" for x in ("q", "k", "v", "out")]
                layer |= dict.fromkeys(parts, (self.d_model, self.d_model))
                layer[f"{name}_attn_layer_norm"] = (self.d_model,)
            shapes = parameters(layer)
            if not key_bias:
                shapes = {x: shape for x, shape in shapes.items() if not x.endswith("k_proj.bias")}
            count = getattr(self, f"{side}_layers")
            found |= of_layers(f"model.{side}.layers", count, shapes)
        return found


C = TypeVar("C", bound=EncoderDecoderConfig)


class Sizes(NamedTuple):
    """How much of a part can be looked into, under the usual keys of a configuration."""

    num_hidden_layers: int
    num_attention_heads: int


class Part(Watched):
    """One of the three kinds of attention of a model, at which observers look on."""

    def __init__(self, layers: int, heads: int) -> None:
        self.config = Sizes(layers, heads)


class SourceContext(Context):
    """What a decoder has read, and the keys and values of the sources that it writes of.

    These are computed once, and are shared by all sequences that are written of a source.

    Parameters
    ----------
    sources : sequence of (array, array)
        Of each layer the keys and values of all sources, of shape (total, heads, head_dim).
    cu_seqlens : array of int64, shape (sources + 1,)
        Where each source begins in them. At first there is a sequence of each.
    """

    def __init__(self, sources: Sequence[tuple[Floats, Floats]], cu_seqlens: Integers) -> None:
        self._keys_values, self._cu_seqlens = sources, cu_seqlens
        self._sources = np.arange(len(cu_seqlens) - 1)  # of each sequence, which must ascend
        super().__init__(len(self._sources), len(sources), *sources[0][0].shape[1:])

    def anew(self) -> SourceContext:
        """Return a context of the same sources, of which nothing has been written."""
        return SourceContext(self._keys_values, self._cu_seqlens)

    def feed(self, counts: Sequence[int]) -> None:
        """Say how many tokens of each sequence come now, packed one sequence after the other."""
        super().feed(counts)
        rows = np.zeros(len(self._cu_seqlens), np.int64)
        np.add.at(rows, self._sources + 1, counts)
        self._cu_rows = rows.cumsum()

    def reorder(self, indices: Sequence[int]) -> None:
        """Go on with these sequences in this order, in which the sources must not descend."""
        super().reorder(indices)
        self._sources = self._sources[list(indices)]

    def attend_source(self, layer: int, query: Floats) -> tuple[Attention, Floats]:
        """Return how a layer of the fed tokens attends to their sources, and what they see.

        That is of shape (total, heads * head_dim). Keys and values are stated where they are new:
        to the first tokens that are read.
        """
        key, value = self._keys_values[layer]
        seen: Floats = varlen_attention(query, key, value, self._cu_rows, self._cu_seqlens)
        new = slice(None) if len(query) == self.lengths.sum() else slice(0)
        attention = Attention(query, key[new], value[new], {"is_causal": False})
        return attention, seen.reshape(len(query), -1)


class EncoderDecoderModel(Model[C]):
    """A model whose encoder reads sources, and whose decoder writes of them, token by token.

    A family says what the first layers are given, what follows the last ones, and `head`.

    Attributes
    ----------
    parts : dict of Part
        "encoder", "decoder" and "cross": where observers look on.
    norm_first : bool
        Whether a block is given the norm of what its result is added to, or the sum is normalised.
    """

    norm_first = False

    def __init__(self, config: C, weights: Mapping[str, Any]) -> None:
        super().__init__(config, weights)
        reads = config.encoder_layers, config.encoder_attention_heads
        writes = config.decoder_layers, config.decoder_attention_heads
        self.parts = {"encoder": Part(*reads), "decoder": Part(*writes), "cross": Part(*writes)}

    @abstractmethod
    def __call__(self, ids: Integers, context: SourceContext) -> Floats:
        """Return the last hidden states of the tokens that the context is fed, (total, d_model)."""

    @abstractmethod
    def head(self, states: Floats) -> Floats:
        """Return the logits of the token that follows each state, (rows, vocabulary)."""

    def context(self, sources: Floats, cu_seqlens: Integers) -> SourceContext:
        """Return what has been written of packed sources, as the encoder gives them: nothing."""
        names = [
            f"model.decoder.layers.{i}.encoder_attn" for i in range(self.config.decoder_layers)
        ]
        heads = self.config.decoder_attention_heads
        return SourceContext(
            [
                (self._heads(f"{x}.k", sources, heads), self._heads(f"{x}.v", sources, heads))
                for x in names
            ],
            cu_seqlens,
        )

    def encoder_layers(self, ids: Integers, x: Floats, cu_seqlens: Integers) -> Floats:
        """Return packed sources behind the encoder's layers; ids are for the observers."""
        part = self.parts["encoder"]
        part.begin(ids, np.diff(cu_seqlens))
        for i in range(self.config.encoder_layers):
            layer = f"model.encoder.layers.{i}"
            x = self._block(f"{layer}.self_attn", part.states(i, x), self._read, i, cu_seqlens)
            x = self._block(f"{layer}.final", x, self._feed_forward, layer)
        return part.states(self.config.encoder_layers, x)

    def decoder_layers(self, ids: Integers, x: Floats, context: SourceContext) -> Floats:
        """Return the tokens that the context is fed behind the decoder's layers."""
        parts = self.parts["decoder"], self.parts["cross"]
        context.observers = parts[0].observers
        for part in parts:
            part.begin(ids, context.lengths)
        for i in range(self.config.decoder_layers):
            for part in parts:
                part.states(i, x)
            layer = f"model.decoder.layers.{i}"
            x = self._block(f"{layer}.self_attn", x, self._write, i, context)
            x = self._block(f"{layer}.encoder_attn", x, self._look, i, context)
            x = self._block(f"{layer}.final", x, self._feed_forward, layer)
        for part in parts:
            part.states(self.config.decoder_layers, x)
        return x

    def norm(self, name: str, x: Floats) -> Floats:
        """Return x, normalised by the weights of that name."""
        return self.layer_norm(name, x, EPS)

    def _block(self, name: str, x: Floats, compute: Callable[..., Floats], *given: Any) -> Floats:
        """Return x plus what is computed of it, with a norm before or behind."""
        norm = f"{name}_layer_norm"
        if self.norm_first:
            return x + compute(self.norm(norm, x), *given)
        return self.norm(norm, x + compute(x, *given))

    def _read(self, x: Floats, layer: int, cu_seqlens: Integers) -> Floats:
        """Return what the tokens of sources see of these."""
        name, heads = f"model.encoder.layers.{layer}.self_attn", self.config.encoder_attention_heads
        query, key, value = (self._heads(f"{name}.{part}", x, heads) for part in "qkv")
        seen = varlen_attention(query, key, value, cu_seqlens, cu_seqlens).reshape(x.shape)
        attention = Attention(query, key, value, {"is_causal": False})
        self.parts["encoder"].attended(layer, attention, seen)
        return self.linear(f"{name}.out_proj", seen)

    def _write(self, x: Floats, layer: int, context: SourceContext) -> Floats:
        """Return what tokens see of those that were written before."""
        name, heads = f"model.decoder.layers.{layer}.self_attn", self.config.decoder_attention_heads
        seen = context.attend(layer, *(self._heads(f"{name}.{part}", x, heads) for part in "qkv"))
        return self.linear(f"{name}.out_proj", seen)

    def _look(self, x: Floats, layer: int, context: SourceContext) -> Floats:
        """Return what tokens see of their sources."""
        name = f"model.decoder.layers.{layer}.encoder_attn"
        query = self._heads(f"{name}.q", x, self.config.decoder_attention_heads)
        attention, seen = context.attend_source(layer, query)
        self.parts["cross"].attended(layer, attention, seen)
        return self.linear(f"{name}.out_proj", seen)

    def _feed_forward(self, x: Floats, layer: str) -> Floats:
        """Return what a layer's feed-forward network computes of x."""
        activation = ACTIVATIONS[self.config.activation_function]
        return self.feed_forward((f"{layer}.fc1", f"{layer}.fc2"), x, activation)

    def _heads(self, name: str, x: Floats, heads: int) -> Floats:
        """Return a projection of x, head by head: (total, heads, head_dim)."""
        return self.linear(f"{name}_proj", x).reshape(len(x), heads, -1)


class EncoderDecoder(Observed):
    """What can be looked into of a model that writes of sources."""

    _model: EncoderDecoderModel[Any]

    def capture(
        self,
        *,
        of: str = "cross",
        layers: ArrayLike | None = None,
        heads: ArrayLike | None = None,
        rows: slice | ArrayLike | None = None,
        what: str | Iterable[str] = ("weights",),
        top: int = 8,
    ) -> AbstractContextManager[Capture]:
        """Capture what heads see of one source, or of what is written, while the model runs.

        In the `with`, call what runs the model once, with one beam: it must write one text.

        Parameters
        ----------
        of : {"cross", "decoder", "encoder"}
            Where tokens that are written look: at the source, whose tokens are the columns, or at
            those before them; or where the source's own tokens look.
        layers, heads, rows, what, top
            As of `Decoder.capture`. Rows are tokens as the decoder reads them: the first one is
            the start token, and what a row looks at writes the token behind it.

        Returns
        -------
        context manager of a Capture

        Raises
        ------
        TypeError, ValueError
            As for `Decoder.capture`; or there is no such attention.
        """
        part = self._part(of)
        asked = Capture(part, layers=layers, heads=heads, rows=rows, what=what, top=top)
        return observing(part, asked)

    def ablate(self, heads: ArrayLike, *, of: str = "cross") -> AbstractContextManager[Any]:
        """Let heads give 0, for as long as a `with` lasts, as `Decoder.ablate` does.

        Parameters
        ----------
        heads : sequence of (int, int)
            Layers, and a head of each.
        of : {"cross", "decoder", "encoder"}
            Whose heads: see `capture`.

        Raises
        ------
        TypeError, ValueError
            heads are no such pairs, one is not there, or there is no such attention.
        """
        part = self._part(of)
        return observing(part, Ablation(part, heads))

    def _part(self, of: str) -> Part:
        """Return the part of that name."""
        return self._model.parts[one_of("of", of, self._model.parts)]
