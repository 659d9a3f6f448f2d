# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of decoders with random weights, what transformers says of them, and ways to read."""

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models


def write(folder, config, dtype="float32"):
    """Write a checkpoint of transformers whose every weight is random, and whose words are w0..."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for x in model.parameters():
        x.data += 0.2 * torch.randn(x.shape)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, "w0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    return folder


def of_transformers(folder, ids):
    """Return the logits that transformers computes in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    )
    with torch.inference_mode():
        return model.eval()(torch.tensor(ids)[None]).logits[0].numpy()


def check_logits(folder, ids):
    """Check that a text of 90 tokens gives the logits of transformers, however it is read."""
    model, expected = models.load(folder), of_transformers(folder, ids)
    whole = model.logits(ids)
    for size in (None, 1, 7):
        found = alone(model._model, ids, size)
        assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
    for size in (None, 30):
        assert_array_equal(alone(model._model, ids, size), whole)


def check_sequences(folder, ids):
    """Check that sequences which are read together have the logits, to the bit, that each has."""
    model = models.load(folder)._model
    together, alone = model.context(4), [model.context(1) for _ in range(4)]

    def step(*counts):
        texts = np.split(ids[: sum(counts)], np.cumsum(counts))[:-1]
        for context, text, found in zip(alone, texts, read(model, together, texts), strict=True):
            if len(text):
                assert_array_equal(found, read(model, context, [text])[0])

    step(40, 1, 20, 3)
    step(1, 1, 1, 1)
    step(0, 0, 2, 1)
    step(2, 2, 2, 2)
    together.reorder([0, 3])
    alone = [alone[0], alone[3]]
    step(1, 1)
    step(0, 5)
    assert together.lengths.tolist() == [44, 13]


def read(model, context, texts):
    """Return the logits behind each token of further texts of a context's sequences."""
    context.feed([len(x) for x in texts])
    logits = model.head(model(np.concatenate(texts), context))
    return np.split(logits, np.cumsum([len(x) for x in texts])[:-1])


def alone(model, ids, size=None):
    """Return the logits behind each token of a text that is read in parts of that size."""
    context, size = model.context(1), size or len(ids)
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    return np.concatenate([read(model, context, [x])[0] for x in parts])
