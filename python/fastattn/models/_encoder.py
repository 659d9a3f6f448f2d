# SPDX-License-Identifier: Apache-2.0
"""A text goes in, its embedding comes out: tokens, the model over packed texts, and pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._arguments import unicode_text
from fastattn.models._progress import progress_line
from fastattn.models.bert import BertModel
from fastattn.nn import Floats, linear

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_TOKENS = 4096  # that the model is given at once
POOLINGS: dict[str, Callable[[Floats], Floats]] = {  # of a text's hidden states
    "mean": lambda x: x.mean(axis=0),
    "cls": lambda x: x[0],
    "max": lambda x: x.max(axis=0),
    "mean_sqrt_len_tokens": lambda x: x.sum(axis=0) / np.float32(len(x) ** 0.5),
    "weightedmean": lambda x: np.average(x, axis=0, weights=np.arange(1, len(x) + 1)),
    "lasttoken": lambda x: x[-1],
}


class Dense(NamedTuple):
    """A projection of the embeddings: a linear layer, and a function of each number."""

    weights: Mapping[str, Any]
    activation: Callable[[Floats], Floats]

    def __call__(self, x: Floats) -> Floats:
        """Return the projection of each row."""
        weight, bias = self.weights["linear.weight"], self.weights.get("linear.bias")
        return self.activation(linear(x, weight, bias))


class Encoder:
    """A model that makes a vector of a text, as `load` reads it.

    Attributes
    ----------
    max_seq_length : int
        The most tokens of a text; what is behind them is cut off.
    prompts : dict of str
        What the checkpoint puts before a text, by the purpose.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        *,
        max_seq_length: int,
        pooling: str = "mean",
        dense: Sequence[Dense] = (),
        normalize: bool = False,
        lower_case: bool = False,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._dense = dense
        self._pool, self._normalize, self._lower_case = POOLINGS[pooling], normalize, lower_case
        self.max_seq_length, self.prompts = max_seq_length, dict(prompts or {})
        self._default_prompt = default_prompt

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text's tokens as the model is fed, special ones included.

        Parameters
        ----------
        text : str

        Returns
        -------
        list of int
            At most `max_seq_length`.

        Raises
        ------
        TypeError, ValueError
            The text is no str, or holds half of a surrogate pair.
        """
        return self._tokenize([unicode_text("text", text)])[0]

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        progress: bool | None = None,
    ) -> Floats:
        """Return the embeddings of texts.

        The texts are packed, never padded, and each has the embedding that it has alone.

        Parameters
        ----------
        texts : sequence of str
        prompt_name : str, optional
            Which of `prompts` goes before each text; by default the one that the checkpoint says.
        progress : bool, optional
            Whether a line of stderr says how far it is; by default where stderr is a terminal and
            it takes more than a second.

        Returns
        -------
        ndarray of shape (texts, dim) and dtype float32

        Raises
        ------
        TypeError, ValueError
            A text is no str, or holds half of a surrogate pair; the prompt is unknown.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of str, got a str: give [text]")
        prompt = self._prompt(self._default_prompt if prompt_name is None else prompt_name)
        given = [prompt + unicode_text(f"texts[{i}]", text) for i, text in enumerate(texts)]
        tokens = self._tokenize(given)
        lengths = [len(x) for x in tokens]
        out = np.zeros((len(tokens), self._model.config.hidden_size), np.float32)
        with progress_line(f"{len(tokens)} texts", sum(lengths), progress) as advance:
            for batch in _batches(lengths):
                starts = np.cumsum([0, *(lengths[i] for i in batch)], dtype=np.int64)
                states = self._model(np.concatenate([tokens[i] for i in batch]), starts)
                for i, (begin, end) in zip(batch, pairwise(starts), strict=True):
                    out[i] = self._pool(states[begin:end])
                advance(len(states))
        for project in self._dense:
            out = project(out)
        if self._normalize:
            norms = np.sqrt(np.square(out).sum(axis=-1, keepdims=True))
            out /= np.maximum(norms, np.float32(1e-12))
        return out

    def _prompt(self, name: str | None) -> str:
        """Return the prompt of that name."""
        if name is not None and name not in self.prompts:
            raise ValueError(f"prompt_name must be one of {list(self.prompts)}, got {name!r}")
        return "" if name is None else self.prompts[name]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text's tokens."""
        texts = [x.lower() for x in texts] if self._lower_case else texts
        return [x.ids for x in self._tokenizer.encode_batch_fast(texts)]  # without places in texts


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Yield the indices of texts, longest first, in batches of at most BATCH_TOKENS or one text.

    A text without a token is in none.
    """
    batch: list[int] = []
    tokens = 0
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        if batch and tokens + lengths[i] > BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch
