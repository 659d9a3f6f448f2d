# SPDX-License-Identifier: Apache-2.0
"""Attention of PyTorch tensors: the drop-in.

`scaled_dot_product_attention` is torch's function, `attention` and `varlen_attention` have every
argument of `fastattn.attention` and `fastattn.varlen_attention`, and `patch` puts ours in the place
of torch's own, under the modules of torch.nn too. Tensors are read where they lie; gradients,
torch.compile and torch.export work. What differs from torch is in a table in docs/torch.md.
`context_parallel` lets a model compute one long sequence over ranks; the module
`fastattn.torch.distributed` has the call beneath it.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(f"fastattn.torch needs PyTorch ({error}): pip install torch") from error

from fastattn.torch._attention import attention, varlen_attention
from fastattn.torch._context_parallel import context_parallel
from fastattn.torch._patch import Patch, patch
from fastattn.torch._sdpa import scaled_dot_product_attention

__all__ = [
    "Patch",
    "attention",
    "context_parallel",
    "patch",
    "scaled_dot_product_attention",
    "varlen_attention",
]
