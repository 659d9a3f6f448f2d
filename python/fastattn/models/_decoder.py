# SPDX-License-Identifier: Apache-2.0
"""Tokens go in, the next ones come out: text, answers, and how likely a text is."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from fastattn import nn
from fastattn._arguments import whole_number
from fastattn.models._capture import Observed
from fastattn.models._chat import checked_messages, render
from fastattn.models._generation import READ_TOKENS, Generation
from fastattn.models._progress import Advance, progress_line
from fastattn.models._sampling import Options, Sampling, takes
from fastattn.models._streaming import StoppedText, TextStream, pieces_of
from fastattn.models._tokens import encoded, fitting, tokens_of, unicode_text
from fastattn.nn import Floats, Integers

if TYPE_CHECKING:
    from fastattn.distributed._calls import Method
    from fastattn.models._checkpoint import Checkpoint
    from fastattn.models._family import DecoderModel
    from fastattn.models._ranks import Ranks

SCORE_ROWS = 128  # whose logits are there at once when a text is scored
NOT_FINITE = "hidden states must be finite: weights are not, or are too large"
SEEN_TOKENS = 16  # of a prompt, which decide how its text goes on


class Score(NamedTuple):
    """How likely a text is.

    Attributes
    ----------
    ids : list of int
        Its tokens, special ones included.
    log_probabilities : ndarray of shape (len(ids) - 1,) and dtype float32
        Of each token but the first, given those before it: of ``ids[1:]``.
    perplexity : float
        ``exp(-log_probabilities.mean())``.
    """

    ids: list[int]
    log_probabilities: Floats
    perplexity: float


class Decoder(Observed):
    """A model that goes on with a text, as `load` reads it.

    Attributes
    ----------
    config
        What config.json says of the model, under its keys.
    max_position_embeddings : int
        The tokens that fit into the model's context: of a prompt and what follows it.
    stop_ids : frozenset of int
        The tokens that end a text or an answer, as the checkpoint says.
    chat_template : str or None
        What `chat` tells the model of a conversation, in Jinja.
    """

    _model: DecoderModel[Any]

    def __init__(self, model: DecoderModel[Any], checkpoint: Checkpoint) -> None:
        self._model, self._tokenizer = model, checkpoint.tokenizer
        self._special, self.chat_template = dict(checkpoint.special), checkpoint.chat_template
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.config, self.stop_ids = model.config, frozenset(checkpoint.stop_ids)
        self.max_position_embeddings: int = model.config.max_position_embeddings

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text's tokens as the model is fed.

        Those that the tokenizer adds are included. Text that spells a special token becomes it.

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
        return self._encoded("text", text)

    def detokenize(self, ids: ArrayLike) -> str:
        """Return the text of tokens, in which special ones are spelt out.

        Parameters
        ----------
        ids : sequence of int
            Tokens, any number of them.

        Returns
        -------
        str
            An incomplete character becomes U+FFFD.

        Raises
        ------
        TypeError, ValueError
            ids are no tokens of the vocabulary.
        """
        tokens = self._tokens("ids", ids).tolist()
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def logits(self, ids: ArrayLike) -> Floats:
        """Return of each token the logits of the one that follows it.

        Parameters
        ----------
        ids : sequence of int
            Tokens: at least one, at most `max_position_embeddings`.

        Returns
        -------
        ndarray of shape (len(ids), vocabulary) and dtype float32

        Raises
        ------
        TypeError, ValueError
            ids are no such tokens.
        """
        tokens = self._fitting("ids", self._tokens("ids", ids))
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for begin, states in self._states(tokens):
            out[begin : begin + len(states)] = self._model.head(states)
        return out

    @takes("stop")
    def generate_ids(
        self, ids: ArrayLike, **options: Unpack[Options]
    ) -> Generator[int, None, None]:
        """Yield the tokens that follow some tokens, each when it is asked for.

        The options are those of `generate`, but for `stop`.

        Parameters
        ----------
        ids : sequence of int
            Tokens: at least one, at most `max_position_embeddings`.

        Yields
        ------
        int
            A token that ends the text is not yielded.
        """
        tokens = self._fitting("ids", self._tokens("ids", ids))
        steps = self._generation([tokens], Sampling(**options))
        return (token for step in steps for token in step.values())

    @overload
    def generate(  # type: ignore[overload-overlap] # a str is a sequence of str as well
        self, prompt: str, **options: Unpack[Options]
    ) -> Generator[str, None, None]: ...
    @overload
    def generate(
        self, prompt: Sequence[str], **options: Unpack[Options]
    ) -> Generator[list[str], None, None]: ...
    @takes()
    def generate(
        self, prompt: str | Sequence[str], **options: Unpack[Options]
    ) -> Generator[str, None, None] | Generator[list[str], None, None]:
        """Yield the text that follows a prompt, or each of several, as it comes.

        Arguments are checked at once, the model runs when a piece is asked for: who stops asking
        has what was yielded, and the model can be used on. Several prompts are packed, never
        padded, and each gets the text that it gets alone.

        Parameters
        ----------
        prompt : str or sequence of str
            With the tokens that the tokenizer adds, at most `max_position_embeddings` each.
        max_new_tokens : int, optional
            The text ends after so many tokens; by default, when the context is full.
        temperature : float
            What divides the logits. 0: the likeliest token is taken, whatever the next three say.
        top_k : int, optional
            Only so many of the likeliest tokens may be drawn.
        top_p : float, optional
            Of these, only the fewest likeliest whose probabilities sum to top_p.
        min_p : float, optional
            Of these, only those at least min_p times as probable as the likeliest.
        seed : int or sequence of int, optional
            What the draws depend on: one for all prompts, of which equal ones then get equal texts,
            or one for each. By default every call differs.
        stop : str or sequence of str
            The text ends before the first of these, which is not yielded.
        stop_ids : collection of int, optional
            The tokens that end the text, instead of the checkpoint's.

        Yields
        ------
        str or list of str
            A piece of text: of several prompts a piece each, which may be "", and is behind the
            end. A character is never cut; what the end leaves of one is U+FFFD. Special tokens
            give no text.

        Raises
        ------
        TypeError, ValueError
            An argument is wrong, a prompt has no token or too many, or the logits are NaN.
        """
        if isinstance(prompt, str):
            pieces = self._pieces([self._prompt("prompt", prompt)], Sampling(**options))
            return (x[0] for x in pieces)
        if not isinstance(prompt, Sequence):
            kind = type(prompt).__name__
            raise TypeError(f"prompt must be a str or a sequence of str, not {kind}")
        prompts = [self._prompt(f"prompt[{i}]", x) for i, x in enumerate(prompt)]
        if not prompts:
            raise ValueError("prompt must be a str, or a sequence of at least one, got none")
        return self._pieces(prompts, Sampling(**options))

    @takes()
    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Generator[str, None, None]:
        """Yield the assistant's answer in a conversation, as it comes.

        The options are those of `generate`.

        Parameters
        ----------
        messages : sequence of dict
            Each with a role, as "system", "user" or "assistant", and its content, both str.

        Yields
        ------
        str
            A piece of the answer.

        Raises
        ------
        ModuleNotFoundError
            `jinja2` is not installed.
        TypeError, ValueError
            As `generate` does; or a message is wrong, there is no template, or it fails.
        """
        checked_messages(messages)
        if self.chat_template is None:
            raise ValueError("the checkpoint must have a chat template, and has none: use generate")
        text = render(self.chat_template, messages, self._special)
        prompt = self._fitting("messages", self._encoded("messages", text, special=False))
        pieces = self._pieces([prompt], Sampling(**options), seen=0)
        return (x[0] for x in pieces)

    def score(
        self,
        text: str,
        *,
        comm: Any = None,
        method: Method = "ring",
        timeout: float | None = None,
        progress: bool | None = None,
    ) -> Score:
        """Return how likely a text is, token by token.

        With `comm`, ranks read one text together, for contexts that are too long for one process:
        all call it, each has a share of the tokens, and each gets the whole score.

        Parameters
        ----------
        text : str
            Of at least two tokens, with those that the tokenizer adds, and at most
            `max_position_embeddings`. All ranks give the same.
        comm : communicator of mpi4py, or ProcessGroup or DeviceMesh of torch.distributed, optional
            The ranks, as for `fastattn.distributed.attention`.
        method : "ring", "gather" or "heads"
            How keys travel, likewise. By a ring, probabilities are those of one process to
            rounding; by the others they have the same bits over any number of ranks.
        timeout : float, optional
            Seconds to wait for other ranks in one step, likewise.
        progress : bool, optional
            Whether stderr is told how far it is, of ranks by the first one; by default where it is
            a terminal and it takes more than a second.

        Returns
        -------
        Score

        Raises
        ------
        TypeError, ValueError
            The text is no such str. Or with comm: an argument is refused on another rank, ranks
            give different ones, or a capture is on.
        TimeoutError, ConnectionError
            Another rank was late or is gone, as in `fastattn.distributed.attention`.
        """

        def check() -> tuple[Integers, dict[str, Any]]:
            ids = self.tokenize(text)
            if len(ids) < 2:
                raise ValueError(f"text must be at least 2 tokens, got {len(ids)}")
            tokens = self._fitting("text", ids)
            return tokens, {"text": tokens}

        if comm is None:
            tokens, _ = check()
            found = self._scored(tokens, progress)
        else:
            from fastattn.models._ranks import Ranks

            ranks = Ranks(comm, "score", method, timeout)
            tokens = ranks.agreed(self._model, check)
            found = self._scored_over(ranks, tokens, progress)
        with np.errstate(over="ignore"):  # of a text that cannot be: infinite
            perplexity = float(np.exp(-found.mean(dtype=np.float64)))
        return Score(tokens.tolist(), found, perplexity)

    def logit_lens(self, text: str | ArrayLike, token: str | int, *, row: int = -1) -> Floats:
        """Return what the model would say of a token behind each layer, if it were the last one.

        The states between two layers go through the last norm and the head: nostalgebraist 2020,
        "interpreting GPT: the logit lens".

        Parameters
        ----------
        text : str or sequence of int
            A text, or its tokens: at least one, at most `max_position_embeddings`.
        token : str or int
            A text that is one token, often with the space before it, or its id.
        row : int
            The position of the token that it would follow; from the end if negative.

        Returns
        -------
        ndarray of shape (layers + 1,) and dtype float32
            The token's log-probability before the first layer, and behind each.

        Raises
        ------
        TypeError, ValueError
            The text or its row is no such thing, or token is none of the vocabulary.
        """
        ids = self.tokenize(text) if isinstance(text, str) else self._tokens("text", text)
        tokens = self._fitting("text", ids)
        ids = self._encoded("token", token, special=False) if isinstance(token, str) else [token]
        if len(ids) != 1:
            raise ValueError(f"token must be one token, got {token!r}, which is {len(ids)}")
        column = self._tokens("token", ids)[0]
        if not -len(tokens) <= whole_number("row", row) < len(tokens):
            rule = f"within {-len(tokens)}..{len(tokens) - 1}, the text's tokens"
            raise ValueError(f"row must be {rule}, got {row}")
        last = row % len(tokens)
        with self.capture(rows=[last], what="hidden") as captured:
            for _ in self._states(tokens[: last + 1]):
                pass
        states = self._model.norm(self._model.last_norm, captured.hidden[:, 0])
        return nn.log_softmax(self._model.head(states))[:, column].copy()

    def _scored(self, tokens: Integers, progress: bool | None) -> Floats:
        """Return the log-probability of each token but the first."""
        rows = len(tokens) - 1
        found = np.empty(rows, np.float32)
        with progress_line(f"{len(tokens)} tokens", rows, progress) as advance:
            for begin, states in self._states(tokens[:-1]):
                place = slice(begin, begin + len(states))
                found[place] = self._log_probabilities(states, tokens[1:][place], advance)
        return found

    def _scored_over(self, ranks: Ranks, tokens: Integers, progress: bool | None) -> Floats:
        """Do what `_scored` does, over ranks."""
        shard = ranks.shard(len(tokens) - 1, self.config.num_hidden_layers)
        work = len(shard.positions) * (shard.layers + 1)  # the head is as good as a layer
        shown = progress if ranks.rank == 0 else False
        what = f"{len(tokens)} tokens"
        with progress_line(what, work, shown, stays=True) as shard.advance:
            states = self._model(tokens[shard.positions], shard)
            finite = np.isfinite(states).all(axis=1)
            known = self._log_probabilities(states, tokens[1:][shard.positions], shard.advance)
        told = ranks.whole(shard.layout, np.stack([finite.astype(np.float32), known], axis=1))
        if not told[:, 0].all():
            raise ValueError(NOT_FINITE)
        return told[:, 1].copy()

    def _log_probabilities(self, states: Floats, ids: Integers, advance: Advance) -> Floats:
        """Return the log-probability of the token behind each state."""
        found = np.empty(len(ids), np.float32)
        for begin in range(0, len(ids), SCORE_ROWS):
            place = slice(begin, begin + SCORE_ROWS)
            rows = nn.log_softmax(self._model.head(states[place]))
            found[place] = rows[np.arange(len(rows)), ids[place]]
            advance(len(rows))
        return found

    def _states(self, tokens: Integers) -> Iterator[tuple[int, Floats]]:
        """Yield the last hidden states of READ_TOKENS tokens, and where they begin, until all."""
        context = self._model.context(1)
        for begin in range(0, len(tokens), READ_TOKENS):
            part = tokens[begin : begin + READ_TOKENS]
            context.feed([len(part)])
            states = self._model(part, context)
            if not np.isfinite(states).all():
                raise ValueError(NOT_FINITE)
            yield begin, states

    def _generation(self, prompts: list[Integers], sampling: Sampling) -> Generation:
        """Return how the model goes on with prompts."""
        limits = [self.max_position_embeddings - len(x) + 1 for x in prompts]
        if (most := sampling.max_new_tokens) is not None:
            limits = [min(most, x) for x in limits]
        stop_ids = self.stop_ids if sampling.stop_ids is None else sampling.stop_ids
        return Generation(self._model, prompts, limits, stop_ids, sampling)

    def _pieces(
        self, prompts: list[Integers], sampling: Sampling, seen: int = SEEN_TOKENS
    ) -> Generator[list[str], None, None]:
        """Return a generator of pieces of text, which goes on behind what is seen of a prompt."""
        prefixes = [x[max(len(x) - seen, 0) :].tolist() for x in prompts]
        texts = [StoppedText(TextStream(self._tokenizer, x), sampling.stop) for x in prefixes]
        return pieces_of(self._generation(prompts, sampling), texts)

    def _encoded(self, name: str, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text, with or without those that the tokenizer adds."""
        return encoded(self._tokenizer, [unicode_text(name, text)], special=special)[0]

    def _prompt(self, name: str, text: str) -> Integers:
        """Return the tokens of a prompt."""
        return self._fitting(name, self._encoded(name, text))

    def _fitting(self, name: str, ids: Sequence[int] | Integers) -> Integers:
        """Return tokens, which must be some and fit into the context."""
        return fitting(name, ids, self.max_position_embeddings)

    def _tokens(self, name: str, ids: ArrayLike) -> Integers:
        """Return tokens that a user gives, which must be of the vocabulary."""
        return tokens_of(name, ids, self.config.vocab_size)
