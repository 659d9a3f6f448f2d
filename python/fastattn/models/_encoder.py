# SPDX-License-Identifier: Apache-2.0
"""A text goes in, its embedding comes out: tokens, the model over packed texts, and pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn.models._capture import Observed
from fastattn.models._context import Texts
from fastattn.models._family import EncoderModel
from fastattn.models._progress import progress_line
from fastattn.models._tokens import encoded, unicode_text, unicode_texts
from fastattn.nn import Floats, Integers, linear

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fastattn.distributed._calls import Method
    from fastattn.models._ranks import Ranks

CHUNK_CHARACTERS = 2**19  # that become tokens at once: within half a second
TEXT_CHARACTERS = 100  # what a text costs beside its own characters
BATCH_TOKENS = 2048  # that the model is given at once: more leave the caches
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


class Encoder(Observed):
    """A model that makes a vector of a text, as `load` reads it.

    Attributes
    ----------
    max_seq_length : int
        The most tokens of a text; what is behind them is cut off.
    prompts : dict of str
        What the checkpoint puts before a text, by the purpose.
    """

    _model: EncoderModel[Any]

    def __init__(
        self,
        model: EncoderModel[Any],
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
        self._dense, self._width = dense, model.config.hidden_size
        if dense:
            self._width = dense[-1].weights["linear.weight"].shape[0]
        self._pooling, self._normalize, self._lower_case = pooling, normalize, lower_case
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
            The text is no str, or holds half of a surrogate pair; the tokenizer fails.
        """
        return self._tokenize([unicode_text("text", text)])[0]

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        comm: Any = None,
        method: Method = "ring",
        timeout: float | None = None,
        progress: bool | None = None,
    ) -> Floats:
        """Return the embeddings of texts.

        The texts are packed, never padded, and each has the embedding that it has alone. Memory
        beside the texts and the result stays bounded, but for a long text: all of it becomes tokens
        before it is cut, in a second and 100 MB for each million characters.

        With `comm`, ranks read the texts together: all call it, each has a share of the tokens,
        also of one long text, and each gets all embeddings.

        Parameters
        ----------
        texts : sequence of str
            All ranks give the same.
        prompt_name : str, optional
            Which of `prompts` goes before each text; by default the one that the checkpoint says.
        comm : communicator of mpi4py, or ProcessGroup or DeviceMesh of torch.distributed, optional
            The ranks, as for `fastattn.distributed.attention`.
        method : "ring", "gather" or "heads"
            How keys travel, likewise. By "heads", embeddings have the bits of one process; by the
            others, they are the same to rounding.
        timeout : float, optional
            Seconds to wait for other ranks in one step, likewise.
        progress : bool, optional
            Whether stderr is told how far it is, of ranks by the first one; by default where it is
            a terminal and it takes more than a second.

        Returns
        -------
        ndarray of shape (texts, dim) and dtype float32

        Raises
        ------
        TypeError, ValueError
            A text is no str, or holds half of a surrogate pair; the prompt is unknown; the
            tokenizer fails; weights are not finite. Or with comm: an argument is refused on another
            rank, ranks give different ones, or a capture is on.
        TimeoutError, ConnectionError
            Another rank was late or is gone, as in `fastattn.distributed.attention`.
        """

        def check() -> tuple[tuple[list[str], str], dict[str, Any]]:
            given = unicode_texts("texts", texts)
            prompt = self._prompt(self._default_prompt if prompt_name is None else prompt_name)
            return (given, prompt), {"texts": given, "prompt": prompt}

        ranks: Ranks | None = None
        if comm is None:
            (given, prompt), _ = check()
        else:
            from fastattn.models._ranks import Ranks

            ranks = Ranks(comm, "encode", method, timeout)
            given, prompt = ranks.agreed(self._model, check)
        most = BATCH_TOKENS * (1 if ranks is None else ranks.size)
        shown = progress if ranks is None or ranks.rank == 0 else False
        sizes = [TEXT_CHARACTERS + len(prompt) + len(x) for x in given]
        out = np.empty((len(given), self._width), np.float32)
        stays = ranks is not None
        with progress_line(f"{len(given)} texts", sum(sizes), shown, stays=stays) as advance:
            for chunk in batches(sizes, CHUNK_CHARACTERS):
                tokens = self._tokenize([prompt + given[i] for i in chunk])
                pooled = np.zeros((len(chunk), self._model.config.hidden_size), np.float32)
                for batch in batches([len(x) for x in tokens], most):
                    starts = np.cumsum([0, *(len(tokens[i]) for i in batch)], dtype=np.int64)
                    ids = np.concatenate([tokens[i] for i in batch])
                    states = self._states(ids, starts, ranks)
                    for i, (begin, end) in zip(batch, pairwise(starts), strict=True):
                        pooled[i] = POOLINGS[self._pooling](states[begin:end])
                    advance(sum(sizes[chunk[i]] for i in batch))
                out[chunk] = self._projected(pooled)
        return out

    def _states(self, ids: Integers, starts: Integers, ranks: Ranks | None) -> Floats:
        """Return the last hidden states of packed texts: all of them, also over ranks."""
        if ranks is None:
            return self._model(ids, Texts(starts))
        shard = ranks.texts(starts)
        return ranks.whole(shard.layout, self._model(ids[shard.places], shard))

    def _projected(self, x: Floats) -> Floats:
        """Return what follows the pooling: projections, and a length of 1."""
        if not np.isfinite(x).all():
            raise ValueError("embeddings must be finite: weights are not, or are too large")
        for project in self._dense:
            x = project(x)
        if self._normalize:
            norms = np.sqrt(np.square(x).sum(axis=-1, keepdims=True))
            x /= np.maximum(norms, np.float32(1e-12))
        return x

    def _prompt(self, name: str | None) -> str:
        """Return the prompt of that name."""
        if name is not None and name not in list(self.prompts):
            raise ValueError(f"prompt_name must be one of {list(self.prompts)}, got {name!r}")
        return "" if name is None else self.prompts[name]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text's tokens."""
        texts = [x.lower() for x in texts] if self._lower_case else texts
        return encoded(self._tokenizer, texts)


def batches(sizes: list[int], most: int) -> Iterator[list[int]]:
    """Yield the indices of texts, largest first, in batches of at most that size, or one text.

    A text of size 0 is in none.
    """
    batch: list[int] = []
    whole = 0
    for i in sorted((i for i, n in enumerate(sizes) if n), key=lambda i: -sizes[i]):
        if batch and whole + sizes[i] > most:
            yield batch
            batch, whole = [], 0
        batch.append(i)
        whole += sizes[i]
    if batch:
        yield batch
