# SPDX-License-Identifier: Apache-2.0
"""Models that run on the kernel, with a checkpoint's weights: they encode, write, translate."""

from fastattn.models._capture import Capture
from fastattn.models._decoder import Decoder, Score
from fastattn.models._encoder import Encoder
from fastattn.models._load import load
from fastattn.models._translator import Translation, Translator

__all__ = ["Capture", "Decoder", "Encoder", "Score", "Translation", "Translator", "load"]
