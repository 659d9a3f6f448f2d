# SPDX-License-Identifier: Apache-2.0
"""Models that run on the kernel, with the weights of a checkpoint.

An `Encoder` makes vectors of texts, a `Decoder` writes, a `Translator` translates, a `Transcriber`
writes down what is said.
"""

from fastattn.models._capture import Capture
from fastattn.models._decoder import Decoder, Score
from fastattn.models._encoder import Encoder
from fastattn.models._load import load
from fastattn.models._transcriber import Segment, Transcriber, Transcription, Word
from fastattn.models._translator import Translation, Translator

__all__ = [
    "Capture",
    "Decoder",
    "Encoder",
    "Score",
    "Segment",
    "Transcriber",
    "Transcription",
    "Translation",
    "Translator",
    "Word",
    "load",
]
