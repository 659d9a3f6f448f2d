# SPDX-License-Identifier: Apache-2.0
"""A sound goes in, the words that are said come out, and when.

The model hears a window at a time, of half a minute. The next one begins where the last sentence
that was whole has ended.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastattn import nn
from fastattn._arguments import as_array, boolean, whole_number
from fastattn._arrays import widened
from fastattn.models import _wav
from fastattn.models._alignment import first_frames, without_pauses
from fastattn.models._beam_search import Hypothesis, Search, number_of_beams, search
from fastattn.models._capture import unobserved
from fastattn.models._encoder_decoder import EncoderDecoder, SourceContext
from fastattn.models._file import within
from fastattn.models._log_mel import FRAMES, HOP, RATE, log_mel
from fastattn.models._progress import progress_line
from fastattn.models._speech_tokens import FRAMES_OF_TIME, SpeechTokens
from fastattn.nn import Floats

if TYPE_CHECKING:
    from fastattn.models._checkpoint import Checkpoint
    from fastattn.models.whisper import WhisperModel

LONGEST = 2 * 3600  # seconds of sound, which take 1.2 GB
LOUDEST = 100.0  # of a sample: 1 is usual, and beyond this the scale is wrong
NO_SPEECH, UNLIKELY = 0.6, -1.0  # A window is silence if both say so: its words are made up.


class Word(NamedTuple):
    """A word, and when it is said.

    Attributes
    ----------
    text : str
        With the marks around it, without spaces.
    start, end : float
        In seconds; pauses between words are left out.
    probability : float
        The mean of its tokens'.
    """

    text: str
    start: float
    end: float
    probability: float


class Segment(NamedTuple):
    """A sentence, or what the model took for one.

    Attributes
    ----------
    text : str
        With a space before it where the language has them.
    start, end : float
        In seconds, as the model wrote them.
    ids : list of int
        Its tokens, without times.
    log_probability : float
        The mean of its window's tokens'.
    words : tuple of Word
        Empty if they were not asked for.
    """

    text: str
    start: float
    end: float
    ids: list[int]
    log_probability: float
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Transcription:
    """What is said in a sound. Printed, it is the text.

    Attributes
    ----------
    segments : tuple of Segment
    language : str
        As ISO 639 abbreviates it.
    """

    segments: tuple[Segment, ...]
    language: str

    @property
    def text(self) -> str:
        """All that is said."""
        return "".join(x.text for x in self.segments).strip()

    @property
    def words(self) -> tuple[Word, ...]:
        """All words, if they were asked for."""
        return tuple(word for x in self.segments for word in x.words)

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class Transcriber(EncoderDecoder):
    """A model that writes down what is said, as `load` reads it.

    Attributes
    ----------
    config
        What config.json and generation_config.json say of the model, under their keys.
    languages : tuple of str
        Those that the model knows, as ISO 639 abbreviates them.
    """

    _model: WhisperModel

    def __init__(self, model: WhisperModel, checkpoint: Checkpoint) -> None:
        self._model = model
        with within(checkpoint.generation_place):
            self.config = model.config.with_generation(checkpoint.generation)
        with within(checkpoint.place):
            self._tokens = SpeechTokens(checkpoint.tokenizer, self.config)
        self.languages = tuple(self._tokens.prompts)

    def transcribe(
        self,
        audio: str | os.PathLike[str] | ArrayLike,
        *,
        sampling_rate: int = RATE,
        language: str | None = None,
        words: bool = False,
        beams: int = 1,
        progress: bool | None = None,
    ) -> Transcription:
        """Return what is said in a sound.

        Parameters
        ----------
        audio : path or array of shape (samples,)
            A WAV file, whose channels are mixed; or floats, usually between -1 and 1. There must be
            some, and at most two hours.
        sampling_rate : int
            How many samples an array has in a second. It must be 16000, as must a file's.
        language : str, optional
            One of `languages`; by default the model hears which one it is.
        words : bool
            Whether to tell when each word is said.
        beams : int
            How many beginnings of a text are kept, at most 1000; with 1, it goes on by the
            likeliest token.
        progress : bool, optional
            Whether a line of stderr says how far it is; by default where stderr is a terminal and
            it takes more than a second.

        Returns
        -------
        Transcription

        Raises
        ------
        TypeError, ValueError
            The file is damaged; the sound is empty, too long, not finite or of another rate; the
            language is unknown; or beams is no int from 1 to 1000.
        """
        samples = samples_of(audio, sampling_rate)
        if language is not None and language not in self.languages:
            known = ", ".join(self.languages)
            raise ValueError(f"language must be one of {known}, got {language!r}")
        number_of_beams("beams", beams)
        boolean("words", words)
        found, begin, frames = list[Segment](), 0, len(samples) // HOP
        sound = self._spectrogram(samples)
        with progress_line(f"{frames / FRAMES:.0f} s of sound", frames, progress) as advance:
            while begin < frames:
                count = min(self._window, frames - begin)
                context = self._heard(sound, begin)
                first = self._first_logits(context)
                language = language or self._tokens.language(first)
                text = self._written(context, language, beams)
                segments, heard = self._segments(text, count)
                if _is_silence(text, nn.softmax(first)[self._tokens.silence]):
                    segments, heard = [], count
                if words and segments:
                    part = samples[begin * HOP : (begin + count) * HOP]
                    segments = self._with_words(segments, context, language, part)
                found += [_later(x, begin / FRAMES) for x in segments]
                begin += heard
                advance(heard)
        return Transcription(tuple(found), language or self.languages[0])

    @property
    def _window(self) -> int:
        """How many frames the model hears at a time."""
        return FRAMES_OF_TIME * self.config.max_source_positions

    def _spectrogram(self, samples: Floats) -> Floats:
        """Return the spectrogram of a sound, which 0 follows for a window, as is usual."""
        found = log_mel(samples, self.config.num_mel_bins)
        return np.pad(found, [(0, self._window), (0, 0)])

    def _heard(self, sound: Floats, begin: int) -> SourceContext:
        """Return what the model hears in the window that begins with a frame."""
        states = self._model.encode(sound[begin : begin + self._window])
        return self._model.context(states, np.array([0, len(states)]))

    def _first_logits(self, context: SourceContext) -> Floats:
        """Return the logits of what follows the token that begins all texts."""
        context = context.anew()
        context.feed([1])
        with unobserved(*self._model.parts.values()):
            states = self._model(np.array([self._tokens.start]), context)
        logits: Floats = self._model.head(states)[0]
        return logits

    def _written(self, context: SourceContext, language: str, beams: int) -> Hypothesis:
        """Return what the model writes of a window."""
        prompt = self._tokens.prompts[language]
        how = Search(
            stop_ids=frozenset([self._tokens.end]),
            max_new_tokens=self.config.max_target_positions - len(prompt),
            beams=beams,
            early_stopping=True,
            suppressed=self._tokens.suppressed,
            renormalize=True,
            rule=self._tokens.rule,
        )
        return search(self._model, context.anew(), [np.array(prompt)], how)[0][0]

    def _segments(self, text: Hypothesis, count: int) -> tuple[list[Segment], int]:
        """Return the sentences of a window of so many frames, and where the next one begins."""
        ids, times, heard = text.ids, self._tokens.times, count
        is_time = [x >= times for x in ids]
        # Two times stand between sentences; one that is alone at the end: nobody speaks behind it.
        cuts = [i for i in range(1, len(ids)) if is_time[i - 1] and is_time[i]]
        if cuts and is_time[-2:] == [False, True]:
            cuts.append(len(ids))
        elif cuts:
            heard = FRAMES_OF_TIME * (ids[cuts[-1] - 1] - times)
        found = []
        for part in (ids[slice(*x)] for x in pairwise([0, *cuts] if cuts else [0, len(ids)])):
            of_words = [x for x in part if x < self._tokens.end]
            # A text may stop before its end, and say times behind that of the sound.
            written = [FRAMES_OF_TIME * (x - times) for x in part if x >= times]
            start, end = written[:1] or [0], written[1:] or [count]
            if (said := self._tokens.text(of_words)).strip():
                ends = [min(x, count) / FRAMES for x in (start[0], end[-1])]
                found.append(Segment(said, ends[0], ends[1], of_words, _mean(text)))
        return found, heard

    def _with_words(
        self, segments: list[Segment], context: SourceContext, language: str, samples: Floats
    ) -> list[Segment]:
        """Return the sentences of a window with their words."""
        ids = [x for segment in segments for x in segment.ids]
        seconds, chances = self._aligned(ids, context, language, len(samples) // HOP)
        places, begin = list[tuple[int, slice]](), 0  # each word's sentence, and its tokens in ids
        for i, segment in enumerate(segments):
            for word in self._tokens.words(segment.ids, language):
                place = slice(begin, begin + len(word))
                if any(map(self._tokens.is_said, word)):
                    places.append((i, place))
                begin = place.stop
        borders = [*(seconds[place.start] for _, place in places), seconds[-1]]
        words: list[list[Word]] = [[] for _ in segments]
        for (i, place), span in zip(places, without_pauses(borders, samples, RATE), strict=True):
            text = self._tokens.text(ids[place]).strip()
            words[i].append(Word(text, *span, float(chances[place].mean())))
        return [x._replace(words=tuple(y)) for x, y in zip(segments, words, strict=True)]

    def _aligned(
        self, ids: list[int], context: SourceContext, language: str, frames: int
    ) -> tuple[list[float], Floats]:
        """Return when each token begins to be said, and last the end, and how likely each was."""
        layers, heads = zip(*self.config.aligned_heads, strict=True)
        with (
            unobserved(*self._model.parts.values()),
            self.capture(of="cross", layers=sorted(set(layers))) as captured,
        ):
            orders, states = self._read(ids, context, language)
        shares = nn.softmax(self._model.head(states[orders:-1]))
        # Marks are no sound: their rows are left out.
        said = [i for i, x in enumerate(ids) if self._tokens.is_said(x)] + [len(ids)]
        rows = [*range(orders), *(orders + i for i in said)]
        weights = captured.weights[np.searchsorted(captured.layers, layers), heads][:, rows]
        weights = weights[..., : -(-frames // FRAMES_OF_TIME)]  # not of what follows the sound
        weights /= np.maximum(weights.sum(axis=2, keepdims=True), np.float32(1e-30))
        firsts = first_frames(weights, orders) * (FRAMES_OF_TIME / FRAMES)
        # A mark begins with what is said next.
        seconds = firsts[np.searchsorted(said, np.arange(len(ids) + 1))]
        return seconds.tolist(), shares[np.arange(len(ids)), ids]

    def _read(
        self, ids: Sequence[int], context: SourceContext, language: str
    ) -> tuple[int, Floats]:
        """Let the model read a text, as if it had written that without times.

        Return how many states stand before the text, and all: each is of the token before the one
        that it writes.
        """
        prompt = [*self._tokens.prompts[language], self._tokens.no_times]
        context = context.anew()
        context.feed([len(prompt) + len(ids)])
        return len(prompt) - 1, self._model(np.array([*prompt, *ids]), context)


def samples_of(audio: Any, sampling_rate: int) -> Floats:
    """Return the samples of a sound, which must be some, and as the model is used to."""
    name = "audio"
    if isinstance(audio, str | os.PathLike):
        name = os.fspath(audio)
        found, sampling_rate = _wav.read(audio)
    else:
        array = widened(as_array(name, audio, "numbers"))
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            rule = "audio must be floats, of which 1 is the loudest"
            raise TypeError(f"{rule}, not {array.dtype}")
        if array.ndim != 1:
            rule = "audio must have shape (samples,), one channel"
            raise ValueError(f"{rule}, got audio.shape={array.shape}")
        with np.errstate(over="ignore"):  # What is too large becomes infinite.
            found = array.astype(np.float32)
    if whole_number("sampling_rate", sampling_rate) != RATE:
        rule = f"{name} must have {RATE} samples in a second"
        raise ValueError(f"{rule}, got {sampling_rate}: resample it before")
    if not HOP <= len(found) <= LONGEST * RATE:
        rule = f"{name} must have {HOP} to {LONGEST * RATE} samples, {LONGEST} seconds"
        raise ValueError(f"{rule}, got {len(found)}")
    if not (most := np.abs(found).max()) <= LOUDEST:  # nor NaN
        rule = f"finite, and at most {LOUDEST} (divide integers of 16 bits by 32768)"
        raise ValueError(f"{name} must be {rule}, got {most}")
    return found


def _is_silence(text: Hypothesis, no_speech: np.float32) -> bool:
    """Tell whether nobody speaks, as likely as the model thinks that, and what it wrote."""
    return bool(no_speech > NO_SPEECH) and _mean(text) < UNLIKELY


def _mean(text: Hypothesis) -> float:
    """Return the mean log-probability of a text's tokens, the end included."""
    return text.log_probability / (len(text.ids) + 1)


def _later(segment: Segment, seconds: float) -> Segment:
    """Return a sentence so much later."""
    start, end = segment.start + seconds, segment.end + seconds
    words = [x._replace(start=x.start + seconds, end=x.end + seconds) for x in segment.words]
    return segment._replace(start=start, end=end, words=tuple(words))
