# SPDX-License-Identifier: Apache-2.0
"""A case in the terms of another library: its tensors, masks and layout, what it cannot express.

Called by calls.py, libraries.py, gpu_libraries.py and rivals.py, which call the libraries.
"""

import importlib
from typing import Any

import numpy as np

from fastattn.bench.cases import (
    Array,
    Case,
    Inputs,
    numpy_dtype,
    score_options,
    seen_by_position,
)


class Unsupported(Exception):
    """The library has no way to express the case; the message says what is missing."""


def module(name: str) -> Any:
    """Import a module that may not be installed, and whose types are not checked."""
    return importlib.import_module(name)


def plainly_causal(case: Case, inputs: Inputs) -> bool:
    """Tell whether a flag for causality expresses the whole mask of the case."""
    masked = inputs.mask is not None or inputs.bias is not None or case.window is not None
    return case.is_causal and not case.at_end and not masked


def all_masks(case: Case, inputs: Inputs) -> Array | None:
    """Fold causality, window and bias into one mask, for a library that knows a dense one alone."""
    seen, bias = inputs.mask, inputs.bias
    if case.is_causal or case.window is not None:
        by_position = seen_by_position(case)[None, None]
        seen = by_position if seen is None else by_position & seen
    if seen is None or bias is None:
        return seen if bias is None else bias
    return np.where(seen, bias, bias.dtype.type(-np.inf))


def require(case: Case, *dtypes: str, otherwise: str = "does not compute in {}") -> None:
    """Refuse every other dtype."""
    if case.dtype not in dtypes:
        raise Unsupported(otherwise.format(case.dtype))


def require_plain_scores(case: Case, *known: str) -> None:
    """Refuse what the case does to its scores and their sum, but what the library knows."""
    for name in score_options(case):
        if name not in known:
            raise Unsupported(f"knows no {name}")


def require_scores(case: Case) -> None:
    """Fail at once, not after a long preparation, where scores and a mask cannot fit in memory."""
    np.empty((case.batch * case.q_heads + 2, case.q_len, case.kv_len), numpy_dtype(case.dtype))


def additive(mask: Array, dtype: str) -> Array:
    """Turn a bool mask into one to be added."""
    if mask.dtype != bool:
        return mask
    number = numpy_dtype(dtype).type
    added: Array = np.where(mask, number(0), number(-np.inf))
    return added


def tokens_first(x: Array) -> Array:
    """Turn (batch, heads, seq, dim) into a contiguous (batch, seq, heads, dim)."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3))


def tensor(x: Array, device: str = "cpu") -> Any:
    """Give an array to torch, on the CPU without a copy."""
    torch = module("torch")
    if x.dtype.name == "bfloat16":  # torch does not know NumPy's
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(x).to(device)
