# SPDX-License-Identifier: Apache-2.0
"""`fastattn.PagedKVCache`; see caches.py."""

from tests.fuzz.caches import check
from tests.fuzz.caches import draw_paged as draw

__all__ = ["check", "draw"]
