# SPDX-License-Identifier: Apache-2.0
"""What families of models share: a configuration that refuses, and layers by their weights' names.

A family is a file with a `Config` and a `Model`; CONTRIBUTING says how to add one.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Generic, Self, TypeVar

import numpy as np

from fastattn import nn
from fastattn._linear import Layer, layer_of, through
from fastattn.models._capture import Attention, Watched
from fastattn.models._context import Context, Reading, Texts
from fastattn.models._file import KINDS, check, shown
from fastattn.nn import Floats, Integers

MOST_LAYERS = 1000  # so that a wrong file does not fill the memory with names
NETWORK_ROWS = 4096  # that a feed-forward network is given at once
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What config.json says of a model, under its keys.

    A family lists those that it computes with, the types of their values, and what they are where
    the file does not say. Types are those of `KINDS`, or one of them ``| None``; the elements of a
    list are for the family to check. Its `__post_init__` refuses what it does not compute.
    """

    @classmethod
    def read(cls, stated: Mapping[str, Any]) -> Self:
        """Return the configuration of a config.json; null is as good as nothing."""
        fields = dataclasses.fields(cls)
        for field in fields:
            if stated.get(field.name) is None and field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} must be there, and is not")
        kinds = _kinds(cls)
        given = [x.name for x in fields if x.name in stated]
        known = {x: stated[x] for x in given if stated[x] is not None or NoneType in kinds[x]}
        return cls(**known)

    def __post_init__(self) -> None:
        """Refuse values of other types than the family lists."""
        for key, kinds in _kinds(type(self)).items():
            check(key, getattr(self, key), *kinds)

    def one_of(self, key: str, *allowed: Any) -> None:
        """Refuse other values of a key."""
        if (found := getattr(self, key)) not in allowed:
            raise ValueError(
                f"{key} must be {' or '.join(map(repr, allowed))}, got {shown.repr(found)}"
            )

    def few_layers(self, key: str) -> None:
        """Refuse more layers than any model has."""
        if (found := getattr(self, key)) > MOST_LAYERS:
            raise ValueError(f"{key} must be at most {MOST_LAYERS}, got {found}")

    def multiple(self, key: str, divisor: str) -> None:
        """Refuse a value that another key's value does not divide."""
        found, by = getattr(self, key), getattr(self, divisor)
        if found % by:
            raise ValueError(f"{key} must be a multiple of {divisor}, {by}, got {found}")

    def each_of(self, key: str, count: str, *allowed: str) -> None:
        """Refuse a list that has not one of these for each of as many as another key says."""
        found, n = getattr(self, key), getattr(self, count)
        if found is not None and (len(found) != n or any(x not in allowed for x in found)):
            rule = f"{' or '.join(map(repr, allowed))} for each of {count}, {n}"
            raise ValueError(f"{key} must be {rule}, got {shown.repr(found)}")


ROTARY = {  # the numbers that each type of rotary positions needs
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(BaseConfig):
    """The configuration of a model with rotary positions, in the keys of all transformers.

    A family whose positions turn a part of a head's columns sets `turns_part`.
    """

    turns_part = False
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # of a head's columns, those that are turned
    rope_scaling: dict[str, Any] | None = None  # the rest, in older files
    rope_parameters: dict[str, Any] | None = None  # everything, in newer ones

    def __post_init__(self) -> None:
        """Refuse types of rotary positions that are not computed."""
        super().__post_init__()
        place = "rope_scaling" if self.rope_parameters is None else "rope_parameters"
        stated, kind = self._rotary(), self._rotary_type()
        if not isinstance(kind, str) or kind not in ROTARY:
            raise ValueError(
                f"{place}.rope_type must be one of {', '.join(ROTARY)}, got {shown.repr(kind)}"
            )
        needed = ("rope_theta", "partial_rotary_factor", *ROTARY[kind])
        for key in needed:
            check(f"{place}.{key}", stated.get(key), float)
        if not self.turns_part and (part := stated["partial_rotary_factor"]) != 1:
            raise ValueError(f"partial_rotary_factor must be 1, got {part}")
        if unknown := sorted(stated.keys() - {*needed, "rope_type", "type"}):
            raise ValueError(f"{place}.{unknown[0][:100]} is not supported for rope_type {kind!r}")
        if kind == "llama3" and (found := stated["high_freq_factor"]) <= stated["low_freq_factor"]:
            rule = f"above low_freq_factor, {stated['low_freq_factor']}"
            raise ValueError(f"{place}.high_freq_factor must be {rule}, got {found}")

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many columns of a head are turned, which must be pairs."""
        part = self._rotary()["partial_rotary_factor"]
        found = int(head_dim * part)
        if found % 2 or not 0 < found <= head_dim:
            rule = f"head_dim times partial_rotary_factor must be even, from 2 to {head_dim}"
            raise ValueError(f"{rule}, got {head_dim} * {part}")
        return found

    def frequencies(self, head_dim: int) -> Floats:
        """Return the radians that a position turns each pair of a head's columns."""
        stated, dim = self._rotary(), self.rotary_dim(head_dim)
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        found = 1 / np.power(np.float32(stated["rope_theta"]), exponents)
        if self._rotary_type() == "linear":
            found = found / stated["factor"]
        if self._rotary_type() == "llama3":  # slows the pairs that turn seldom in the old length
            factor, low, high, length = (stated[key] for key in ROTARY["llama3"])
            kept = np.clip((length * found / (2 * math.pi) - low) / (high - low), 0, 1)
            found = found * (kept + (1 - kept) / factor)
        return np.asarray(found, np.float32)

    def _rotary(self) -> dict[str, Any]:
        """Return what the keys say together."""
        usual = {
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        stated = self.rope_scaling if self.rope_parameters is None else self.rope_parameters
        return usual | (stated or {})

    def _rotary_type(self) -> Any:
        """Return the type of rotary positions, whose key was `type` once."""
        stated = self._rotary()
        return stated.get("rope_type", stated.get("type", "default"))


C = TypeVar("C", bound=BaseConfig)


class Model(Watched, ABC, Generic[C]):
    """A model: what it computes with its configuration, and with its weights by their names.

    Weights with two axes are as stored, of any type that `nn.linear` reads; others are float32.
    The configuration has `num_hidden_layers` and `num_attention_heads`, as keys or as properties.
    """

    config: C

    def __init__(self, config: C, weights: Mapping[str, Any]) -> None:
        self.config, self.weights = config, weights
        self._checked: dict[str, tuple[Layer, Any, Any]] = {}  # and the weight and bias it is of

    @staticmethod
    def sanitize(config: Any, weights: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's tensors under the names, and in the form, that `shapes` says."""
        return weights

    @staticmethod
    @abstractmethod
    def shapes(config: Any) -> Shapes:
        """Return the shape of each weight by its name."""

    def linear(self, name: str, x: Floats) -> Floats:
        """Return x times the weight of that name, plus its bias, if there is one."""
        return through(x, *self._layers((name,)))[0]

    def linears(self, names: Sequence[str], x: Floats) -> list[Floats]:
        """Return x times each weight, plus its bias: as `linear`, and all at once."""
        return through(x, *self._layers(names))

    def feed_forward(
        self, names: Sequence[str], x: Floats, activation: Callable[[Floats], Floats]
    ) -> Floats:
        """Return x after a feed-forward network, whose layers up and down have these names."""
        up, down = self._layers(names)
        return by_rows(lambda x: through(activation(through(x, up)[0]), down)[0], x)

    def gated_feed_forward(
        self,
        names: Sequence[str],
        x: Floats,
        activation: Callable[[Floats, Floats], Floats] = nn.swiglu,
    ) -> Floats:
        """Return x after a feed-forward network with the layers gate, up and down."""
        gate, up, down = self._layers(names)
        return by_rows(lambda x: through(activation(*through(x, gate, up)), down)[0], x)

    def _layers(self, names: Sequence[str]) -> list[Layer]:
        """Return linear layers. Each is checked once, and again if it is replaced."""
        found, get, weights = [], self.weights.get, self.weights
        for name in names:
            given = weight, bias = weights[f"{name}.weight"], get(f"{name}.bias")
            layer, of_weight, of_bias = self._checked.get(name, (None, None, None))
            if layer is None or of_weight is not weight or of_bias is not bias:
                layer = layer_of(*given)
                if layer.numbers is getattr(weight, "blocks", weight):  # and no copy
                    self._checked[name] = (layer, *given)
            found.append(layer)
        return found

    def embedding(self, name: str, ids: Integers) -> Floats:
        """Return the rows of the table of that name."""
        return nn.embedding(ids, self.weights[f"{name}.weight"])

    def layer_norm(self, name: str, x: Floats, eps: float) -> Floats:
        """Return x, normalised by the weight and bias of that name."""
        return nn.layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def rms_norm(self, name: str, x: Floats, eps: float) -> Floats:
        """Return x, normalised by the weight of that name."""
        return nn.rms_norm(x, self.weights[f"{name}.weight"], eps)


class DecoderModel(Model[C]):
    """A model that reads tokens and says of each which one may follow.

    Its configuration has `vocab_size` and `max_position_embeddings`, as keys or as properties.
    """

    last_norm = "model.norm"  # the name of the norm behind the last layer

    @abstractmethod
    def context(self, sequences: int) -> Context:
        """Return what has been read of so many sequences: nothing yet."""

    @abstractmethod
    def __call__(self, ids: Integers, context: Reading) -> Floats:
        """Return the hidden states of the tokens that the context was told of, (total, hidden)."""

    @abstractmethod
    def head(self, states: Floats) -> Floats:
        """Return the logits of the token that follows each state, (rows, vocabulary)."""

    @abstractmethod
    def norm(self, name: str, x: Floats) -> Floats:
        """Return x, normalised by the weights of that name."""

    def layers(self, ids: Integers, x: Floats, context: Reading) -> Iterator[int]:
        """Yield the number of each layer, which changes the states x in place.

        The observers are told the tokens, x before each layer and behind all, and, by the context,
        how each attends.
        """
        context.observers = self.observers
        self.begin(ids, context.lengths)
        for i in range(context.layers):
            self.states(i, x)
            yield i
        self.states(context.layers, x)


class EncoderModel(Model[C]):
    """A model that reads whole texts. Its configuration has `hidden_size`."""

    @abstractmethod
    def __call__(self, ids: Integers, texts: Texts) -> Floats:
        """Return the last hidden states of the texts' tokens, of shape (tokens, hidden_size)."""

    def attend(
        self, layer: int, query: Floats, key: Floats, value: Floats, heads: int, texts: Texts
    ) -> Floats:
        """Return what the tokens see of their texts in a layer, of which the observers are told."""
        seen = texts.attend(query, key, value, heads)
        q, k, v = (x.reshape(len(x), heads, -1) for x in (query, key, value))
        return self.attended(layer, Attention(q, k, v, {"is_causal": False}), seen)


def by_rows(network: Callable[[Floats], Floats], x: Floats) -> Floats:
    """Return what a feed-forward network gives: of many rows in parts, whose memory is small."""
    if len(x) <= NETWORK_ROWS:
        return network(x)
    out = np.empty_like(x)
    for begin in range(0, len(x), NETWORK_ROWS):
        out[begin : begin + NETWORK_ROWS] = network(x[begin : begin + NETWORK_ROWS])
    return out


def parameters(weights: Mapping[str, tuple[int, ...]], *, bias: bool = True) -> Shapes:
    """Return the shapes of linear layers and norms: of the weight, and of the bias if they have."""
    found = {f"{name}.weight": shape for name, shape in weights.items()}
    return found | {f"{name}.bias": shape[:1] for name, shape in weights.items() if bias}


def of_layers(prefix: str, count: int, shapes: Shapes) -> Shapes:
    """Return the shapes of one layer's weights for all, by their names with the layer's number."""
    return {f"{prefix}.{i}.{name}": x for i in range(count) for name, x in shapes.items()}


def _kinds(config: type[BaseConfig]) -> dict[str, tuple[Any, ...]]:
    """Return which of `KINDS` each key's value may be."""
    found = {}
    for key, hint in typing.get_type_hints(config, include_extras=True).items():
        is_union = typing.get_origin(hint) in (UnionType, typing.Union)
        hints = typing.get_args(hint) if is_union else (hint,)
        found[key] = tuple(x if x in KINDS else typing.get_origin(x) for x in hints)
    return found
