# SPDX-License-Identifier: Apache-2.0
"""What is measured: the named cases, their inputs, and the arithmetic they ask for.

Called by every other file of the harness, in the parent and in the workers: a case travels by
name and size, and each process makes the same inputs from the case's seed.
"""

import zlib
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Floor(NamedTuple):
    """What fastattn promises for a case; None where it promises nothing."""

    percent: float | None = None  # of the machine's limit, for the work left
    speedup: float | None = None  # over the fastest library of `against`
    against: tuple[str, ...] = ()  # empty: over every peer
    extra_mebibytes: float | None = None  # memory beside the output


@dataclass(frozen=True)
class Case:
    """One attention call. `name` is for the command line, `title` for a person."""

    name: str
    q_len: int
    kv_len: int
    q_heads: int
    head_dim: int
    kv_heads: int = 0  # 0: as many as q_heads
    batch: int = 1
    dtype: str = "float32"
    is_causal: bool = False
    window: tuple[int, int] | None = None
    lengths: tuple[int, ...] = ()  # bool padding mask (batch, 1, 1, kv_len): one length per batch
    float_mask: bool = False  # added mask (1, q_heads, q_len, kv_len)
    memory_bound: bool = False  # the limit is the read bandwidth, and caches are cold
    isa: str | None = None  # the FASTATTN_ISA that this case is about
    libraries: tuple[str, ...] = ()  # empty: every library; else these alone
    floor: Floor = field(default_factory=Floor)

    @property
    def title(self) -> str:
        """What a person calls the case, in one or two lines."""
        return _TITLES.get(self.name, self.name)

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // (self.kv_heads or self.q_heads)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(batch, q_heads, q_len, head_dim)."""
        return (self.batch, self.q_heads, self.q_len, self.head_dim)

    @property
    def output_bytes(self) -> int:
        """Size of the result."""
        return int(np.prod(self.output_shape)) * np.dtype(self.dtype).itemsize


class Inputs(NamedTuple):
    """The operands of a case, in fastattn's and NumPy's layout (batch, heads, seq, head_dim)."""

    query: Array
    key: Array
    value: Array
    mask: Array | None


def _square(name: str, tokens: int, heads: int, head_dim: int, **rest: Any) -> Case:
    return Case(name, tokens, tokens, heads, head_dim, **rest)


_TITLES = {
    "bert-128": "BERT-base\n8 x 128 tokens",
    "bert-512": "BERT-base\n8 x 512 tokens",
    "padded-512": "BERT-base, padded\n8 x 64..512 tokens",
    "gpt2-1k": "GPT-2\n1k tokens, causal",
    "llama-2k": "Llama-3-8B prefill\n2k tokens, causal, GQA",
    "causal-8k": "8 heads of 128\n8k tokens, causal, GQA",
    "document-32k": "long document, 4 heads\n32k tokens, window 256",
    "decode-4k": "Llama-3-8B decode\n1 token after 4k, GQA",
}
ALONE = ("fastattn",)

FAMILIAR = [
    _square("bert-128", 128, 12, 64, batch=8),
    _square("bert-512", 512, 12, 64, batch=8),
    _square("padded-512", 512, 12, 64, batch=8, lengths=tuple(range(512, 0, -64))),
    _square("gpt2-1k", 1024, 12, 64, is_causal=True),
    _square("llama-2k", 2048, 32, 128, kv_heads=8, is_causal=True),
    _square("causal-8k", 8192, 8, 128, kv_heads=2, is_causal=True),
    _square("document-32k", 32768, 4, 64, window=(256, 256)),
    Case("decode-4k", 1, 4096, 32, 128, kv_heads=8, memory_bound=True),
]

# What fastattn promises; benchmarks/README.md says how to read the result.
FLOORS = [
    _square("f32-512-d64", 512, 12, 64, floor=Floor(76, 1.15)),
    _square("f32-2k-d64", 2048, 12, 64, floor=Floor(86, 1.1)),
    _square("f32-2k-d64-causal", 2048, 12, 64, is_causal=True, floor=Floor(80, 1.4)),
    _square("f32-2k-d128", 2048, 12, 128, floor=Floor(90, 1.05)),
    _square("f32-4k-d128-causal", 4096, 12, 128, is_causal=True, floor=Floor(88, 1.3)),
    _square(
        "f32-2k-d64-padding",
        2048,
        12,
        64,
        batch=2,
        lengths=(1300, 1772),
        floor=Floor(80, 1.5, ("torch",)),
    ),
    _square(
        "f32-2k-d64-float-mask", 2048, 12, 64, float_mask=True, floor=Floor(None, 2.0, ("torch",))
    ),
    _square("f32-8k-d64-window", 8192, 12, 64, window=(256, 0), floor=Floor(65, 8.0, ("torch",))),
    _square("f64-2k-d64", 2048, 12, 64, dtype="float64", floor=Floor(76)),
    _square("avx2-2k-d64", 2048, 12, 64, isa="avx2", libraries=ALONE, floor=Floor(75)),
    _square("avx2-2k-d128", 2048, 12, 128, isa="avx2", libraries=ALONE, floor=Floor(80)),
    _square("tiny", 8, 2, 64, floor=Floor(None, 2.0, ("torch",))),
    _square("one-by-one", 1, 1, 1, floor=Floor(None, 1.0, ("numpy",))),
    _square("memory-128k", 131072, 1, 64, libraries=ALONE, floor=Floor(extra_mebibytes=16.0)),
]

GROWTH = [_square(f"growth-{k}k", k * 1024, 2, 64) for k in (1, 2, 4, 8, 16, 32, 64)]

SUITES = {"familiar": FAMILIAR, "floors": FLOORS, "growth": GROWTH}
QUICK = ("bert-128", "gpt2-1k", "decode-4k")


def shrunk(case: Case) -> Case:
    """Give the same kind of call at a size of nothing, to load a library's code with."""
    return replace(
        case,
        q_len=min(case.q_len, 64),
        kv_len=min(case.kv_len, 64),
        batch=1,
        q_heads=case.groups,
        kv_heads=1,
        lengths=(48,) if case.lengths else (),
    )


def make_inputs(case: Case) -> Inputs:
    """
    Make the case's operands, the same in every process.

    Values have mean 1, as real ones are not centred: an error that grows with the number of
    keys would cancel around 0.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype = np.dtype(case.dtype).type

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype)

    kv_shape = (case.batch, case.kv_heads or case.q_heads, case.kv_len, case.head_dim)
    query, key, value = normal(*case.output_shape), normal(*kv_shape), normal(*kv_shape)
    value += dtype(1)
    mask: Array | None = None
    if case.lengths:
        mask = np.arange(case.kv_len) < np.array(case.lengths)[:, None, None, None]
    elif case.float_mask:
        mask = normal(1, case.q_heads, case.q_len, case.kv_len)
    return Inputs(query, key, value, mask)


def _first_and_last(case: Case, rows: Array | None = None) -> tuple[Array, Array]:
    """First key seen by each query, and one past the last, by causality and window alone."""
    position = np.arange(case.q_len, dtype=np.int64) if rows is None else rows
    left, right = case.window if case.window is not None else (case.kv_len, case.kv_len)
    if case.is_causal:
        right = 0
    first = np.clip(position - left, 0, case.kv_len)
    past = np.clip(position + right + 1, first, case.kv_len)
    return first, past


def seen_by_position(case: Case, rows: Array | None = None) -> Array:
    """Bool (rows, kv_len): what causality and window let each query, or those rows, see."""
    first, past = _first_and_last(case, rows)
    key = np.arange(case.kv_len)
    return (key >= first[:, None]) & (key < past[:, None])


def visible_pairs(case: Case) -> int:
    """Count exactly the (query, key) pairs that one head attends, summed over the batch."""
    first, past = _first_and_last(case)
    pairs = 0
    for length in case.lengths or (case.kv_len,) * case.batch:
        pairs += int(np.maximum(np.minimum(past, length) - first, 0).sum())
    return pairs


def flops(case: Case) -> int:
    """
    Count the multiplications and additions that nobody can leave out.

    Each visible pair costs head_dim multiply-adds for its score and head_dim for its share of
    the value: 4 * head_dim operations. Pairs that causality, window or padding hide count
    nothing, so that "% of the limit" is of the work left; exponentials and masks count nothing
    either. A library that computes hidden pairs is charged for the time alone.
    """
    return 4 * case.head_dim * case.q_heads * visible_pairs(case)


def bytes_moved(case: Case) -> int:
    """Count the bytes that must be read or written once: query, key, value, output."""
    kv_heads = case.kv_heads or case.q_heads
    kv_items = 2 * case.batch * kv_heads * case.kv_len * case.head_dim
    return kv_items * np.dtype(case.dtype).itemsize + 2 * case.output_bytes
