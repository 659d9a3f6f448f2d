from typing import Any

from numpy.typing import NDArray

__version__: str
MOST_THREADS: int

def attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    out: NDArray[Any] | None,
    lse: NDArray[Any] | None,
    batch_shape: tuple[int, ...],
    mask: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    alibi_slopes: NDArray[Any] | None,
    sinks: NDArray[Any] | None,
    query_offset: NDArray[Any] | None,
    kv_lengths: NDArray[Any] | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    /,
) -> None: ...
def varlen_attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    out: NDArray[Any] | None,
    lse: NDArray[Any] | None,
    batch_shape: tuple[int, ...],
    mask: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    alibi_slopes: NDArray[Any] | None,
    sinks: NDArray[Any] | None,
    query_offset: NDArray[Any] | None,
    kv_lengths: NDArray[Any] | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    q_starts: NDArray[Any],
    kv_starts: NDArray[Any],
    /,
) -> None: ...
def cache_attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    out: NDArray[Any] | None,
    lse: NDArray[Any] | None,
    batch_shape: tuple[int, ...],
    mask: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    alibi_slopes: NDArray[Any] | None,
    sinks: NDArray[Any] | None,
    query_offset: NDArray[Any] | None,
    kv_lengths: NDArray[Any] | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    kv_len: int,
    kv_begins: NDArray[Any] | None,
    pages: NDArray[Any],
    key_scale: NDArray[Any] | None,
    value_scale: NDArray[Any] | None,
    /,
) -> None: ...
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
def explain(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    out: NDArray[Any] | None,
    lse: NDArray[Any] | None,
    batch_shape: tuple[int, ...],
    mask: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    alibi_slopes: NDArray[Any] | None,
    sinks: NDArray[Any] | None,
    query_offset: NDArray[Any] | None,
    kv_lengths: NDArray[Any] | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    /,
) -> dict[str, Any]: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str | None, /) -> None: ...
def set_num_threads(threads: int, /) -> None: ...
def get_num_threads() -> int: ...
def use_pool_of_caller(use: bool, /) -> None: ...
def probe_fma(dtype_name: str, seconds: float, /) -> float: ...
def probe_read(megabytes: int, repeats: int, /) -> float: ...
def build_info() -> dict[str, Any]: ...
