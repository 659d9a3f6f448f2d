# SPDX-License-Identifier: Apache-2.0
"""Folders whose files say what does not fit: a model that runs, or an error that is promised."""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np

from fastattn import models
from fastattn.models import bert, llama
from tests.fuzz.problem import chance, choice, number
from tests.support.safetensors import checkpoint

SIZES = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32}
WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "d"]
FILES = {
    "tokenizer.json": {
        "version": "1.0",
        "truncation": {
            "direction": "Left",
            "max_length": 9,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": [
            {"id": 0, "content": "<s>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
        "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None}
        | {"clean_text": True, "handle_chinese_chars": True},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {x: i for i, x in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    },
    "tokenizer_config.json": {
        **{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 9},
        **{"add_bos_token": True, "add_eos_token": False, "truncation_side": "left"},
        **{"do_lower_case": True, "chat_template": "{{ bos_token }}{{ messages[0].content }}"},
    },
    "special_tokens_map.json": {"unk_token": "<unk>", "eos_token": "</s>"},
    "generation_config.json": {"eos_token_id": [1, 2]},
}
ENCODERS = {
    "modules.json": [
        {"type": f"of.{kind}", "path": path}
        for kind, path in [("Transformer", ""), ("Pooling", "1"), ("Normalize", "2")]
    ],
    "1/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": True},
    "sentence_bert_config.json": {"max_seq_length": 8, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"q": "a "}, "default_prompt_name": "q"},
}
FAMILIES = {
    "llama": (llama.Config, llama.LlamaModel, SIZES, FILES),
    "bert": (bert.Config, bert.BertModel, SIZES | {"type_vocab_size": 2}, FILES | ENCODERS),
}
LIES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**64,
    1e300,
    0.5,
    "",
    "x",
    "\ud800",
    "</s>",
    "left",
)
LIES += ("{{ 1 / 0 }}", "{% for", "a" * 300, [], [1], ["a"], [[]], {}, {"a": 1}, {"type": "x"})


def draw(rng):
    """Draw a family, and what its files say that does not fit."""
    family = choice(rng, [*FAMILIES])
    names = ["config.json", *FAMILIES[family][3]]
    return {
        "family": family,
        "lies": [
            {
                "file": choice(rng, names),
                "data": number(rng),
                "change": choice(rng, ("put", "put", "put", "remove", "add")),
                "lie": int(rng.integers(len(LIES))),
            }
            for _ in range(choice(rng, (0, 1, 1, 1, 2, 3)))
        ],
        "bytes": number(rng) if chance(rng, 0.1) else 0,
    }


def places(x):
    """Yield each object and list within a value, with each of its keys or indices."""
    for key in [*x] if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
        yield x, key
        yield from places(x[key])


def changed(said, lie):
    """Return what a file says, with a lie in it."""
    whole, wrong = {"all": said}, copy.deepcopy(LIES[lie["lie"]])
    found = [*places(whole)]
    inside, key = found[lie["data"] % len(found)]
    if lie["change"] == "remove":
        del inside[key]
    elif lie["change"] == "add" and isinstance(inside, dict):
        inside["x"] = wrong
    else:
        inside[key] = wrong
    return whole.get("all")


def check(spec):
    """Raise if the model does anything but run, or be refused with the name of what is wrong."""
    config, family, stated, files = FAMILIES[spec["family"]]
    files = copy.deepcopy({"config.json": {"model_type": spec["family"], **stated}, **files})
    shapes = family.shapes(config.read(files["config.json"]))
    rng = np.random.default_rng(0)
    weights = {x: ("F32", rng.normal(size=shape).astype("f4")) for x, shape in shapes.items()}
    for lie in spec["lies"]:
        files[lie["file"]] = changed(files[lie["file"]], lie)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.safetensors").write_bytes(checkpoint(weights))
        for file, x in files.items():
            text = bytearray(json.dumps(x).encode())
            if spec["bytes"] and text:
                text[spec["bytes"] % len(text)] = spec["bytes"] % 256
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(text)
        refusal, loaded = "", False
        try:
            model = models.load(folder)
            loaded = True
            runs(model)
        except ValueError as error:
            refusal = str(error)
    assert len(refusal) < 2000, "the error is long"
    assert loaded or refusal.startswith(name), f"an error names no file: {refusal}"
    assert not refusal or spec["lies"] or spec["bytes"], f"a right folder is refused: {refusal}"


def runs(model):
    """Let a model do what it is for."""
    if isinstance(model, models.Encoder):
        rows = model.encode(["a b", "", "the cat \xe9 \U0001f600"])
        assert rows.shape == (3, 16)
        assert len(model.tokenize("a " * 99)) <= model.max_seq_length
        return
    for ids in (model.tokenize("a b z"), model.tokenize("")):
        assert all(0 <= x < model.config.vocab_size for x in ids)
    list(model.generate("a b", max_new_tokens=2))
    if model.chat_template is not None:
        list(model.chat([{"role": "user", "content": "a"}], max_new_tokens=2))
