# SPDX-License-Identifier: Apache-2.0
"""What does a checkpoint hold? Its configuration, tensors, tokenizer, and what a chat needs.

Here it is read of a folder as Hugging Face lays it out; `_from_gguf` reads it of a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn.models import _safetensors
from fastattn.models._file import Tensor, shown, within
from fastattn.models._quantised import Quantised

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token")
HUGE = 10**9  # tokens: tokenizers without a limit have it at 1e30


class Checkpoint(NamedTuple):
    """What a checkpoint holds, under the names of Hugging Face whatever its files are."""

    place: Path  # the folder or the file, for errors
    config: Mapping[str, Any]  # as of config.json
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    max_length: int | None  # tokens that the tokenizer is made for
    chat_template: str | None
    special: Mapping[str, str]  # the special tokens that a template may name
    stop_ids: frozenset[int]  # tokens that end a text


def from_folder(folder: Path) -> Checkpoint:
    """Return the checkpoint of a folder with config.json, tokenizer.json and safetensors."""
    with within(folder / "config.json"):
        config = json_object(folder / "config.json")
    tensors = _safetensors.read(folder).tensors
    with within(folder / "tokenizer.json"):
        tokenizer = _tokenizer(folder / "tokenizer.json")
    with within(folder / "special_tokens_map.json"):
        special = _special(json_object(folder / "special_tokens_map.json", {}))
    with within(folder / "tokenizer_config.json"):
        stated = json_object(folder / "tokenizer_config.json", {})
        special |= _special(stated)
        max_length = _max_length(stated.get("model_max_length"))
        template = _template(stated.get("chat_template"))
        ends = {x: stated.get(f"add_{x}_token") for x in ("bos", "eos")}
        if set(ends.values()) != {None}:
            named = (special.get(f"{x}_token") if wanted else None for x, wanted in ends.items())
            add_ends(tokenizer, *named)
    if (folder / "chat_template.jinja").is_file():
        with within(folder / "chat_template.jinja"):
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    with within(folder / "generation_config.json"):
        stops = _ids(json_object(folder / "generation_config.json", {}).get("eos_token_id"))
    with within(folder / "config.json"):
        stops = stops or _ids(config.get("eos_token_id"))
    if not stops and "eos_token" in special:
        stops = _ids(tokenizer.token_to_id(special["eos_token"]))
    return Checkpoint(folder, config, tensors, tokenizer, max_length, template, special, stops)


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


def json_object(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object of a file, or what stands for it where there is none."""
    if absent is not None and not path.exists():
        return absent
    found = json_value(path)
    if not isinstance(found, dict):
        raise ValueError(f"it must hold an object, got {type(found).__name__}")
    return found


def json_value(path: Path) -> Any:
    """Return what the JSON of a file says."""
    if not path.is_file():
        raise ValueError("the folder must hold this file, and does not")
    try:
        return json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"it must hold JSON: {error}") from error


def import_tokenizers() -> Any:
    """Return the package tokenizers, which the extra `models` brings."""
    try:
        import tokenizers
    except ImportError:
        absent = "models need the package tokenizers: pip install fastattn[models]"
        raise ModuleNotFoundError(absent, name="tokenizers") from None
    return tokenizers


def add_ends(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let a tokenizer put these tokens around a text, and no others."""
    sides = {"bos": bos, "eos": eos}
    named = []
    for side, token in sides.items():
        if token is not None:
            if (found := tokenizer.token_to_id(token)) is None:
                rule = f"{side}_token must be a token of the vocabulary"
                raise ValueError(f"{rule}, got {shown.repr(token)}")
            named.append({"id": side, "ids": [found], "tokens": [token]})
    single = [x for x in ("bos", "$A", "eos") if sides.get(x, x) is not None]
    processors = import_tokenizers().processors
    tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=named)


def _tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a file."""
    tokenizers = import_tokenizers()
    if not path.is_file():
        raise ValueError("the folder must hold this file, and does not")
    try:
        tokenizer: Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.encode("a")  # Parts that do not fit together panic, which is no Exception.
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"it must be of the format of tokenizers: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special(stated: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a file names, as strings or as objects."""
    found = {}
    for name in SPECIAL:
        token = stated.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            if not isinstance(token, str):
                raise ValueError(f"{name} must be a string, got {shown.repr(token)}")
            found[name] = token
    return found


def _max_length(stated: Any) -> int | None:
    """Return the most tokens of a text, if a tokenizer's configuration limits them."""
    if stated is None or (type(stated) in (int, float) and stated > HUGE):
        return None
    if type(stated) is not int or stated < 1:
        raise ValueError(f"model_max_length must be an integer >= 1, got {shown.repr(stated)}")
    return stated


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
    if not all(type(x) is int and x >= 0 for x in listed):
        rule = "eos_token_id must be an integer >= 0, or a list of them"
        raise ValueError(f"{rule}, got {shown.repr(stated)}")
    return frozenset(listed)


def _some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
