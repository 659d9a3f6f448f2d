# SPDX-License-Identifier: Apache-2.0
"""Models that run on the kernel, with the weights of a checkpoint: encoders and decoders."""

from fastattn.models._capture import Capture
from fastattn.models._decoder import Decoder, Score
from fastattn.models._encoder import Encoder
from fastattn.models._load import load

__all__ = ["Capture", "Decoder", "Encoder", "Score", "load"]
