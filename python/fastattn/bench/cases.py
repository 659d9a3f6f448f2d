# SPDX-License-Identifier: Apache-2.0
"""What is measured: the named cases, their inputs, and the arithmetic they ask for.

Called by every other file of the harness, in the parent and in the workers: a case travels by
name and size, and each process makes the same inputs from the case's seed.
"""

import importlib
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ALONE = ("fastattn",)
WITH_TORCH = ("fastattn", "torch")
WITH_VLLM = ("fastattn", "vllm")
SERVERS = (*WITH_TORCH, "vllm", "zentorch", "pace")
DECODERS = (*SERVERS, "onnxruntime")  # the others are several times slower
# Of fastattn in a process with torch; the first two come right behind an operator of torch.
TENSOR_CALLS = ("tensors", "tensors to fastattn.torch", "drop-in")


@dataclass(frozen=True)
class Floor:
    """What fastattn promises for a case; an empty field promises nothing."""

    percent: float | None = None  # of the machine's limit, for the work left
    speedups: dict[str, float] = field(default_factory=dict)  # see promise()
    extra_mebibytes: float | None = None  # memory beside the output
    tflops: float | None = None  # 10**12 operations of the work a second
    launch_microseconds: float | None = None  # at most, beyond the fastest of torch's backends
    gpu: str = ""  # which the promise is of; empty: of every machine


def promise(
    percent: float | None = None, extra_mebibytes: float | None = None, **speedups: float
) -> Floor:
    """Write a floor; speed-ups are over a library, the `best` peer or the case's `baseline`."""
    return Floor(percent, speedups, extra_mebibytes)


def promise_of_h200(
    tflops: float | None = None,
    percent: float | None = None,
    launch_microseconds: float | None = None,
    speedups: dict[str, float] | None = None,
) -> Floor:
    """Write a floor that is for an H200 alone."""
    return Floor(
        percent,
        speedups or {},
        tflops=tflops,
        launch_microseconds=launch_microseconds,
        gpu="H200",
    )


@dataclass(frozen=True)
class Case:
    """One call of fastattn. `name` is for the command line, `title` for a person."""

    name: str
    q_len: int
    kv_len: int
    q_heads: int
    head_dim: int
    kv_heads: int = 0  # 0: as many as q_heads
    batch: int = 1
    dtype: str = "float32"
    is_causal: bool = False
    at_end: bool = False  # the last query stands at the last key; else the first at the first
    window: tuple[int, int] | None = None
    lengths: tuple[int, ...] = ()  # keys of each batch element; what follows is padding
    ragged_queries: bool = False  # the lengths are those of the queries too
    shared: int = 0  # how many first keys and values the whole batch has in common
    bias: bool = False  # of shape (1, q_heads, q_len, kv_len)
    softcap: float | None = None
    alibi: bool = False  # with the slopes of its paper
    sinks: bool = False
    call: str = "attention"  # how fastattn is called: a name in calls.py, or in GPU_CALLS
    cache_dtype: str = ""  # of the keys and values in a cache; empty: dtype
    bound_by: tuple[str, ...] = ("arithmetic",)  # and/or "read": caches are cold then
    device: str = "cpu"  # or "cuda"
    sleep_ms: int = 0  # how long the process has slept before each call
    before: str = ""  # what ran right before each call: a matrix product of "numpy" or "torch"
    isa: str | None = None  # the FASTATTN_ISA, or FASTATTN_CUDA_KERNEL, that this case is about
    libraries: tuple[str, ...] = ()  # empty: every library; else these alone
    baseline: "Case | None" = None  # another call of fastattn, timed in turn with this one
    floor: Floor = field(default_factory=Floor)

    @property
    def title(self) -> str:
        """What a person calls the case, in one or two lines."""
        return _TITLES.get(self.name, self.name)

    @property
    def is_beside_torch(self) -> bool:
        """Whether fastattn is called in a process that uses PyTorch."""
        return self.before == "torch" or self.call in TENSOR_CALLS

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // (self.kv_heads or self.q_heads)

    @property
    def query_offset(self) -> int:
        """Position of the first query among the keys."""
        return self.kv_len - self.q_len if self.at_end else 0

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(batch, q_heads, q_len, head_dim)."""
        return (self.batch, self.q_heads, self.q_len, self.head_dim)

    @property
    def output_bytes(self) -> int:
        """Size of the result, or of the three gradients; padding left out."""
        rows = sum(self.lengths) if self.ragged_queries else self.batch * self.q_len
        numbers = rows * self.q_heads * self.head_dim
        if self.call == "backward":
            kv_heads = self.kv_heads or self.q_heads
            numbers += 2 * self.batch * kv_heads * self.kv_len * self.head_dim
        return numbers * numpy_dtype(self.dtype).itemsize


class Inputs(NamedTuple):
    """The operands of a case, in fastattn's and NumPy's layout (batch, heads, seq, head_dim)."""

    query: Array
    key: Array
    value: Array
    mask: Array | None  # of bool
    bias: Array | None = None
    grad_out: Array | None = None  # of a backward pass


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Give NumPy's dtype of that name, or that of ml_dtypes, which brings bfloat16."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _square(name: str, tokens: int, heads: int, head_dim: int, **rest: Any) -> Case:
    return Case(name, tokens, tokens, heads, head_dim, **rest)


def _beside(case: Case, name: str, **changes: Any) -> Case:
    """Compare a case with the same one after these changes."""
    return replace(case, baseline=replace(case, name=name, floor=Floor(), **changes))


def _beside_float32(case: Case) -> Case:
    return _beside(case, "in float32", dtype="float32")


def _as_views(name: str, tokens: int, heads: int, head_dim: int, **rest: Any) -> Case:
    """Lay the arrays out as a model does; a copy to fastattn's layout should gain nothing."""
    floor = promise(baseline=1 / 1.05)
    case = _square(
        name, tokens, heads, head_dim, call="views", libraries=ALONE, floor=floor, **rest
    )
    return _beside(case, "contiguous", call="attention")


def _decode(name: str, kv_len: int, kv_heads: int, **rest: Any) -> Case:
    """Decode with 32 heads of 128 and one query unless told otherwise, with cold CPU caches."""
    return Case(
        name,
        **{"q_len": 1, "bound_by": ("read",), **rest},
        kv_len=kv_len,
        q_heads=32,
        head_dim=128,
        kv_heads=kv_heads,
    )


_TITLES = {
    "bert-128": "BERT-base\n8 x 128 tokens",
    "bert-512": "BERT-base\n8 x 512 tokens",
    "padded-512": "BERT-base, padded\n8 x 64..512 tokens",
    "gpt2-1k": "GPT-2\n1k tokens, causal",
    "gpt2-1k-views": "GPT-2, as it lays out heads\n1k tokens, causal",
    "llama-2k": "Llama-3-8B prefill\n2k tokens, causal, GQA",
    "causal-8k": "8 heads of 128\n8k tokens, causal, GQA",
    "document-32k": "long document, 4 heads\n32k tokens, window 256",
    "decode-4k": "Llama-3-8B decode\n1 token after 4k, GQA",
}
FAMILIAR = [
    _square("bert-128", 128, 12, 64, batch=8),
    _square("bert-512", 512, 12, 64, batch=8),
    _square("padded-512", 512, 12, 64, batch=8, lengths=tuple(range(512, 0, -64))),
    _square("gpt2-1k", 1024, 12, 64, is_causal=True),
    _square("gpt2-1k-views", 1024, 12, 64, is_causal=True, call="views"),
    _square("llama-2k", 2048, 32, 128, kv_heads=8, is_causal=True),
    _square("causal-8k", 8192, 8, 128, kv_heads=2, is_causal=True),
    _square("document-32k", 32768, 4, 64, window=(256, 256)),
    Case("decode-4k", 1, 4096, 32, 128, kv_heads=8, bound_by=("read",)),
]

# What fastattn promises; benchmarks/README.md says how to read the result.
FLOORS = [
    _square("f32-512-d64", 512, 12, 64, floor=promise(76, best=1.15)),
    _square("f32-2k-d64", 2048, 12, 64, floor=promise(86, best=1.1)),
    _square(
        "f32-2k-d64-causal",
        2048,
        12,
        64,
        is_causal=True,
        floor=promise(80, best=1.05, onnxruntime=1.4),
    ),
    _square("f32-2k-d128", 2048, 12, 128, floor=promise(90, best=1.05)),
    _square(
        "f32-4k-d128-causal",
        4096,
        12,
        128,
        is_causal=True,
        floor=promise(88, best=1.1, onnxruntime=1.3),
    ),
    _square(
        "f32-2k-d64-padding",
        2048,
        12,
        64,
        batch=2,
        lengths=(1300, 1772),
        floor=promise(80, torch=1.5),
    ),
    _square("f32-2k-d64-float-mask", 2048, 12, 64, bias=True, floor=promise(torch=2.0)),
    _square("f32-8k-d64-window", 8192, 12, 64, window=(256, 0), floor=promise(65, torch=8.0)),
    _as_views("f32-2k-d64-views", 2048, 12, 64),
    _as_views("f32-2k-d128-causal-views", 2048, 12, 128, is_causal=True),
    # Rows of a head lie 4 KiB apart, where a window leaves little to hide the misses behind.
    _as_views("f32-8k-d64-window-views", 8192, 16, 64, window=(256, 0)),
    _as_views("f32-8k-d32-window-views", 8192, 32, 32, window=(256, 0)),
    _square("f64-2k-d64", 2048, 12, 64, dtype="float64", floor=promise(76)),
    _square("avx2-2k-d64", 2048, 12, 64, isa="avx2", libraries=ALONE, floor=promise(75)),
    _square("avx2-2k-d128", 2048, 12, 128, isa="avx2", libraries=ALONE, floor=promise(80)),
    # What else models do to their scores: Gemma 2, MPT, GPT-OSS.
    _square(
        "f32-2k-d256-softcap",
        2048,
        8,
        256,
        kv_heads=4,
        is_causal=True,
        softcap=50.0,
        libraries=WITH_VLLM,
        floor=promise(vllm=1.0),
    ),
    _square(
        "f32-2k-d128-alibi",
        2048,
        16,
        128,
        is_causal=True,
        alibi=True,
        libraries=WITH_VLLM,
        floor=promise(vllm=1.0),
    ),
    _square(
        "f32-4k-d64-sinks-window",
        4096,
        64,
        64,
        kv_heads=8,
        is_causal=True,
        window=(127, 0),
        sinks=True,
        libraries=WITH_VLLM,
        floor=promise(vllm=1.0),
    ),
    _square("tiny", 8, 2, 64, floor=promise(torch=2.0)),
    _square("one-by-one", 1, 1, 1, floor=promise(numpy=1.0)),
    _square("memory-128k", 131072, 1, 64, libraries=ALONE, floor=promise(extra_mebibytes=16.0)),
]

HALF = [
    _square(
        "bf16-2k-d64", 2048, 12, 64, dtype="bfloat16", floor=promise(76, openvino=1.15, torch=2.3)
    ),
    _square(
        "bf16-2k-d128", 2048, 12, 128, dtype="bfloat16", floor=promise(83, openvino=1.08, torch=2.3)
    ),
    _square(
        "bf16-2k-d64-causal",
        2048,
        12,
        64,
        dtype="bfloat16",
        is_causal=True,
        floor=promise(72, best=1.25, openvino=2.0),
    ),
    _square(
        "bf16-2k-d128-causal",
        2048,
        12,
        128,
        dtype="bfloat16",
        is_causal=True,
        floor=promise(best=1.25),
    ),
    _as_views("bf16-2k-d128-views", 2048, 12, 128, dtype="bfloat16"),
    _as_views("bf16-8k-d128-window-views", 8192, 16, 128, dtype="bfloat16", window=(256, 0)),
    _beside_float32(
        _square(
            "fp16-2k-d64", 2048, 12, 64, dtype="float16", floor=promise(baseline=0.95, torch=4.0)
        )
    ),
    _beside_float32(
        _square(
            "fp16-2k-d128-causal",
            2048,
            12,
            128,
            dtype="float16",
            is_causal=True,
            floor=promise(baseline=0.95, torch=4.0),
        )
    ),
    *(
        _beside_float32(
            _square(
                f"bf16-{isa}-2k-d64",
                2048,
                12,
                64,
                dtype="bfloat16",
                isa=isa,
                libraries=ALONE,
                floor=promise(baseline=0.95),
            )
        )
        for isa in ("avx512", "avx2")
    ),
]

GROWTH = [_square(f"growth-{k}k", k * 1024, 2, 64) for k in (1, 2, 4, 8, 16, 32, 64)]

_GROUPED, _EACH = ("gqa", 8), ("mha", 32)  # 4 query heads to a key head, or 1

SERVING = [
    # One new token.
    *(
        _decode(f"decode-{k}k-{name}", k * 1024, kv_heads, libraries=DECODERS, floor=floor)
        for k, percent in ((4, 80), (32, 84))
        for (name, kv_heads), floor in (
            (_GROUPED, promise(percent, best=1.4, onnxruntime=2.5, torch=8.0)),
            (_EACH, promise(percent, onnxruntime=1.2, torch=3.0)),
        )
    ),
    # The same for tensors: `attention` beside the door that is for them.
    _beside(
        _decode(
            "decode-4k-gqa-tensors",
            4096,
            8,
            call="tensors",
            libraries=DECODERS,
            floor=promise(baseline=1 / 1.1, best=1.4),
        ),
        "through fastattn.torch",
        call="tensors to fastattn.torch",
    ),
    _decode(
        "decode-8k-gqa-bf16", 8192, 8, dtype="bfloat16", floor=promise(74, best=1.4, torch=30.0)
    ),
    _decode(
        "decode-8k-gqa-bf16-sinks",
        8192,
        8,
        dtype="bfloat16",
        sinks=True,
        libraries=(*WITH_VLLM, "pace"),
        floor=promise(best=1.4),
    ),
    _decode("decode-8k-gqa-fp16", 8192, 8, dtype="float16", floor=promise(60, onnxruntime=5.0)),
    _decode(
        "decode-ragged",
        8192,
        8,
        batch=8,
        lengths=(512, 8192, 1024, 6144, 1536, 4096, 2048, 3072),
        call="kv_lengths",
        libraries=DECODERS,
        floor=promise(78),
    ),
    # The cache in 8 bits, compared with one in bfloat16.
    *(
        _beside(
            _decode(
                f"decode-8k-{name}-int8",
                8192,
                kv_heads,
                dtype="bfloat16",
                call="cache",
                cache_dtype="int8",
                libraries=ALONE,
                floor=promise(baseline=speedup),
            ),
            "cache in bfloat16",
            cache_dtype="",
        )
        for (name, kv_heads), speedup in ((_EACH, 1.4), (_GROUPED, 1.0))
    ),
    # A few new tokens, as speculative decoding checks them.
    *(
        _decode(
            f"draft-{q_len}-{name}-{short}",
            8192,
            kv_heads,
            q_len=q_len,
            dtype=dtype,
            is_causal=True,
            at_end=True,
            bound_by=("read", "arithmetic"),
            libraries=SERVERS,
            floor=promise(91, torch=3.0),
        )
        for short, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
        for name, kv_heads in (_GROUPED, _EACH)
        for q_len in (2, 4, 8, 16)
    ),
    # Many sequences.
    _beside(
        _decode(
            "shared-prefix",
            4096 + 128,
            8,
            batch=16,
            shared=4096,
            call="pages",
            bound_by=("read", "arithmetic"),
            libraries=SERVERS,
            floor=promise(77, baseline=2.0),
        ),
        "nothing shared",
        shared=0,
    ),
    _beside(
        _square(
            "varlen",
            1024,
            12,
            64,
            batch=64,
            lengths=tuple((37 * i + 50) % 64 * 16 + 16 for i in range(64)),  # 16..1024, shuffled
            ragged_queries=True,
            call="varlen",
            libraries=SERVERS,
            floor=promise(baseline=1 / 1.05, torch=2.0),
        ),
        "one by one",
        call="one by one",
    ),
    # Its time should not depend on what the cache holds; no limit of the machine is near.
    _beside(
        _decode(
            "append-32k",
            32768,
            8,
            call="append",
            bound_by=(),
            libraries=ALONE,
            floor=promise(baseline=0.8),
        ),
        "cache of 256",
        kv_len=256,
    ),
]

TRAINING = [
    _square(
        f"backward-{short}-{name}",
        tokens,
        heads,
        head_dim,
        dtype=dtype,
        is_causal=is_causal,
        call="backward",
        libraries=WITH_TORCH,
        floor=promise(percent if short == "f32" else 55, torch=speedup),
    )
    for short, dtype, speedup in (("f32", "float32", 2.5), ("bf16", "bfloat16", 3.0))
    for name, tokens, heads, head_dim, is_causal, percent in (
        ("2k-d128", 2048, 8, 128, False, 76),
        ("1k-d64", 1024, 12, 64, False, 70),
        ("2k-d64-causal", 2048, 12, 64, True, 66),
    )
]

# What models ask for that have many problems, short ones, small heads or a bias. A row has three
# cases: into a result that is there, with a new one, and on a CPU without AVX-512.
_PROBLEMS = [
    _square("tabpfn", 12, 3, 64, batch=5000, bound_by=("read",), floor=promise(35)),  # features
    # The floors of the next three were 2.5, 2.2 and 2.2 times the speed there was.
    _square("tabicl", 24, 8, 16, batch=2000, bound_by=("read",), floor=promise(33)),  # rows
    _square("chronos", 16, 12, 64, batch=512, bound_by=("read",), floor=promise(42)),  # groups
    _square("swin", 49, 4, 32, batch=256, bias=True, floor=promise(33)),  # windows
    _square("triangle", 256, 4, 32, batch=256, bias=True, floor=promise(58)),
    _square("pair-bias", 512, 16, 24, batch=2, bias=True, lengths=(512, 400), floor=promise(55)),
]
_SHAPES = [
    *_PROBLEMS,
    Case("induce", 128, 5000, 8, 16, batch=30, floor=promise(64)),
    Case("induced", 5000, 128, 8, 16, batch=30, floor=promise(58)),
    _square("bert-32x64", 64, 12, 64, batch=32, floor=promise(onnxruntime=1.25)),
    _square("bert-8x128", 128, 12, 64, batch=8, floor=promise(onnxruntime=1.15)),
    *(
        _square(f"bert-{batch}x512", 512, 12, 64, batch=batch, floor=promise(best=1.1))
        for batch in (1, 8)
    ),
    _square(
        "llama-prefill", 2048, 32, 128, kv_heads=8, is_causal=True, floor=promise(86, vllm=1.03)
    ),
    _square("causal-4k", 4096, 12, 128, is_causal=True, floor=promise(vllm=1.1)),
    *(
        _square(f"bf16-{name}", 2048, heads, head_dim, dtype="bfloat16", **rest)
        for name, heads, head_dim, rest in (
            ("d64", 12, 64, {"floor": promise(80)}),
            ("d128", 12, 128, {"floor": promise(82)}),
            ("d64-causal", 12, 64, {"is_causal": True, "floor": promise(75)}),
            ("llama", 32, 128, {"kv_heads": 8, "is_causal": True, "floor": promise(pace=1.2)}),
        )
    ),
    _square("tiny-call", 8, 2, 64, floor=promise(torch=2.0)),
]


def _without_avx512(case: Case) -> Case:
    """Hold a case to the limit of AVX2, with 5 points less."""
    percent = case.floor.percent
    floor = promise(percent - 5) if percent else Floor()
    return replace(case, name=f"avx2-{case.name}", isa="avx2", libraries=ALONE, floor=floor)


_INTO = [replace(case, call="into") for case in _SHAPES]
_GRADIENTS = [
    replace(
        case,
        name=f"gradients-{case.name}",
        call="backward",
        bound_by=("arithmetic",),
        libraries=WITH_TORCH,
        floor=promise(torch=2.0),
    )
    for case in _PROBLEMS
]
SHAPES = [
    *_INTO,
    *(
        _beside(
            replace(case, name=f"new-{case.name}", libraries=ALONE, floor=promise(baseline=1.0)),
            "into a new array that was filled",
            call="into filled",
        )
        for case in _SHAPES
    ),
    *_GRADIENTS,
    *map(_without_avx512, (*_INTO, *_GRADIENTS)),
]

# On a GPU. "launch" is timed by the host's clock: what a call costs before the GPU works.
GPU_CALLS = ("attention", "backward", "launch")
GPU_TOKENS, GPU_COLUMNS = 16384, 2048  # batch * q_len; q_heads * head_dim


def _on_gpu(name: str, tokens: int, head_dim: int = 128, **rest: Any) -> Case:
    """Choose bfloat16, and a batch and heads by which all cases of a length cost the same."""
    return _square(
        name,
        tokens,
        GPU_COLUMNS // head_dim,
        head_dim,
        batch=GPU_TOKENS // tokens,
        dtype="bfloat16",
        device="cuda",
        **rest,
    )


_GPU_FLOORS = {
    "fwd-8k": promise_of_h200(520, speedups={"torch-flash": 1.0}),
    "fwd-8k-causal": promise_of_h200(450),
    "bwd-8k": promise_of_h200(300),
    "decode-16k-x16": promise_of_h200(percent=75),
}
GPU = [
    *(
        _on_gpu(
            name := f"fwd-{short}{dim}{suffix}",
            tokens,
            head_dim,
            is_causal=bool(suffix),
            floor=_GPU_FLOORS.get(name, Floor()),
        )
        for short, tokens, dim, head_dim in (
            ("512", 512, "", 128),
            ("2k", 2048, "", 128),
            ("8k", 8192, "", 128),
            ("16k", 16384, "", 128),
            ("8k", 8192, "-d64", 64),
        )
        for suffix in ("", "-causal")
    ),
    _on_gpu("fwd-8k-mma", 8192, isa="mma", libraries=ALONE, floor=promise_of_h200(330)),
    *(
        _on_gpu(
            name := f"bwd-8k{suffix}",
            8192,
            is_causal=bool(suffix),
            call="backward",
            floor=_GPU_FLOORS.get(name, Floor()),
        )
        for suffix in ("", "-causal")
    ),
    *(
        _decode(
            name := f"decode-16k-x{batch}",
            16384,
            8,
            batch=batch,
            dtype="bfloat16",
            device="cuda",
            floor=_GPU_FLOORS.get(name, Floor()),
        )
        for batch in (16, 1)
    ),
    Case(
        "launch",
        64,
        64,
        1,
        64,
        dtype="bfloat16",
        device="cuda",
        call="launch",
        bound_by=(),
        floor=promise_of_h200(launch_microseconds=10),
    ),
]

# A call after idleness, as a server meets it at each request, or after another library's threads.
_WHEN: dict[str, dict[str, Any]] = {
    "in-a-loop": {},
    **{f"after-{ms}ms": {"sleep_ms": ms} for ms in (5, 20, 100)},
    **{f"after-{library}": {"before": library} for library in ("numpy", "torch")},
}
_CALLED = {"": "attention", "-drop-in": "drop-in"}
IDLE = [
    _square(
        f"gpt2-{when}{suffix}",
        1024,
        12,
        64,
        is_causal=True,
        call=call,
        libraries=(*WITH_TORCH, "vllm"),
        **_WHEN[when],
    )
    for suffix, call in _CALLED.items()
    for when in _WHEN
]

SUITES = {
    "familiar": FAMILIAR,
    "floors": FLOORS,
    "half": HALF,
    "serving": SERVING,
    "training": TRAINING,
    "shapes": SHAPES,
    "growth": GROWTH,
    "idle": IDLE,
}
GPU_SUITES = {"gpu": GPU}
SUITES_OF = {"cpu": SUITES, "cuda": GPU_SUITES}  # the first suite of a device is its default
QUICK = ("bert-128", "gpt2-1k", "decode-4k")
GPU_QUICK = ("fwd-8k", "fwd-8k-causal", "decode-16k-x16", "launch")


def shrunk(case: Case) -> Case:
    """Return a tiny case of the same kind, whose call makes a library load its code."""
    return replace(
        case,
        q_len=min(case.q_len, 64),
        kv_len=min(case.kv_len, 64),
        batch=1,
        q_heads=case.groups,
        kv_heads=1,
        lengths=(48,) if case.lengths else (),
        shared=min(case.shared, 32),
    )


def score_options(case: Case) -> dict[str, Any]:
    """
    Return what else `attention` is told of the scores and their sum, by the names it has there.

    The slopes are those of ALiBi (Press et al., 2022) for 2**n heads.
    """
    heads = np.arange(1, case.q_heads + 1, dtype=np.float32)
    options: dict[str, Any] = {}
    if case.softcap is not None:
        options["softcap"] = case.softcap
    if case.alibi:
        options["alibi_slopes"] = np.exp2(-8 * heads / case.q_heads)
    if case.sinks:
        options["sinks"] = 2 * np.cos(heads)
    return options


def make_inputs(case: Case) -> Inputs:
    """
    Make the case's operands, the same in every process.

    Values have mean 1, as real ones are not centred: an error that grows with the number of
    keys would cancel around 0.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype = numpy_dtype(case.dtype)

    def normal(*shape: int) -> Array:
        drawn = np.float64 if dtype == np.float64 else np.float32
        return rng.standard_normal(shape, drawn)

    kv_shape = (case.batch, case.kv_heads or case.q_heads, case.kv_len, case.head_dim)
    query, key, value = normal(*case.output_shape), normal(*kv_shape), normal(*kv_shape)
    value += 1
    for x in (key, value):
        x[1:, :, : case.shared] = x[:1, :, : case.shared]
    mask = bias = None
    if case.lengths:
        mask = np.arange(case.kv_len) < np.array(case.lengths)[:, None, None, None]
    if case.bias:
        bias = normal(1, case.q_heads, case.q_len, case.kv_len).astype(dtype, copy=False)
    grad_out = normal(*case.output_shape).astype(dtype) if case.call == "backward" else None
    query, key, value = (x.astype(dtype, copy=False) for x in (query, key, value))
    return Inputs(query, key, value, mask, bias, grad_out)


def _first_and_last(case: Case, rows: Array | None = None) -> tuple[Array, Array]:
    """Return the first key that each query sees, and one past the last; padding is left out."""
    position = (np.arange(case.q_len) if rows is None else rows) + case.query_offset
    everything = case.q_len + case.kv_len
    left, right = case.window if case.window is not None else (everything, everything)
    if case.is_causal:
        right = 0
    first = np.clip(position - left, 0, case.kv_len)
    past = np.clip(position + right + 1, first, case.kv_len)
    return first, past


def seen_by_position(case: Case, rows: Array | None = None) -> Array:
    """Tell in an array (rows, kv_len) which keys causality and window let each row see."""
    first, past = _first_and_last(case, rows)
    key = np.arange(case.kv_len)
    return (key >= first[:, None]) & (key < past[:, None])


def visible_pairs(case: Case) -> int:
    """Count exactly the (query, key) pairs that one head attends, summed over the batch."""
    first, past = _first_and_last(case)
    pairs = 0
    for length in case.lengths or (case.kv_len,) * case.batch:
        rows = slice(length if case.ragged_queries else case.q_len)
        pairs += int(np.maximum(np.minimum(past[rows], length) - first[rows], 0).sum())
    return pairs


def flops(case: Case) -> int:
    """
    Count the multiplications and additions that the result needs.

    Each visible pair costs head_dim multiply-adds for its score and head_dim for its share of
    the value: 4 * head_dim operations; the backward pass has five such products, the score again
    among them. Pairs that causality, window or padding hide count nothing, nor do exponentials and
    masks: "% of the limit" is of the work that is left. A library that computes hidden pairs pays
    for it in time alone.
    """
    products = 5 if case.call == "backward" else 2
    return 2 * products * case.head_dim * case.q_heads * visible_pairs(case)


def bytes_moved(case: Case) -> int:
    """
    Count the bytes that must be read or written once: query, key, value, output.

    Padding counts nothing, what a batch shares counts once, and so does a cache's own dtype; the
    scales of one in int8 do not.
    """
    keys = sum(case.lengths or (case.kv_len,) * case.batch) - (case.batch - 1) * case.shared
    kv_items = 2 * (case.kv_heads or case.q_heads) * keys * case.head_dim
    return kv_items * numpy_dtype(case.cache_dtype or case.dtype).itemsize + 2 * case.output_bytes


def work(case: Case) -> dict[str, int]:
    """
    Return the work that the result needs, by the limit that it meets: FLOPs or bytes.

    Where there are two, neither overlaps the other: the least time is the sum of both. float16 is
    computed in float32. The limits of a GPU are those of a copy and of a matrix product.
    """
    memory, arithmetic = "read", "float32" if case.dtype == "float16" else case.dtype
    if case.device == "cuda":
        memory, arithmetic = "copy", "matmul"
    amounts = {}
    if "read" in case.bound_by:
        amounts[memory] = bytes_moved(case)
    if "arithmetic" in case.bound_by:
        amounts[arithmetic] = flops(case)
    return amounts
