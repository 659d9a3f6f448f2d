# SPDX-License-Identifier: Apache-2.0
"""Sounds: WAV files, words that espeak-ng says; and small models that write down sounds."""

import functools
import shutil
import struct
import subprocess

import numpy as np
import pytest

RATE = 16000
END, START = 256, 257
LANGUAGES = ["en", "de", "ru"]
SPECIAL = ["endoftext", "startoftranscript", *LANGUAGES, "transcribe", "nospeech", "notimestamps"]
ID = {x: END + i for i, x in enumerate(SPECIAL)}
TIMES = END + len(SPECIAL)
SIZES = dict(vocab_size=TIMES + 51, d_model=24, encoder_layers=2, decoder_layers=3)
SIZES |= dict(encoder_attention_heads=3, decoder_attention_heads=4, encoder_ffn_dim=40)
SIZES |= dict(decoder_ffn_dim=56, num_mel_bins=16, max_source_positions=50)
SIZES |= dict(max_target_positions=40, decoder_start_token_id=START)
SIZES |= dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], END)
SUPPRESSED = [3, 7, 11, *range(END + 2, TIMES - 1)]


def wav(data, kind=1, channels=1, rate=RATE, bits=16, size=None, before=b"", behind=b""):
    """Return a WAV file of these bytes of sound; the size that it says of them may be wrong."""
    width = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * width, width, bits)
    size = len(data) if size is None else size
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + before
    chunks += b"data" + struct.pack("<I", size) + data + behind
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@functools.cache
def said(text, voice="en-us"):
    """Return what espeak-ng says, without the silence around it; skip where it is not installed."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    command = ["espeak-ng", "-v", voice, "-s", "130", "--stdout", text]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    rate = int.from_bytes(data[24:28], "little")
    spoken = np.frombuffer(data[44:], "<i2") / 2**15
    times = np.arange(int(len(spoken) * RATE / rate)) / RATE
    found = np.interp(times, np.arange(len(spoken)) / rate, spoken).astype(np.float32)
    loud = np.flatnonzero(abs(found) > 0.01)
    return found[loud[0] : loud[-1] + 1]


def one_by_one(words, seed=0, seconds=None, voice="en-us"):
    """Return words with silences of 0.3 to 0.8 s between them, and when each begins and ends.

    Silence fills the sound up to its seconds.
    """
    rng = np.random.default_rng(seed)
    parts, spans = [np.zeros(RATE // 2, np.float32)], []
    for word in words:
        begin, sound = sum(map(len, parts)), said(word, voice)
        spans.append((begin / RATE, (begin + len(sound)) / RATE))
        parts += [sound, np.zeros(int(rng.uniform(0.3, 0.8) * RATE), np.float32)]
    sound = np.concatenate(parts)
    return np.pad(sound, (0, max(0, (seconds or 0) * RATE - len(sound)))), spans


def write(folder, dtype="float32", seed=0, languages=()):
    """Write a folder of Whisper whose every weight is random, and whose tokens are bytes."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.WhisperConfig(**SIZES)
    model = transformers.WhisperForConditionalGeneration(config)
    for x in model.parameters():
        x.data += 0.2 * torch.randn(x.shape)
    model.generation_config = transformers.GenerationConfig(
        **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], END),
        decoder_start_token_id=START,
        suppress_tokens=SUPPRESSED,
        begin_suppress_tokens=[32, END],
        no_timestamps_token_id=TIMES - 1,
        max_initial_timestamp_index=50,
        is_multilingual=bool(languages),
        **({"lang_to_id": {f"<|{x}|>": ID[x] for x in languages}} if languages else {}),
        task_to_id={"transcribe": ID["transcribe"]},
        alignment_heads=[[1, 0], [2, 3]],
    )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {x: i for i, x in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{x}|>" for x in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
