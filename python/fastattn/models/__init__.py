# SPDX-License-Identifier: Apache-2.0
"""Models that run on the kernel, with the weights of a checkpoint: BERT and its like, so far."""

from fastattn.models._encoder import Encoder
from fastattn.models._load import load

__all__ = ["Encoder", "load"]
