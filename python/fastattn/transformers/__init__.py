# SPDX-License-Identifier: Apache-2.0
"""Attention of models of Hugging Face transformers: what `attn_implementation="fastattn"` means.

transformers asks two functions: `mask` (`_mask.py`) once per forward pass and kind of layer, what a
query sees; `attention` (`_attention.py`) in every layer. Between the two goes a tensor, or None: a
`Pattern` where the kernel's own arguments say what is seen, so that no mask of q_len x kv_len is
made or read. Which models may have it: `_models.py`.

Differences from transformers' own implementations: docs/transformers.md.
"""

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastattn.transformers needs transformers and torch ({error}): "
        "pip install torch transformers"
    ) from error

from fastattn.transformers._models import register

__all__ = ["register"]
