# SPDX-License-Identifier: Apache-2.0
"""What becomes of a text's hidden states? The files that sentence-transformers adds say it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastattn.models import _safetensors
from fastattn.models._checkpoint import Checkpoint, checked
from fastattn.models._encoder import POOLINGS, Dense
from fastattn.models._family import parameters
from fastattn.models._file import (
    check,
    json_object,
    json_objects,
    one_of,
    shown,
    value,
    within,
)

OLD = {  # a pooling in the keys of older files
    **{"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"},
    "weightedmean": "weightedmean_tokens",
}
TANH = "torch.nn.modules.activation.Tanh"
ACTIVATIONS = {TANH: np.tanh, "torch.nn.modules.linear.Identity": np.positive}
DENSE = {  # what is supported of a projection's other keys
    **{"use_residual": False, "module_input_name": "sentence_embedding"},
    "module_output_name": "sentence_embedding",
}
ORDER = r"Transformer( Pooling( Dense)*( Normalize)?)?"


class Part(NamedTuple):
    """A step of modules.json: what it does, and where its files are."""

    kind: str
    place: Path


def parts(root: Path) -> list[Part]:
    """Return the steps of a model, of which the first is the Transformer."""
    path = root / "modules.json"
    if not path.exists() and not (root / "1_Pooling").exists():
        return [Part("Transformer", root)]
    with within(path):
        listed = json_objects(path)
        kinds = [value(x, "type", str).rpartition(".")[2] for x in listed]
        paths = [value(x, "path", str) for x in listed]
        if not re.fullmatch(ORDER, " ".join(kinds)):
            rule = "Transformer, then Pooling, then any Dense, then Normalize, as many as apply"
            raise ValueError(f"its modules must be {rule}, got {shown.repr(kinds)}")
        for x in paths:
            if x and not re.fullmatch(r"\w[\w.-]{,99}", x):
                raise ValueError(f"path must be a folder beside it, got {shown.repr(x)}")
    return [Part(kind, root / x) for kind, x in zip(kinds, paths, strict=True)]


def options(
    root: Path, steps: list[Part], checkpoint: Checkpoint, longest: int, width: int
) -> dict[str, Any]:
    """Return the options of the `Encoder` whose model takes so many tokens, in states so wide."""
    with within(steps[0].place / "sentence_bert_config.json"):
        sentence = json_object(steps[0].place / "sentence_bert_config.json", {})
        usual = min(checkpoint.max_length or longest, longest)
        limit = value(sentence, "max_seq_length", int, usual)
        least = checkpoint.tokenizer.num_special_tokens_to_add(False) + 1
        if not least <= limit <= longest:
            rule = f"an integer from {least} to {longest}"
            raise ValueError(f"max_seq_length must be {rule}, got {limit}")
        lower_case = value(sentence, "do_lower_case", bool, False)
    prompts, default = _prompts(root / "config_sentence_transformers.json")
    found = {x.kind: x.place / "config.json" for x in steps}
    return {
        "max_seq_length": limit,
        "pooling": _pooling(found["Pooling"], bool(prompts)) if "Pooling" in found else "mean",
        "dense": _dense([x.place for x in steps if x.kind == "Dense"], width),
        "normalize": "Normalize" in found,
        "lower_case": lower_case,
        "prompts": prompts,
        "default_prompt": default,
    }


def _pooling(path: Path, prompted: bool) -> str:
    """Return what makes one vector of a text's tokens, which older files say by a key for each."""
    with within(path):
        stated = json_object(path)
        wanted = stated.get("pooling_mode")
        if wanted is None:
            keys = {f"pooling_mode_{OLD.get(name, name)}": name for name in POOLINGS}
            true = [x for x in stated if x.startswith("pooling_mode_") and stated[x] is True]
            if len(true) != 1 or true[0] not in keys:
                raise ValueError(f"one of {', '.join(keys)} must be true, got {shown.repr(true)}")
            wanted = keys[true[0]]
        wanted = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
        wanted = one_of("pooling_mode", wanted, POOLINGS)
        if prompted and not value(stated, "include_prompt", bool, True):
            raise ValueError("include_prompt must be true where there are prompts")
    return wanted


def _dense(folders: list[Path], width: int) -> list[Dense]:
    """Return the projections of a vector of that width, one after the other."""
    found = []
    for folder in folders:
        with within(folder / "config.json"):
            stated = json_object(folder / "config.json")
            key = "activation_function"
            activation = one_of(key, value(stated, key, str, TANH), ACTIVATIONS)
            for key, only in DENSE.items():
                if (x := stated.get(key, only)) not in (only, None):
                    raise ValueError(f"{key} must be {only!r}, got {shown.repr(x)}")
            if (x := value(stated, "in_features", int)) != width:
                raise ValueError(f"in_features must be {width}, as before it, got {x}")
            out = value(stated, "out_features", int)
            bias = value(stated, "bias", bool, True)
        tensors = _safetensors.read(folder).tensors
        with within(folder):
            weights = checked(tensors, parameters({"linear": (out, width)}, bias=bias), "Dense")
        found.append(Dense(weights, ACTIVATIONS[activation]))
        width = out
    return found


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts by name, and the name of the one that is usual."""
    with within(path):
        stated = json_object(path, {})
        prompts: dict[str, str] = value(stated, "prompts", dict, {})
        for name, prompt in prompts.items():
            check(f"the prompt {shown.repr(name)}", prompt, str)
        default: str | None = value(stated, "default_prompt_name", str, None)
        if default is not None:
            one_of("default_prompt_name", default, prompts)
    return prompts, default
