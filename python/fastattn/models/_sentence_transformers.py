# SPDX-License-Identifier: Apache-2.0
"""What becomes of a text's hidden states? The files that sentence-transformers adds say it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastattn.models import _safetensors
from fastattn.models._checkpoint import Checkpoint, checked, json_object, json_value
from fastattn.models._encoder import POOLINGS, Dense
from fastattn.models._family import parameters
from fastattn.models._file import within

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
    """A step of modules.json: what it does, and the folder of its files."""

    kind: str
    folder: Path


def parts(root: Path) -> list[Part]:
    """Return the steps of a model, of which the first is the Transformer."""
    path = root / "modules.json"
    if not path.exists():
        return [Part("Transformer", root)]
    with within(path):
        listed = json_value(path)
        try:
            kinds = [x["type"].rpartition(".")[2] for x in listed]
            inside = all(x["path"] == "" or re.fullmatch(r"\w[\w.-]*", x["path"]) for x in listed)
        except (AttributeError, KeyError, TypeError):
            raise ValueError("it must be a list of objects with type and path") from None
        if not re.fullmatch(ORDER, " ".join(kinds)):
            rule = "Transformer, then Pooling, then any Dense, then Normalize, as many as apply"
            raise ValueError(f"its modules must be {rule}, got {', '.join(kinds)}")
        if not inside:
            raise ValueError(f"path must be a folder beside it, got {[x['path'] for x in listed]}")
    return [Part(kind, root / x["path"]) for kind, x in zip(kinds, listed, strict=True)]


def options(
    root: Path, steps: list[Part], checkpoint: Checkpoint, longest: int, width: int
) -> dict[str, Any]:
    """Return the options of the `Encoder` whose model takes so many tokens, in states so wide."""
    with within(steps[0].folder / "sentence_bert_config.json"):
        sentence = json_object(steps[0].folder / "sentence_bert_config.json", {})
        limit = sentence.get("max_seq_length")
        if limit is None:
            limit = min(checkpoint.max_length or longest, longest)
        least = checkpoint.tokenizer.num_special_tokens_to_add(False) + 1
        if type(limit) is not int or not least <= limit <= longest:
            rule = f"an integer from {least} to {longest}"
            raise ValueError(f"max_seq_length must be {rule}, got {limit!r}")
    prompts, default = _prompts(root / "config_sentence_transformers.json")
    found = {x.kind: x.folder / "config.json" for x in steps}
    return {
        "max_seq_length": limit,
        "pooling": _pooling(found["Pooling"], bool(prompts)) if "Pooling" in found else "mean",
        "dense": _dense(steps, width),
        "normalize": "Normalize" in found,
        "lower_case": bool(sentence.get("do_lower_case", False)),
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
                raise ValueError(f"one of {', '.join(keys)} must be true, got {true}")
            wanted = keys[true[0]]
        wanted = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
        if not isinstance(wanted, str) or wanted not in POOLINGS:
            raise ValueError(f"pooling_mode must be one of {', '.join(POOLINGS)}, got {wanted!r}")
        if prompted and stated.get("include_prompt", True) is not True:
            raise ValueError("include_prompt must be true where there are prompts")
    return wanted


def _dense(steps: list[Part], width: int) -> list[Dense]:
    """Return the projections of a vector of that width, one after the other."""
    found = []
    for folder in (x.folder for x in steps if x.kind == "Dense"):
        path = folder / "config.json"
        with within(path):
            stated = json_object(path)
            activation = stated.get("activation_function", TANH)
            if not isinstance(activation, str) or activation not in ACTIVATIONS:
                rule = f"one of {', '.join(ACTIVATIONS)}"
                raise ValueError(f"activation_function must be {rule}, got {activation!r}")
            for key, only in DENSE.items():
                if (x := stated.get(key, only)) not in (only, None):
                    raise ValueError(f"{key} must be {only!r}, got {x!r}")
            if (x := stated.get("in_features")) != width:
                raise ValueError(f"in_features must be {width}, as before it, got {x!r}")
            if type(out := stated.get("out_features")) is not int or out < 1:
                raise ValueError(f"out_features must be an integer >= 1, got {out!r}")
        shapes = parameters({"linear": (out, width)}, bias=bool(stated.get("bias", True)))
        tensors = _safetensors.read(folder).tensors
        with within(folder):
            weights = checked(tensors, shapes, "Dense")
        found.append(Dense(weights, ACTIVATIONS[activation]))
        width = out
    return found


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """Return the prompts by name, and the name of the one that is usual."""
    with within(path):
        stated = json_object(path, {})
        prompts, default = stated.get("prompts") or {}, stated.get("default_prompt_name")
        if not isinstance(prompts, dict) or not all(isinstance(x, str) for x in prompts.values()):
            raise ValueError(f"prompts must be an object of strings, got {prompts!r}")
        if default is not None and default not in list(prompts):
            raise ValueError(f"default_prompt_name must be one of {list(prompts)}, got {default!r}")
    return prompts, default
