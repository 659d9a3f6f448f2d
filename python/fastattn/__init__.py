# SPDX-License-Identifier: Apache-2.0
"""Exact softmax attention, as fast as the CPU allows.

The one function is `attention`; `reference` is its definition. `KVCache` keeps the keys and values
of a model that writes token after token, `PagedKVCache` those of many sequences that come and go.
"""

from fastattn import reference
from fastattn._attention import attention, varlen_attention
from fastattn._backward import attention_backward
from fastattn._core import __version__
from fastattn._inspect import attention_weights, dropout_mask, explain
from fastattn._linear import linear
from fastattn._machine import (
    get_num_threads,
    info,
    set_num_threads,
    warn_of_unknown_variables,
)
from fastattn._merge import merge
from fastattn._sdpa import scaled_dot_product_attention
from fastattn._statistics import attention_statistics
from fastattn.kv_cache import KVCache, PagedKVCache

__all__ = [
    "KVCache",
    "PagedKVCache",
    "__version__",
    "attention",
    "attention_backward",
    "attention_statistics",
    "attention_weights",
    "dropout_mask",
    "explain",
    "get_num_threads",
    "info",
    "linear",
    "merge",
    "reference",
    "scaled_dot_product_attention",
    "set_num_threads",
    "varlen_attention",
]

warn_of_unknown_variables()
del warn_of_unknown_variables
