from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn._backward import GradientArrays
from fastattn._linear import Layer
from fastattn._options import CallOptions
from fastattn._statistics import StatisticsArrays

Array: TypeAlias = NDArray[Any]

__version__: str
MOST_THREADS: int

def attention(
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array | None,
    batch_shape: tuple[int, ...],
    options: CallOptions,
    accumulates: bool,
    /,
) -> None: ...
def varlen_attention(
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array | None,
    batch_shape: tuple[int, ...],
    options: CallOptions,
    accumulates: bool,
    q_starts: Array,
    kv_starts: Array,
    /,
) -> None: ...
def cache_attention(
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array | None,
    batch_shape: tuple[int, ...],
    options: CallOptions,
    kv_len: int,
    positions: Array,
    lengths: Array,
    begins: Array,
    parts: Array | None,
    pages: Array,
    key_scale: Array | None,
    value_scale: Array | None,
    column_sums: Array | None,
    /,
) -> None: ...
def attention_backward(
    query: Array,
    key: Array,
    value: Array,
    batch_shape: tuple[int, ...],
    options: CallOptions,
    arrays: GradientArrays,
    accumulates: bool,
    /,
) -> None: ...
def varlen_attention_backward(
    query: Array,
    key: Array,
    value: Array,
    batch_shape: tuple[int, ...],
    options: CallOptions,
    q_starts: Array,
    kv_starts: Array,
    arrays: GradientArrays,
    accumulates: bool,
    /,
) -> None: ...
def attention_statistics(
    query: Array,
    key: Array,
    batch_shape: tuple[int, ...],
    options: CallOptions,
    arrays: StatisticsArrays,
    /,
) -> None: ...
def explain(
    query: Array,
    key: Array,
    value: Array,
    batch_shape: tuple[int, ...],
    options: CallOptions,
    threads: int,  # 0: those at hand
    /,
) -> dict[str, Any]: ...
def schedule(
    call: Callable[[], object], threads: int, /
) -> list[tuple[int, list[tuple[int, Array, Array, Array, Array]]]]: ...
def attend_plain(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    scale: float | None,
    is_causal: bool,
    grouped: bool,
    /,
) -> bool: ...
def attend_plain_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    scale: float | None,
    is_causal: bool,
    /,
) -> bool: ...
def linear(x: Array, /, *layers: Layer) -> list[NDArray[np.float32]]: ...
def gelu(x: Array, by_tanh: bool, out: Array, /) -> None: ...
def swiglu(gate: Array, up: Array, out: Array, /) -> None: ...
def geglu(gate: Array, up: Array, out: Array, /) -> None: ...
def layer_norm(x: Array, weight: Array, bias: Array, eps: float, out: Array, /) -> None: ...
def rms_norm(x: Array, weight: Array, eps: float, out: Array, /) -> None: ...
def softmax(x: Array, log: bool, out: Array, /) -> None: ...
def rotary(x: Array, cos: Array, sin: Array, out: Array, /) -> None: ...
def lie_apart(array: Array, others: tuple[Array | None, ...], /) -> bool: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str | None, /) -> None: ...
def set_num_threads(threads: int, /) -> None: ...
def get_num_threads() -> int: ...
def record_items(on: bool, /) -> None: ...
def recorded_items() -> list[NDArray[np.float64]]: ...
def use_pool_of_caller(use: bool, /) -> None: ...
def probe_fma(dtype_name: str, seconds: float, /) -> float: ...
def probe_read(megabytes: int, repeats: int, /) -> float: ...
def build_info() -> dict[str, Any]: ...
