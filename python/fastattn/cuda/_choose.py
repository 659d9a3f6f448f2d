# SPDX-License-Identifier: Apache-2.0
"""Which kernel answers a call, and why? Nothing but arithmetic; no GPU is asked.

Called by `_attention.py` and `_backward.py`, for the call itself and for `explain`. What runs
depends on the dtypes, the head_dims, q_len, the heads per KV head, which arguments are given and
the GPU's architecture: not on kv_len (unless it is 0, or beyond 2**28), nor on what else is in the
batch; and of values, on whether scale is positive and positions fit 32 bits. The
environment variable FASTATTN_CUDA_KERNEL, which is read at the first call, makes it another one.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from fastattn.cuda.kernels import HOPPER, MOST_LENGTH, TENSOR_CORES, tiles

VARIABLE = "FASTATTN_CUDA_KERNEL"
FORMS = ("wgmma", "mma", "decode", "simt")
HALVES = ("float16", "bfloat16")
MOST_DECODE_QUERIES = 16
MOST_DECODE_ROWS = 64  # queries times query heads per KV head


class Question(NamedTuple):
    """What the choice depends on."""

    query_dtype: str
    key_dtype: str
    head_dim: int
    value_head_dim: int
    q_len: int
    kv_len: int
    group: int  # query heads per KV head
    given: tuple[str, ...]  # of the arguments that only simt knows
    scale: float
    far: bool  # a position or a side of the window needs more than 32 bits
    capability: tuple[int, int]


class Choice(NamedTuple):
    """The kernel's name, and why it is this one."""

    form: str
    reason: str


def only_simt(question: Question) -> str:
    """Return why no other kernel can answer; empty if one can."""
    q = question
    if q.query_dtype not in HALVES:
        return f"the dtype is {q.query_dtype}: tensor cores take float16 and bfloat16"
    if q.key_dtype != q.query_dtype:
        return f"query is {q.query_dtype} and key is {q.key_dtype}"
    if q.given:
        return f"{', '.join(q.given)} given: only simt knows such arguments"
    if q.capability < TENSOR_CORES:
        return "the GPU is of compute capability {}.{}: the others need 8.0".format(*q.capability)
    if q.head_dim != q.value_head_dim:
        return f"head_dim is {q.head_dim} and value_head_dim {q.value_head_dim}: they differ"
    if q.scale <= 0:
        return f"scale is {q.scale}: the others need a positive one"
    if max(q.q_len, q.kv_len) > MOST_LENGTH:
        return f"lengths are beyond 2**28: {q.q_len}, {q.kv_len}"
    if q.kv_len == 0:
        return "there are no keys"
    if q.far:
        return "query_offset or a side of the window is beyond 2**28"
    return ""


@functools.cache
def forced() -> str:
    """Return the kernel that the environment asks for; empty if it leaves the choice."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in FORMS:
        raise ValueError(f"{VARIABLE}={name!r} is not one of: {', '.join(FORMS)}")
    return name


def forward(question: Question) -> Choice:
    """Choose the kernel of a call's result."""
    best = _best_forward(question)
    forms = [best.form, "simt"]
    if best.form == "decode":
        forms.append("mma")
    if best.form in ("wgmma", "decode") and _has_wgmma(question):
        forms += ["wgmma", "mma"]
    return _unless_forced(best, forms)


def backward(question: Question, deterministic: bool) -> Choice:
    """Choose the kernel of a call's gradients."""
    best = _best_backward(question, deterministic)
    forms = [best.form, "simt"] + (["mma"] if best.form == "wgmma" else [])
    return _unless_forced(best, forms)


def _unless_forced(best: Choice, forms: list[str]) -> Choice:
    """Return the best choice, or the one that is asked for if it is among the possible forms."""
    name = forced()
    if not name:
        return best
    if name not in forms:
        choices = ", ".join(form for form in FORMS if form in forms)
        raise ValueError(
            f"{VARIABLE}={name!r} cannot compute this call, these can: {choices} ({best.reason})"
        )
    return Choice(name, f"{VARIABLE} asks for it")


def _best_forward(question: Question) -> Choice:
    q = question
    reason = only_simt(q)
    if reason:
        return Choice("simt", reason)
    if q.head_dim not in tiles.MMA:
        dims = ", ".join(map(str, tiles.MMA))
        return Choice("simt", f"head_dim is {q.head_dim}: the others take {dims}")
    if q.q_len <= MOST_DECODE_QUERIES and q.q_len * q.group <= MOST_DECODE_ROWS:
        return Choice(
            "decode",
            f"{q.q_len} queries of {q.group} heads per KV head are few: the keys are cut over the "
            "chip",
        )
    if _has_wgmma(q):
        return Choice("wgmma", "Hopper's tensor cores take this call")
    if q.capability == HOPPER:
        return Choice("mma", f"head_dim is {q.head_dim}: wgmma takes 64 and 128")
    return Choice("mma", "tensor cores take this call")


def _has_wgmma(question: Question) -> bool:
    return question.capability == HOPPER and question.head_dim in tiles.WGMMA


def _best_backward(question: Question, deterministic: bool) -> Choice:
    q = question
    reason = only_simt(q)
    if reason:
        return Choice("simt", reason)
    if q.head_dim not in tiles.MMA_DQ_KEYS:
        return Choice(
            "simt", f"head_dim is {q.head_dim}: gradients by tensor cores take 64 and 128"
        )
    if q.capability == HOPPER:
        rest = "; dq by mma, in a fixed order" if deterministic else ""
        return Choice("wgmma", "Hopper's tensor cores take this call" + rest)
    return Choice("mma", "tensor cores take this call")
