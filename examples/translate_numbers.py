#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A translator from nothing: it learns to say Russian numbers in English, then runs without torch.

    pip install ".[models,plot]" torch==2.13.0 transformers==5.24.0 sentencepiece num2words
    python examples/translate_numbers.py

A small Marian is trained with the gradients of fastattn on 20,000 numbers from 0 to 999,999, in
words, and kept as a folder of Hugging Face, with the tokens that SentencePiece finds. From there on
fastattn.models alone translates 1,000 numbers that it never saw, by the likeliest token and by
beams, and draws where the decoder looked. The exit status is 1 if less than 95 % are exact.
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

import fastattn.models

TRAINED, NEW = 20_000, 1_000
SIZES = dict(d_model=128, encoder_layers=2, decoder_layers=2, max_position_embeddings=128)
SIZES |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
SIZES |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 384)
PIECES = 120  # at most, of each language
BATCH, RATE = 128, 2e-3
SHOWN = 451_927


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return numbers in Russian and English words: those to learn, and others."""
    from num2words import num2words

    numbers = random.Random(0).sample(range(1_000_000), TRAINED + NEW)
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
    texts, translations = zip(*learned, strict=True)
    sources = tokenizer(list(texts)).input_ids
    targets = tokenizer(text_target=list(translations)).input_ids
    steps = epochs * (TRAINED // BATCH)
    begin = time.perf_counter()
    for step in range(steps):
        place = step % (TRAINED // BATCH)
        if place == 0:
            order = torch.randperm(TRAINED)
        chosen = order[place * BATCH : (place + 1) * BATCH].tolist()
        source, target = (
            torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(ids[i]) for i in chosen], batch_first=True, padding_value=pad
            )
            for ids in (sources, targets)
        )
        labels = target.masked_fill(target == pad, -100)
        loss = model(input_ids=source, attention_mask=source != pad, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = min(1, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            show(
                f"step {step + 1} of {steps}: loss {loss:.4f}, {time.perf_counter() - begin:.0f} s"
            )
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
    parser.add_argument("--epochs", type=int, default=15)
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
    return int(min(shares) < 0.95)


if __name__ == "__main__":
    sys.exit(main())
