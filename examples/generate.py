#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A Transformer writes word by word; each layer keeps its keys and values in a KVCache.

    pip install .
    python examples/generate.py

The weights are random, so that the words mean nothing; trained_decoder.py beside it, and
docs/models.md, have trained ones. The loop is that of a real model: it reads the prompt at once,
then one new word a step. In the end a second model of the same weights reads the whole text at
once, and finds the same probabilities.
"""

import numpy as np

import fastattn

WORDS = ["the", "a", "small", "old", "river", "stone", "bird", "cloud", "sings", "sleeps", "and"]
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
WIDTH = Q_HEADS * HEAD_DIM
SLOPES = 2.0 ** -np.arange(1, Q_HEADS + 1)  # ALiBi: the farther away a word, the lower its score


def norm(x):
    """Return rows whose mean square is 1."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True))


class Model:
    """Layers of attention and a feed-forward network, which remember what they have read."""

    def __init__(self):
        rng = np.random.default_rng(0)
        shapes = [(WIDTH, WIDTH + 2 * KV_HEADS * HEAD_DIM), (WIDTH, WIDTH)]  # of attention
        shapes += [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]  # of the feed-forward network
        self.weights = [
            [rng.standard_normal(shape, np.float32) * shape[0] ** -0.5 for shape in shapes]
            for _ in range(LAYERS)
        ]
        self.caches = [fastattn.KVCache(1, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]
        self.vectors, self.scores = rng.standard_normal((2, len(WORDS), WIDTH), np.float32)

    def read(self, words):
        """Read new words, and return the probabilities of the word that follows the last one."""
        x = self.vectors[words]  # (length, WIDTH)
        for (to_heads, from_heads, up, down), cache in zip(self.weights, self.caches, strict=True):
            heads = (norm(x) @ to_heads).reshape(1, len(x), -1, HEAD_DIM).swapaxes(1, 2)
            query, key, value = np.split(heads, [Q_HEADS, Q_HEADS + KV_HEADS], axis=1)
            cache.append(key, value)
            mixed = cache.attend(query, alibi_slopes=SLOPES)  # over all words so far
            x = x + mixed.swapaxes(1, 2).reshape(x.shape) @ from_heads
            x = x + np.maximum(norm(x) @ up, 0) @ down
        chances = np.exp(norm(x[-1]) @ self.scores.T * WIDTH**-0.5)
        return chances / chances.sum()


model, rng = Model(), np.random.default_rng(0)
text = [WORDS.index(word) for word in ("the", "old", "bird")]
chances = model.read(text)  # the prompt
for _ in range(20):
    text.append(int(rng.choice(len(WORDS), p=chances)))
    chances = model.read(text[-1:])  # one word; the caches hold what came before

print(" ".join(WORDS[word] for word in text))
print(f"kept of each layer: {model.caches[0].lengths[0]} words, {model.caches[0].nbytes} bytes")
difference = abs(Model().read(text) - chances).max()
print(f"largest difference from reading the whole text at once: {difference:.1e}")
