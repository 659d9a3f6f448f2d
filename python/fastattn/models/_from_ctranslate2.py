# SPDX-License-Identifier: Apache-2.0
"""What does a checkpoint hold that is a folder of CTranslate2? The same, under the usual names.

Such a folder has model.bin, config.json, which says how to write and no sizes, and tokenizer.json.
CTranslate2 has names of its own, and one weight where several products have the same input: their
rows stand one behind the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.models import _ctranslate2
from fastattn.models._checkpoint import Checkpoint
from fastattn.models._file import content, json_object, one_of, value, within
from fastattn.models._tokens import tokenizer_from
from fastattn.models.whisper import check_tokens

MODEL = "model.bin"
KINDS = ("WhisperSpec",)
ATTRIBUTES = {  # the values of the models that are computed, where the file says one
    "decoder/activation": 3,  # GELU
    "decoder/pre_norm": 1,
    "decoder/alibi": 0,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
GENERATION = {  # keys of config.json, and what generation_config.json calls them
    "alignment_heads": "alignment_heads",
    "suppress_ids": "suppress_tokens",
}
OUTSIDE = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
INSIDE = {  # of a layer: one weight may be several
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
ENDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}  # others are called the same
WORDS, PROJECTION = "decoder/embeddings/weight", "decoder/projection/weight"  # one array
LAYER = re.compile(r"(encoder|decoder)/layer_(\d+)/(.+)/(\w+)")


def from_ctranslate2(folder: Path) -> Checkpoint:
    """Return the checkpoint of a folder with model.bin, config.json and tokenizer.json."""
    path = folder / MODEL
    kind, numbers, arrays = _ctranslate2.read(path)
    with within(path):
        one_of("the kind of model", kind, KINDS)
        for name, wanted in ATTRIBUTES.items():
            if (found := numbers.get(name, wanted)) != wanted:
                raise ValueError(f"{name} must be {wanted}, got {found}")
        for name, x in arrays.items():
            if x.dtype.kind == "i":
                raise ValueError(f"variable {name!r} must be floats, not quantised, got {x.dtype}")
        if arrays.get(PROJECTION) is not arrays.get(WORDS):
            raise ValueError(f"{PROJECTION} must be another name of {WORDS}, and is not")
        tensors = dict(_renamed(arrays))
        config = _config(numbers, tensors)
    with within(folder / "config.json"):
        stated = json_object(folder / "config.json")
        check_tokens("suppress_ids", stated.get("suppress_ids"), config["vocab_size"])
    with within(folder / "tokenizer.json"):
        tokenizer = tokenizer_from(content(folder / "tokenizer.json"))
    return Checkpoint(
        place=path,
        config_place=path,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        generation={new: stated[old] for old, new in GENERATION.items() if old in stated},
        generation_place=folder / "config.json",
    )


def _renamed(arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the tensors under the names of Hugging Face, one for each product."""
    for name, x in arrays.items():
        if name == PROJECTION:
            continue
        if (layer := LAYER.fullmatch(name)) and layer[3] in INSIDE:
            side, number, part, end = layer.groups()
            parts = INSIDE[part]
            if len(x) % len(parts):
                rule = f"variable {name!r} must have rows for each of {', '.join(parts)}"
                raise ValueError(f"{rule}, got shape {x.shape}")
            for new, rows in zip(parts, np.split(x, len(parts)), strict=True):
                # A bias of keys adds the same to all scores of a row, and changes no share.
                if not (new.endswith("k_proj") and end == "bias"):
                    yield f"model.{side}.layers.{number}.{new}.{ENDS.get(end, end)}", rows
        else:
            *places, end = name.split("/")
            new = ".".join(OUTSIDE.get(x, x) for x in places)
            yield f"model.{new}.{ENDS.get(end, end)}", x


def _config(numbers: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the keys and values that the config.json of Hugging Face would have."""

    def size(name: str, axis: int) -> int:
        if (found := tensors.get(f"model.{name}.weight")) is None or axis >= found.ndim:
            raise ValueError(f"tensor model.{name}.weight must have an axis {axis}")
        return int(found.shape[axis])

    config = {
        "model_type": "whisper",
        "vocab_size": size("decoder.embed_tokens", 0),
        "d_model": size("decoder.embed_tokens", 1),
        "num_mel_bins": size("encoder.conv1", 1),
        "max_source_positions": size("encoder.embed_positions", 0),
        "max_target_positions": size("decoder.embed_positions", 0),
    }
    for side in ("encoder", "decoder"):
        config[f"{side}_layers"] = len(
            {x.split(".")[3] for x in tensors if f".{side}.layers." in x}
        )
        config[f"{side}_attention_heads"] = value(numbers, f"{side}/num_heads", int)
        config[f"{side}_ffn_dim"] = size(f"{side}.layers.0.fc1", 0)
    return config
