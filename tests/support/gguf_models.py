# SPDX-License-Identifier: Apache-2.0
"""Metadata of GGUF files of small models: their tokenizers and their sizes."""

import json

KEY = "tokenizer.ggml"
TEXT = "the cat sat on the mat 2026 times, and didn't stir; привет, мир! 你好 😀\n\n"
EMBEDDINGS = {"token_embd.weight": ("F32", (300, 64), bytes(4 * 300 * 64))}


def bytes_metadata(**more):
    """Return a tokenizer of GPT-2's kind, as a file has it: letters for bytes, and some words."""
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=297, initial_alphabet=letters, special_tokens=["<s>"], show_progress=False
    )
    trained.train_from_iterator([TEXT] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "</s>", "<note>"]
    types = [1] * len(tokens)
    types[0], types[-2], types[-1] = 3, 3, 4
    found = {"model": "gpt2", "tokens": tokens, "merges": [" ".join(x) for x in model["merges"]]}
    found |= {"pre": "gpt-2", "token_type": types, "bos_token_id": 0, "add_bos_token": False}
    found |= {"eos_token_id": len(tokens) - 2, **more}
    return {f"{KEY}.{name}": x for name, x in found.items()}


def pieces_metadata(**more):
    """Return a tokenizer of SentencePiece's kind: what merges earlier has a higher score."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, show_progress=False)
    text = (TEXT + "a  aa    aaa --- ------ ").replace(" ", "▁")
    trained.train_from_iterator([text[:-2].replace("😀", "")] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    words = ["".join(x) for x in model["merges"]]
    letters = [x for x in model["vocab"] if x not in words]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1e4] * len(letters)
    found = {"model": "llama", "tokens": tokens, "scores": scores}
    found |= {"token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259), **more}
    return {f"{KEY}.{name}": x for name, x in found.items()}


def small(**changes):
    """Return the metadata of a model without tensors but one; None removes a key."""
    values = {"general.architecture": "llama", "llama.embedding_length": 64}
    values |= {"llama.feed_forward_length": 96, "llama.block_count": 1, "llama.context_length": 99}
    values |= {"llama.attention.head_count": 4, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    values |= bytes_metadata() | changes
    return {name: x for name, x in values.items() if x is not None}
