# SPDX-License-Identifier: Apache-2.0
"""What does a checkpoint hold? Its configuration, tensors, tokenizer, and what a chat needs.

Here it is read of a folder as Hugging Face lays it out; `_from_gguf` reads it of a GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._quantised import Quantised
from fastattn.models import _safetensors
from fastattn.models._file import (
    Natural,
    Tensor,
    check,
    content,
    json_object,
    one_of,
    shown,
    value,
    within,
)
from fastattn.models._sentencepiece import SOURCE, sentence_pieces
from fastattn.models._tokens import tokenizer_from

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token")
NORMALIZER = {  # keys of BERT's tokenizers, and what tokenizer.json calls them
    **{"do_lower_case": "lowercase", "strip_accents": "strip_accents"},
    "tokenize_chinese_chars": "handle_chinese_chars",
}
HUGE = 10**9  # tokens: tokenizers without a limit have it at 1e30


class Checkpoint(NamedTuple):
    """What a checkpoint holds, under the names of Hugging Face whatever its files are."""

    place: Path  # the folder or the file, for errors
    config_place: Path  # the file that says `config`
    config: Mapping[str, Any]  # as of config.json
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    max_length: int | None = None  # tokens that the tokenizer is made for
    truncation_side: str = "right"  # of a text that is too long, where it is cut: left or right
    chat_template: str | None = None
    special: Mapping[str, str] = MappingProxyType({})  # the special tokens that a template may name
    stop_ids: frozenset[int] = frozenset()  # tokens that end a text
    generation: Mapping[str, Any] = MappingProxyType({})  # as of generation_config.json
    generation_place: Path | None = None  # the file that says `generation`
    encoder: Mapping[str, Any] = MappingProxyType({})  # options of `Encoder` that no file says


def from_folder(folder: Path) -> Checkpoint:
    """Return the checkpoint of a folder with config.json, tokenizer.json and safetensors."""
    with within(folder / "config.json"):
        config = json_object(folder / "config.json")
    tensors = _safetensors.read(folder).tensors
    tokenizer, usual_side = _tokenizer(folder)
    with within(folder / "special_tokens_map.json"):
        special = _special(json_object(folder / "special_tokens_map.json", {}))
    with within(folder / "tokenizer_config.json"):
        stated = json_object(folder / "tokenizer_config.json", {})
        special |= _special(stated)
        max_length = _max_length(stated.get("model_max_length"))
        side = value(stated, "truncation_side", str, usual_side)
        side = one_of("truncation_side", side, ("left", "right"))
        template = _template(stated.get("chat_template"))
        _normalize(tokenizer, stated)
    if (folder / "chat_template.jinja").is_file():
        with within(folder / "chat_template.jinja"):
            template = content(folder / "chat_template.jinja").decode()
    with within(folder / "generation_config.json"):
        generation = json_object(folder / "generation_config.json", {})
        stops = _ids(generation.get("eos_token_id"))
    with within(folder / "config.json"):
        stops = stops or _ids(config.get("eos_token_id"))
    if not stops and "eos_token" in special:
        stops = _ids(tokenizer.token_to_id(special["eos_token"]))
    return Checkpoint(
        folder,
        folder / "config.json",
        config,
        tensors,
        tokenizer,
        max_length,
        side,
        template,
        special,
        stops,
        generation,
        folder / "generation_config.json",
    )


def _tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    """Return the tokenizer of a folder, and on which side it cuts what is too long."""
    if (folder / SOURCE).is_file():
        return sentence_pieces(folder), "right"
    with within(folder / "tokenizer.json"):
        tokenizer = tokenizer_from(content(folder / "tokenizer.json"))
        side = (tokenizer.truncation or {}).get("direction", "right")
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer, side


def checked(
    found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], family: str
) -> dict[str, Tensor]:
    """Return the tensors of these names and shapes: a model's weights, and there are no others.

    Those with two axes, most of all numbers, are as stored; others become float32.
    """
    if missing := sorted(shapes.keys() - found.keys()):
        raise ValueError(f"tensors are missing: {_some(missing)}")
    if unknown := sorted(found.keys() - shapes.keys()):
        raise ValueError(f"tensors are unknown to {family}: {_some(unknown)}")
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        x = found[name]
        if x.shape != shape:
            rule = f"tensor {name} must have shape {shape} by its configuration"
            raise ValueError(f"{rule}, got {x.shape}")
        if isinstance(x, Quantised):
            weights[name] = x if len(shape) == 2 else x.dequantised()
            continue
        if x.dtype.kind in "biu":
            raise ValueError(f"tensor {name} must hold floats, got {x.dtype}")
        kept = len(shape) == 2 and x.dtype.name in ("float32", "float16", "bfloat16")
        weights[name] = np.require(x, x.dtype if kept else np.float32, ["C", "A"])
    return weights


def _special(stated: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a file names, as strings or as objects."""
    found = {}
    for name in SPECIAL:
        token = stated.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            check(name, token, str)
            found[name] = token
    return found


def _max_length(stated: Any) -> int | None:
    """Return the most tokens of a text, if a tokenizer's configuration limits them."""
    if stated is None or (type(stated) in (int, float) and stated > HUGE):
        return None
    check("model_max_length", stated, int)
    return int(stated)


def _normalize(tokenizer: Tokenizer, stated: Mapping[str, Any]) -> None:
    """Let a tokenizer change letters as its configuration says, if it is one of BERT's."""
    for key, name in NORMALIZER.items():
        wanted = value(stated, key, bool, None)
        if wanted is not None and hasattr(tokenizer.normalizer, name):
            setattr(tokenizer.normalizer, name, wanted)


def _template(stated: Any) -> str | None:
    """Return the chat template: the only one, or of several the default one."""
    if stated is None or isinstance(stated, str):
        return stated
    try:
        found = {x["name"]: x["template"] for x in stated}.get("default")
    except (KeyError, TypeError):
        found = stated
    if found is not None and not isinstance(found, str):
        rule = "chat_template must be a string, or a list of objects with name and template"
        raise ValueError(f"{rule}, got {shown.repr(stated)}")
    return found


def _ids(stated: Any) -> frozenset[int]:
    """Return the ids of the tokens that end a text, which are an integer, a list or null."""
    listed = stated if isinstance(stated, list) else [] if stated is None else [stated]
    for x in listed:
        check("eos_token_id", x, Natural)
    return frozenset(listed)


def _some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
