# SPDX-License-Identifier: Apache-2.0
"""Results by definition that several tests ask for are computed once.

Nearly all of the time of tests of results is the definition's, and a test of each instruction set
asks for the same.
"""

import functools
import hashlib

import numpy as np

BUDGET = 2**28  # bytes of results that are kept; the oldest go first


def told(digest, x):
    """Put what decides about a result into the digest: the bits of arrays, numbers as text."""
    if isinstance(x, np.ndarray):
        digest.update(f"{x.dtype.name}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    elif isinstance(x, dict):
        for name, part in sorted(x.items()):
            digest.update(name.encode())
            told(digest, part)
    elif isinstance(x, tuple | list):
        digest.update(f"{len(x)}".encode())
        for part in x:
            told(digest, part)
    else:
        assert x is None or isinstance(x, bool | int | float | np.generic), type(x)
        digest.update(f"{type(x).__name__} {x!r}".encode())


def remembering(function):
    """Let a function of arrays and options, which returns arrays, compute each result once."""
    kept = {}
    taken = 0

    @functools.wraps(function)
    def remembered(*arguments, **options):
        nonlocal taken
        digest = hashlib.sha256()
        told(digest, (arguments, options))
        key = digest.digest()
        if key not in kept:
            results = tuple(np.array(x) for x in function(*arguments, **options))
            for x in results:
                x.flags.writeable = False
            taken += sum(x.nbytes for x in results)
            kept[key] = results
            while taken > BUDGET and len(kept) > 1:
                taken -= sum(x.nbytes for x in kept.pop(next(iter(kept))))
        return kept[key]

    return remembered
