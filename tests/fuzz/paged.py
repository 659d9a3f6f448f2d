# SPDX-License-Identifier: Apache-2.0
"""`fastattn.PagedKVCache`; see caches.py."""

from tests.fuzz import caches


def draw(rng):
    """Draw the life of a cache."""
    return caches.draw_paged(rng)


def check(spec):
    """Raise if it went otherwise than it should."""
    caches.check(spec, paged=True)
