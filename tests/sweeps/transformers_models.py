#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every model of transformers that can be built small: its own attention beside ours.

For each kind of model, the base class and the classes that write, with random weights and a config
made small: the outputs of `eager`, and those after `set_attn_implementation("fastattn")` and of a
model that was made with it; `generate` too, where there is one. A model is built in a child process
of its own. The table of results is docs/transformers_models.md::

    python tests/sweeps/transformers_models.py --markdown docs/transformers_models.md

A model that runs and differs from `eager` is a fault, unless it equals `sdpa`, from which eager
differs in rows that see nothing; the exit status says so.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import signal
import sys
import textwrap
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fastattn
import fastattn.transformers

WRITING = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "TEXT_TO_WAVEFORM",
)
SECONDS = 60  # for one class of models
BATCH, LENGTH, VOCABULARY = 2, 13, 128
PADDED = 2  # of the second sequence: fewer than a window, so that each row sees a key
WINDOW = 6
MOST_PARAMETERS = 50_000_000
FIRST_SPECIAL = 100  # tokens from there on mean something to some models
TOLERANCE = 2e-4  # of the largest number
ROUNDING = 2e-3  # likewise: where eager and sdpa differ by half of it, so may ours

# What sizes become: the first pattern that a config's attribute ends with.
SMALL = {
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "d_kv": 8,
    "kv_channels": 8,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "layers": 2,
    "depth": 2,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "d_ff": 48,
    "n_inner": 48,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "hidden_size": 32,
    "hidden_dim": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "projection_dim": 32,
    "dim": 32,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 32,
    "max_target_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": 4,
}
# What stays as it is where a model does not run so small: some sizes are made of others.
LEFT = (
    (),
    ("head_dim", "kv_channels", "d_kv"),
    ("head_dim", "kv_channels", "d_kv", "heads", "head", "multi_query_group_num"),
    ("dim", "kv_channels", "d_kv", "heads", "head", "_size", "d_model", "d_ff", "n_embd"),
)


def small_config(kind: type[PreTrainedConfig], left: tuple[str, ...] = ()) -> PreTrainedConfig:
    """Return a config of that class with few and small layers; names that end in left stay."""
    usual = kind()
    given: dict[str, Any] = {}
    for name, value in usual.to_dict().items():
        part = kind.sub_configs.get(name)
        if part is not None:
            inner = getattr(usual, name)
            if isinstance(inner, PreTrainedConfig):
                given[name] = small_config(type(inner), left).to_dict()
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            found = next((n for end, n in SMALL.items() if name.endswith(end)), None)
            if name.endswith(left) and not name.endswith("vocab_size"):
                continue
            if found is not None and value > found:
                given[name] = found
            elif name.endswith(("token_id", "token_index")) and value >= VOCABULARY:
                given[name] = FIRST_SPECIAL + sum(map(ord, name)) % (VOCABULARY - FIRST_SPECIAL)
    with contextlib.suppress(Exception):  # some classes compute these names from others
        return kind(**given)
    for name, value in given.items():
        if not isinstance(value, dict):
            with contextlib.suppress(Exception):
                setattr(usual, name, value)
    return usual


def classes() -> list[tuple[str, str]]:
    """Return (model_type, name of a class of models) of all that are swept."""
    found = []
    for kind, names in modeling_auto.MODEL_MAPPING_NAMES.items():
        tables = [
            getattr(modeling_auto, f"MODEL_FOR_{writing}_MAPPING_NAMES") for writing in WRITING
        ]
        for entry in (names, *(table.get(kind, ()) for table in tables)):
            for name in (entry,) if isinstance(entry, str) else entry:
                if (kind, name) not in found:
                    found.append((kind, name))
    return found


def inputs_of(model: Any) -> dict[str, Any]:
    """Return what a model may be called with."""
    config = model.config
    names = inspect.signature(model.forward).parameters
    rng = torch.Generator().manual_seed(0)

    def setting(*wanted: str, default: Any = None) -> Any:
        for part in (config, *(getattr(config, p) for p in config.sub_configs)):
            for name in wanted:
                if isinstance(getattr(part, name, None), (int, list, tuple)):
                    return getattr(part, name)
        return default

    def image(*lead: int) -> torch.Tensor:
        size = setting("image_size", "input_size", default=32)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = setting("num_channels", "in_channels", "in_chans", default=3)
        return torch.randn(*lead, channels, height, width, generator=rng)

    text = torch.randint(3, FIRST_SPECIAL, (BATCH, LENGTH), generator=rng)
    padded = torch.ones(BATCH, LENGTH, dtype=torch.long)
    padded[1, -PADDED:] = 0
    given: dict[str, Any] = {}
    main = model.main_input_name
    if "input_ids" in names and main in ("input_ids", "pixel_values", "input_features"):
        given |= {"input_ids": text}
        if "attention_mask" in names:
            given["attention_mask"] = padded
    if ("pixel_values" in names and main == "pixel_values") or "clip" in config.model_type:
        given["pixel_values"] = image(BATCH)
    if main == "pixel_values_videos" or config.model_type in ("vivit", "videomae", "timesformer"):
        frames = setting("num_frames", "frames_per_clip", default=4)
        given.pop("pixel_values", None)
        given[main] = image(BATCH, frames)
    if main == "input_features":
        bins = setting("num_mel_bins", "feature_size", "input_feat_per_channel", default=8)
        given.pop("input_ids", None)
        given.pop("attention_mask", None)
        given["input_features"] = torch.randn(BATCH, bins, 64, generator=rng)
    if main == "input_values":
        given["input_values"] = torch.randn(BATCH, 4000, generator=rng)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        given["decoder_input_ids"] = text[:, :7]
    if "use_cache" in names:
        given["use_cache"] = False
    if "return_loss" in names:
        given["return_loss"] = False
    return given


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors of numbers in what a model returns."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [x for part in output for x in tensors_of(part)]
    return []


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest difference over the largest number; inf for other shapes or NaN."""
    if [x.shape for x in one] != [x.shape for x in other] or not one:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel() == 0:
            continue
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = (x.double().nan_to_num(0, 0, 0) for x in (a, b))
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)))
    return worst


def build(name: str, config: PreTrainedConfig, implementation: str) -> Any:
    """Return a model with the same weights whatever the implementation; attention matters in it."""
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation=implementation)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                scale = parameter[0].numel() ** -0.5 * 1.5
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale)
    return model.eval()


def run(model: Any) -> list[torch.Tensor]:
    """Return the numbers of a call, and of some written tokens if the model writes."""
    with torch.no_grad():
        torch.manual_seed(2)
        given = inputs_of(model)
        found = tensors_of(model(**given))
        if model.can_generate():
            given.pop("decoder_input_ids", None)
            given.pop("use_cache", None)
            given.pop("return_loss", None)
            if "attention_mask" in given:
                given["attention_mask"] = given["attention_mask"].flip(-1)
            torch.manual_seed(2)
            written = model.generate(
                **given,
                do_sample=False,
                max_new_tokens=5,
                min_new_tokens=5,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found += [x for x in written.logits or ()]
    return found


def result(kind: str, name: str) -> dict[str, Any]:
    """Return what happens to a class of models."""
    warnings.simplefilter("ignore")
    calls = 0
    attend = fastattn.transformers._attention.attention

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return attend(*arguments, **keywords)

    transformers.AttentionInterface.register("fastattn", counted)
    eager, why, config = None, "", None
    for left in LEFT:
        try:
            config = small_config(CONFIG_MAPPING[kind], left)
            with torch.device("meta"):
                size = sum(p.numel() for p in getattr(transformers, name)(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size:,} parameters")
            model = build(name, small_config(CONFIG_MAPPING[kind], left), "eager")
            eager = run(model)
            break
        except Exception as error:
            why = why or said(error)
    if eager is None:
        return {"status": "cannot be made", "why": why}
    found: dict[str, Any] = {}
    try:
        model.set_attn_implementation("fastattn")
        found["set"] = "accepted"
        if model.config._attn_implementation != "fastattn":
            found["set"] = "ignored"
    except Exception as error:
        found["set"] = said(error)
    made = None
    try:
        made = build(name, small_config(CONFIG_MAPPING[kind], left), "fastattn")
        found["made"] = "accepted"
    except Exception as error:
        found["made"] = said(error)
    accepted = {way for way in ("set", "made") if found[way] == "accepted"}
    refused = {way for way in ("set", "made") if found[way].startswith("ValueError")}
    if not accepted:
        clear = "made" in refused and (found["set"] == "ignored" or "set" in refused)
        return found | {"status": "refused" if clear else "unclear error", "why": found["made"]}
    for way in sorted(accepted):
        calls = 0
        try:
            ours = run(model if way == "set" else made)
        except Exception as error:
            status = "refused when run" if "fastattn" in str(error) else "fails"
            return found | {"status": status, "why": said(error)}
        found[f"calls {way}"] = calls
        found[f"difference {way}"] = difference(eager, ours)
    worst = max(found[f"difference {way}"] for way in accepted)
    if worst <= TOLERANCE:
        status = "equal" if calls else "equal, without attention"
    else:
        status = "differs"
        with contextlib.suppress(Exception):
            model.set_attn_implementation("sdpa")
            theirs = run(model)
            found["difference sdpa"] = difference(theirs, ours)
            found["eager and sdpa"] = difference(eager, theirs)
            if found["difference sdpa"] <= TOLERANCE:
                status = "equal to sdpa"
            elif worst <= 2 * found["eager and sdpa"] <= ROUNDING:
                status = "equal"
    if len(accepted) == 1:
        found["why"] = f"accepted when {accepted.pop()} alone"
    return found | {"status": status}


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def in_a_child(kind: str, name: str) -> dict[str, Any]:
    """Return `result` of a process that may die."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            found = result(kind, name)
        except BaseException:
            found = {"status": "fails", "why": traceback.format_exc()[-400:]}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = "too slow" if number == signal.SIGALRM else f"killed by signal {number}"
        return {"status": "cannot be made" if number == signal.SIGALRM else "killed", "why": why}
    return json.loads(text)  # type: ignore[no-any-return]


FAULTS = ("differs", "killed", "unclear error", "fails")
MEANINGS = {
    "equal": "the same numbers as `eager`",
    "equal, without attention": "the same numbers; no layer asks for attention",
    "equal to sdpa": "the same numbers as `sdpa`; `eager` differs in rows that see nothing",
    "refused": "ValueError when made and by `set_attn_implementation`",
    "refused when run": "NotImplementedError",
    "differs": "other numbers without an error",
    "fails": "another error",
    "unclear error": "another error when made or told",
    "killed": "the process died",
    "cannot be made": "not so small, or not called with what the script knows",
}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return what was found as a page: how many, and which, by status."""
    by_status: dict[str, list[str]] = {}
    for one, what in found.items():
        by_status.setdefault(what["status"], []).append(one.partition(" ")[2])
    errors = [
        what[f"difference {way}"]
        for what in found.values()
        for way in ("set", "made")
        if what["status"] == "equal" and f"difference {way}" in what
    ]
    lines = [
        "# Every model of transformers that can be built small",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}: each class of models",
        "with a small config and random weights, a call and, where the model writes, five tokens,",
        f"`eager` beside `fastattn`. The largest difference is {max(errors, default=0.0):.1e} of",
        f"the largest number; {TOLERANCE:.0e} is allowed, or twice what `eager` and `sdpa` differ",
        f"by if that is at most {ROUNDING:.0e}.",
        "`python tests/sweeps/transformers_models.py --markdown docs/transformers_models.md`",
        "writes this page.",
        "",
        "| classes | result | meaning |",
        "|---:|---|---|",
    ]
    order = [status for status in MEANINGS if status in by_status or status in FAULTS]
    lines += [
        f"| {len(by_status.get(status, ()))} | {status} | {MEANINGS[status]} |" for status in order
    ]
    for status in order:
        if status in by_status:
            names = ", ".join(sorted(set(by_status[status])))
            lines += ["", f"## {status.capitalize()}", *textwrap.wrap(names, 110)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="classes with this in their name")
    parser.add_argument("--part", default="0/1", help="K/N: each N-th class from K on")
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--join", type=Path, nargs="*", help="JSON files to read, not to run")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(60)
    torch.set_num_threads(1)
    fastattn.set_num_threads(1)
    fastattn.transformers.register()
    found: dict[str, dict[str, Any]] = {}
    for path in asked.join or ():
        found |= json.loads(path.read_text())
    if not asked.join:
        part, parts = map(int, asked.part.split("/"))
        start = time.monotonic()
        for kind, name in [x for x in classes() if asked.only in x[1]][part::parts]:
            found[f"{kind} {name}"] = one = in_a_child(kind, name)
            print(f"{time.monotonic() - start:6.0f} s  {kind} {name}: {one}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    text = table(found)
    print(text.partition("\n## ")[0])
    if asked.markdown:
        asked.markdown.write_text(text)
    return int(any(one["status"] in FAULTS for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
