# SPDX-License-Identifier: Apache-2.0
"""Where the keys and values of earlier tokens wait for the next ones.

Each file answers one question:

- `_batch`: `KVCache`, for a batch of sequences that grow together. It is a `PagedKVCache` inside.
- `_paged`: `PagedKVCache`. Which sequences are meant, and what do they attend to?
- `_pool`: which pages does a sequence read, and when is one copied, written or free?
- `_evict`: which tokens does an eviction leave, and at which positions?
- `_arguments`: what may a cache be given?
- `_int8`: how is a token rounded to int8?
- `_files`: how does a cache become a file, a pickle or a copy, and how does it come back?
"""

from fastattn.kv_cache._batch import KVCache
from fastattn.kv_cache._paged import PagedKVCache

__all__ = ["KVCache", "PagedKVCache"]
