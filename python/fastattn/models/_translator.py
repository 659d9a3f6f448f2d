# SPDX-License-Identifier: Apache-2.0
"""Texts go in, texts of another language come out: tokens, the model over packed texts, search."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import ArrayLike

from fastattn._arguments import finite_number, whole_number
from fastattn.models._beam_search import Search, number_of_beams, search
from fastattn.models._encoder import BATCH_TOKENS, batches
from fastattn.models._encoder_decoder import EncoderDecoder
from fastattn.models._family import BaseConfig
from fastattn.models._file import Natural, Power, check, shown, within
from fastattn.models._progress import progress_line
from fastattn.models._tokens import encoded, fitting, tokens_of, unicode_text, unicode_texts
from fastattn.nn import Floats, Integers

if TYPE_CHECKING:
    from fastattn.models._checkpoint import Checkpoint
    from fastattn.models.marian import MarianMTModel

BEAM_TOKENS = 16  # of a batch, that each beam of a text counts for at least
USUAL = {  # keys of what the search does not do, and their values where it is not asked for
    **dict.fromkeys(("do_sample", "token_healing"), False),
    **dict.fromkeys(("min_length", "min_new_tokens", "diversity_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("num_beam_groups", "guidance_scale"), 1),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "constraints")),
    **dict.fromkeys(("begin_suppress_tokens", "force_words_ids", "stop_strings", "max_time")),
    **dict.fromkeys(("watermarking_config", "dola_layers")),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(BaseConfig):
    """What generation_config.json says, under its keys, or an older config.json."""

    decoder_start_token_id: Natural
    max_length: int | None = None  # the start included
    max_new_tokens: int | None = None  # It counts, where both are there.
    num_beams: int = 1
    length_penalty: Power = 1.0
    early_stopping: bool | str = False
    bad_words_ids: list[Any] | None = None
    suppress_tokens: list[Any] | None = None
    forced_bos_token_id: Natural | None = None
    forced_eos_token_id: Natural | None = None
    renormalize_logits: bool = False

    @classmethod
    def read(cls, stated: Mapping[str, Any]) -> Self:
        """Return what a file says; refuse what the search does not do."""
        for key, usual in USUAL.items():
            if (found := stated.get(key)) not in (None, usual):
                raise ValueError(f"{key} must be {usual}, got {shown.repr(found)}")
        return super().read(stated)

    def __post_init__(self) -> None:
        """Refuse what is no search."""
        super().__post_init__()
        number_of_beams("num_beams", self.num_beams)
        if isinstance(self.early_stopping, str):
            self.one_of("early_stopping", "never")
        for word in self.bad_words_ids or ():
            if not isinstance(word, list) or len(word) != 1:
                rule = "bad_words_ids must be lists of one token"
                raise ValueError(f"{rule}, got {shown.repr(word)}")
        for token in self.suppressed(()):
            check("a token that is not to be written", token, Natural)

    def suppressed(self, stop_ids: Collection[int]) -> tuple[Any, ...]:
        """Return the tokens that are never written; an end that is a bad word is written."""
        words = [x for (x,) in self.bad_words_ids or () if x not in stop_ids]
        return (*words, *(self.suppress_tokens or ()))

    def search(self, stop_ids: frozenset[int], most: int, vocab_size: int) -> Search:
        """Return how texts are looked for, of at most so many tokens."""
        suppressed = self.suppressed(stop_ids)
        named = self.decoder_start_token_id, self.forced_bos_token_id, self.forced_eos_token_id
        for token in (*named, *stop_ids, *suppressed):
            if token is not None and token >= vocab_size:
                raise ValueError(f"tokens must be below {vocab_size}, the vocabulary, got {token}")
        return Search(
            stop_ids=stop_ids,
            max_new_tokens=min(
                most, self.max_new_tokens or max((self.max_length or most + 1) - 1, 1)
            ),
            beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            suppressed=suppressed,
            first=self.forced_bos_token_id,
            last=self.forced_eos_token_id,
            renormalize=self.renormalize_logits,
        )


class Translation(NamedTuple):
    """A text that was written of another one.

    Attributes
    ----------
    text : str
    ids : list of int
        Its tokens, without the one that ends it.
    score : float
        Its log-probability, divided by its number of tokens to the power of the length penalty:
        the higher, the better.
    """

    text: str
    ids: list[int]
    score: float


class Translator(EncoderDecoder):
    """A model that translates, as `load` reads it.

    Attributes
    ----------
    config
        What config.json says of the model, under its keys.
    max_position_embeddings : int
        The most tokens of a text, and of its translation.
    stop_ids : frozenset of int
        The tokens that end a translation, as the checkpoint says.
    """

    _model: MarianMTModel

    def __init__(self, model: MarianMTModel, checkpoint: Checkpoint) -> None:
        self._model, self._tokenizer = model, checkpoint.tokenizer
        self.config, self.stop_ids = model.config, checkpoint.stop_ids
        self.max_position_embeddings: int = model.config.max_position_embeddings
        said, start = checkpoint.generation or checkpoint.config, "decoder_start_token_id"
        with within(checkpoint.place / f"{'generation_' * bool(checkpoint.generation)}config.json"):
            if not self.stop_ids:
                raise ValueError("eos_token_id must be there, and is not")
            stated = GenerationConfig.read({start: checkpoint.config.get(start), **said})
            limits = self.max_position_embeddings, model.config.target_vocab_size
            self._search = stated.search(self.stop_ids, *limits)
        self._start = np.array([stated.decoder_start_token_id])

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text's tokens as the model is fed, with the one that ends it.

        Parameters
        ----------
        text : str

        Returns
        -------
        list of int

        Raises
        ------
        TypeError, ValueError
            The text is no str, or holds half of a surrogate pair.
        """
        return encoded(self._tokenizer, [unicode_text("text", text)])[0]

    def detokenize(self, ids: ArrayLike) -> str:
        """Return the text of tokens that the model writes, without special ones.

        Parameters
        ----------
        ids : sequence of int

        Returns
        -------
        str

        Raises
        ------
        TypeError, ValueError
            ids are no tokens of the vocabulary.
        """
        tokens = tokens_of("ids", ids, self.config.target_vocab_size).tolist()
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    @overload
    def translate(
        self,
        texts: Sequence[str],
        *,
        beams: int | None = None,
        n_best: None = None,
        length_penalty: float | None = None,
        max_new_tokens: int | None = None,
        progress: bool | None = None,
    ) -> list[str]: ...
    @overload
    def translate(
        self,
        texts: Sequence[str],
        *,
        beams: int | None = None,
        n_best: int,
        length_penalty: float | None = None,
        max_new_tokens: int | None = None,
        progress: bool | None = None,
    ) -> list[list[Translation]]: ...
    def translate(
        self,
        texts: Sequence[str],
        *,
        beams: int | None = None,
        n_best: int | None = None,
        length_penalty: float | None = None,
        max_new_tokens: int | None = None,
        progress: bool | None = None,
    ) -> list[str] | list[list[Translation]]:
        """Return the translations of texts.

        The texts are packed, never padded, and each has the translation that it has alone.

        Parameters
        ----------
        texts : sequence of str
            Of one token at least, and at most `max_position_embeddings`.
        beams : int, optional
            How many beginnings of a translation are kept at each step, at most 1000; with 1, it
            goes on by the likeliest token. By default as the checkpoint says, as are the other
            options.
        n_best : int, optional
            Return so many translations of each text, the best first, with their scores: at most as
            many as there are beams. By default the best one, as a str.
        length_penalty : float, optional
            The power of its number of tokens by which a translation's log-probability is divided,
            from -30 to 30: the higher it is, the longer the translations that are preferred.
        max_new_tokens : int, optional
            A translation ends after so many tokens, the one that ends it included.
        progress : bool, optional
            Whether a line of stderr says how far it is; by default where stderr is a terminal and
            it takes more than a second.

        Returns
        -------
        list of str, or list of list of Translation
            Of each text its translation, or its `n_best`: fewer where no more were found.

        Raises
        ------
        TypeError, ValueError
            A text is no str, has no token or too many; an option is wrong; weights are not finite.

        Examples
        --------
        >>> import fastattn.models
        >>> model = fastattn.models.load("opus-mt-en-de")  # doctest: +SKIP
        >>> model.translate(["Tom asked his teacher for advice."])  # doctest: +SKIP
        ['Tom bat seinen Lehrer um Rat.']
        """
        how = self._options(beams, length_penalty, max_new_tokens)
        if n_best is not None and not 1 <= whole_number("n_best", n_best) <= how.beams:
            raise ValueError(f"n_best must be from 1 to beams, {how.beams}, got {n_best}")
        sources = self._sources(texts)
        found: list[list[Translation]] = [[] for _ in sources]
        least = BEAM_TOKENS * how.beams
        with progress_line(f"{len(sources)} texts", sum(map(len, sources)), progress) as advance:
            for batch in batches([max(len(x), least) for x in sources], BATCH_TOKENS):
                starts = np.cumsum([0, *(len(sources[i]) for i in batch)], dtype=np.int64)
                states = self._model.encode(np.concatenate([sources[i] for i in batch]), starts)
                context = self._model.context(states, starts)
                texts_of = search(self._model, context, [self._start] * len(batch), how)
                for i, hypotheses in zip(batch, texts_of, strict=True):
                    found[i] = [
                        Translation(self.detokenize(x.ids), x.ids, x.score)
                        for x in hypotheses[: n_best or 1]
                    ]
                advance(int(starts[-1]))
        return found if n_best is not None else [x[0].text for x in found]

    def logits(self, ids: ArrayLike, written: ArrayLike) -> Floats:
        """Return what the model says of each token that it writes of a text.

        Parameters
        ----------
        ids : sequence of int
            The text's tokens, as `tokenize` gives them.
        written : sequence of int
            The tokens of its translation, as a `Translation` has them; or its first ones, or none.

        Returns
        -------
        ndarray of shape (len(written) + 1, vocabulary) and dtype float32
            Row i has the logits of the token behind the first i.

        Raises
        ------
        TypeError, ValueError
            There are no such tokens.
        """
        source = self._fitting("ids", tokens_of("ids", ids, self.config.vocab_size))
        target = tokens_of("written", written, self.config.target_vocab_size)
        target = self._fitting("written", np.concatenate([self._start, target]))
        starts = np.array([0, len(source)])
        context = self._model.context(self._model.encode(source, starts), starts)
        context.feed([len(target)])
        return self._model.head(self._model(target, context))

    def _options(self, beams: Any, length_penalty: Any, max_new_tokens: Any) -> Search:
        """Return how texts are looked for, with the options that are given."""
        given: dict[str, Any] = {}
        if beams is not None:
            given["beams"] = number_of_beams("beams", beams)
        if max_new_tokens is not None:
            if whole_number("max_new_tokens", max_new_tokens) < 1:
                raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
            given["max_new_tokens"] = min(int(max_new_tokens), self.max_position_embeddings)
        if length_penalty is not None:
            if abs(finite_number("length_penalty", length_penalty)) > 30:
                raise ValueError(f"length_penalty must be from -30 to 30, got {length_penalty}")
            given["length_penalty"] = float(length_penalty)
        return dataclasses.replace(self._search, **given)

    def _sources(self, texts: Any) -> list[Integers]:
        """Return the tokens of texts."""
        texts = unicode_texts("texts", texts)
        if not texts:
            return []
        ends = len(encoded(self._tokenizer, [""])[0])
        sources = encoded(self._tokenizer, texts)
        for i, (text, ids) in enumerate(zip(texts, sources, strict=True)):
            if len(ids) <= ends:
                rule = f"texts[{i}] must be at least 1 token"
                raise ValueError(f"{rule}, got {shown.repr(text)}, which is none")
        return [self._fitting(f"texts[{i}]", ids) for i, ids in enumerate(sources)]

    def _fitting(self, name: str, ids: Sequence[int] | Integers) -> Integers:
        """Return tokens, which must be some and fit into the model."""
        return fitting(name, ids, self.max_position_embeddings)
