#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A translator from nothing: it learns to say Russian numbers in English, then runs without torch.

    pip install ".[models,plot]" torch==2.13.0 transformers==5.24.0 sentencepiece num2words
    python examples/translate_numbers.py

A small Marian learns 20,000 of the numbers from 0 to 999,999, with the gradients of fastattn, in
minutes on two cores. It is kept as a folder of Hugging Face, with the tokens that SentencePiece
finds; where the folder is there, nothing is trained. From there on fastattn.models alone translates
1,000 numbers that were not learned, by the likeliest token and by beams, and draws where the
decoder looks. The exit status is 1 if less than 95 % are exact.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import fastattn.models
from fastattn import maps

if TYPE_CHECKING:
    from torch import Tensor

LARGEST, TRAINED, NEW = 999_999, 20_000, 1_000
SIZES = dict(d_model=128, encoder_layers=2, decoder_layers=2, max_position_embeddings=128)
SIZES |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
SIZES |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 384)
PIECES = 120  # at most, of each language
BATCH, RATE, WARM = 128, 2e-3, 200
SHOWN = "четыреста пятьдесят одна тысяча девятьсот двадцать семь"


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return numbers in Russian and English words: those to learn, and others."""
    from num2words import num2words

    numbers = random.Random(0).sample(range(LARGEST + 1), TRAINED + NEW)
    said = [(num2words(n, lang="ru"), num2words(n, lang="en")) for n in numbers]
    return said[:TRAINED], said[TRAINED:]


def write_tokenizer(folder: Path, learned: list[tuple[str, str]]) -> None:
    """Write the files of Marian's tokenizer."""
    import sentencepiece

    known = {"</s>": 0, "<unk>": 1}
    for name, texts in zip(("source", "target"), zip(*learned, strict=True), strict=True):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=PIECES,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / f"{name}.spm").write_bytes(model.getvalue())
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for i in range(3, pieces.get_piece_size()):  # behind those that stand for no text
            known.setdefault(pieces.id_to_piece(i), len(known))
    known["<pad>"] = len(known)
    (folder / "vocab.json").write_text(json.dumps(known, ensure_ascii=False))


def train(folder: Path, epochs: int) -> None:
    """Write a folder with a translator that has learned numbers."""
    import torch
    import transformers

    import fastattn.transformers

    torch.manual_seed(0)
    fastattn.transformers.register()
    learned, _ = pairs()
    write_tokenizer(folder, learned)
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = transformers.MarianConfig(
        vocab_size=len(tokenizer),
        eos_token_id=end,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        forced_eos_token_id=end,
        scale_embedding=True,
        activation_function="swish",
        **SIZES,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="fastattn")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    texts, translations = (list(x) for x in zip(*learned, strict=True))
    sources = [torch.tensor(x) for x in tokenizer(texts).input_ids]
    targets = [torch.tensor(x) for x in tokenizer(text_target=translations).input_ids]

    def padded(ids: list[Tensor], chosen: list[int]) -> Tensor:
        """Return a batch, one row for each text."""
        rows = [ids[i] for i in chosen]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    steps, begin = epochs * (TRAINED // BATCH), time.perf_counter()
    for step in range(steps):
        place = step % (TRAINED // BATCH) * BATCH
        if place == 0:
            order = torch.randperm(TRAINED).tolist()
        chosen = order[place : place + BATCH]
        source, target = padded(sources, chosen), padded(targets, chosen)
        labels = target.masked_fill(target == pad, -100)  # which the loss leaves out
        loss = model(input_ids=source, attention_mask=source != pad, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        slowly = min(1, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * slowly
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - begin
            show(f"step {step + 1} of {steps}: loss {loss:.4f}, {seconds:.0f} s")
    model.generation_config.update(num_beams=4, max_length=SIZES["max_position_embeddings"])
    model.generation_config.bad_words_ids = [[pad]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def show(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main() -> int:
    """Train where there is no folder yet, translate, draw; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("numbers-ru-en"))
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    folder: Path = options.folder
    if not folder.exists():
        beside = folder.with_name(f".{folder.name}")  # What is interrupted leaves no half of it.
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        train(beside, options.epochs)
        beside.rename(folder)
    model = fastattn.models.load(folder)
    _, new = pairs()
    texts, expected = zip(*new, strict=True)
    shares = []
    for beams in (1, 4):
        begin = time.perf_counter()
        found = model.translate(texts, beams=beams)
        seconds = time.perf_counter() - begin
        shares.append(sum(a == b for a, b in zip(found, expected, strict=True)) / NEW)
        show(f"{beams} beams: {shares[-1]:.1%} of {NEW} are exact, {NEW / seconds:.0f} texts/s")
    for best in model.translate([SHOWN], n_best=2)[0]:
        show(f"{best.score:8.4f}  {best.text}")
    found = maps.show(model, SHOWN, layers=SIZES["decoder_layers"] - 1)
    show(str(found))
    found.save(folder.with_suffix(".png"))
    return int(min(shares) < 0.95)


if __name__ == "__main__":
    sys.exit(main())
