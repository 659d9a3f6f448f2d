# SPDX-License-Identifier: Apache-2.0
"""`fastattn.KVCache`; see caches.py."""

from tests.fuzz.caches import check
from tests.fuzz.caches import draw_cache as draw

__all__ = ["check", "draw"]
