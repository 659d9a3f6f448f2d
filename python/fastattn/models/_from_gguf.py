# SPDX-License-Identifier: Apache-2.0
"""What does a checkpoint hold that is a GGUF file? The same as a folder, under the same names.

llama.cpp has names of its own for keys and tensors. In the architecture `llama` it also reorders
the rows of queries and keys, for rotary positions that turn neighbouring columns; here columns are
turned that are half a head apart, so the rows are put back.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastattn._quantised import Quantised
from fastattn.models import _gguf
from fastattn.models._checkpoint import Checkpoint
from fastattn.models._file import File, Natural, Tensor, one_of, shown, value, within
from fastattn.models._gguf_tokenizer import special_id, tokenizer_of

ARCHITECTURE = "general.architecture"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {  # of a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"  # what the frequencies of rotary positions are divided by
# How Llama 3.1 to 3.3 make these numbers; the factor, 8 or 32, is the largest of them.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def from_gguf(path: Path) -> Checkpoint:
    """Return the checkpoint of a GGUF file, or of all parts of one."""
    metadata, tensors = _read(path)
    with within(path):
        kind = one_of(ARCHITECTURE, value(metadata, ARCHITECTURE, str), ARCHITECTURES)
        if (words := tensors.get("token_embd.weight")) is None:
            raise ValueError("tensors are missing: token_embd.weight")
        if len(words.shape) != 2:
            rule = "tensor 'token_embd.weight' must have two axes"
            raise ValueError(f"{rule}, got shape {words.shape}")
        config = _config(kind, metadata, tensors)
        tokenizer = tokenizer_of(metadata, config["vocab_size"])
        ids = {x: special_id(metadata, x) for x in ("bos", "eos", "eot", "eom", "unknown")}
        template = value(metadata, "tokenizer.chat_template", str, None)
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {"bos_token": ids["bos"], "eos_token": ids["eos"], "unk_token": ids["unknown"]}
    return Checkpoint(
        path,
        path,
        config,
        _renamed(kind, config, tensors),
        tokenizer,
        None,
        "right",
        template,
        {name: tokens[i] for name, i in named.items() if i is not None},
        frozenset(i for x in ("eos", "eot", "eom") if (i := ids[x]) is not None),
    )


def _read(path: Path) -> File:
    """Return what a file holds, or its parts together: the first has all metadata."""
    paths = [path]
    if (part := PART.fullmatch(path.name)) and int(part[3]):
        count = range(1, int(part[3]) + 1)
        paths = [path.with_name(f"{part[1]}-{i:05}-of-{part[3]}{part[4]}") for i in count]
    tensors: dict[str, Tensor] = {}
    for x in paths:
        if not x.is_file():
            raise ValueError(f"{x}: this part must be beside the others, and is not")
        found = _gguf.read(x)
        if double := sorted(tensors.keys() & found.tensors.keys()):
            raise ValueError(f"{x}: tensor {double[0]!r} must be in one part alone")
        tensors |= found.tensors
        if x == paths[0]:
            metadata = found.metadata
            with within(x):
                if (said := value(metadata, "split.count", Natural, 1) or 1) != len(paths):
                    rule = f"split.count must be {len(paths)} by the file's name"
                    raise ValueError(f"{rule}, got {said}")
    return File(metadata, tensors)


def _config(
    kind: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the keys and values that config.json would have."""

    def get(key: str, of: Any, *default: Any) -> Any:
        return value(metadata, f"{kind}.{key}", of, *default)

    if experts := get("expert_count", Natural, 0):
        raise ValueError(f"{kind}.expert_count must be 0, got {experts}")
    hidden, heads = get("embedding_length", int), get("attention.head_count", int)
    head = get("attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := get(key, int, head)) != head:
            raise ValueError(f"{kind}.{key} must be a head's columns, {head}, got {found}")
    base = get("rope.freq_base", float, 10000.0)
    return {
        "model_type": kind,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head,
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": {"rope_theta": base} | _scaling(kind, metadata, tensors, base, head),
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _scaling(
    kind: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: float,
    head: int,
) -> dict[str, Any]:
    """Return how the frequencies of rotary positions are scaled, in the keys of config.json."""
    key = f"{kind}.rope.scaling"
    form = one_of(f"{key}.type", metadata.get(f"{key}.type", "none"), ("none", "linear"))
    if (factors := tensors.get(FREQUENCIES)) is not None:
        if form != "none":
            raise ValueError(
                f"{key}.type must be 'none' beside {FREQUENCIES}, got {shown.repr(form)}"
            )
        return _of_llama3(factors, base, head)
    if form == "none":
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": value(metadata, f"{key}.factor", float)}


def _of_llama3(factors: Tensor, base: float, head: int) -> dict[str, Any]:
    """Return the keys that frequencies are divided by these numbers for, if LLAMA3 are."""
    if isinstance(factors, np.ndarray) and factors.shape == (head // 2,) and base >= 1:
        low, high, length = LLAMA3.values()
        turns = length * base ** (-np.arange(0, head, 2) / head) / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        largest = float(factors.max())
        if 1 <= largest < 1e6 and np.allclose(
            factors, 1 / (kept + (1 - kept) / largest), rtol=1e-5, atol=0
        ):
            return {"rope_type": "llama3", "factor": largest, **LLAMA3}
    raise ValueError(f"tensor '{FREQUENCIES}' must be as of Llama 3.1, and is not")


def _renamed(
    kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors under the names, and with the rows, that Hugging Face has."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for name, x in tensors.items():
        if name == FREQUENCIES:
            continue
        module, _, part = name.rpartition(".")
        if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
            if kind == "llama" and layer[2] in heads:
                x = _reordered(x, heads[layer[2]], config["head_dim"])
            inside = INSIDE.get(layer[2], layer[2])
            module = f"model.layers.{layer[1]}.{inside}"
        found[f"{OUTSIDE.get(module, module)}.{part}"] = x
    return found


def _reordered(x: Tensor, heads: int, head: int) -> Tensor:
    """Return rows of heads, the even ones of each before the odd ones; other shapes as they are."""
    if x.shape[:1] != (heads * head,) or head % 2:
        return x
    order = np.arange(heads * head).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if isinstance(x, Quantised):
        return dataclasses.replace(x, blocks=x.blocks[order])
    return x[order]
