# SPDX-License-Identifier: Apache-2.0
"""Marian says what transformers says, however its texts are read, and what it is not is refused."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models
from fastattn.models import _safetensors
from fastattn.models.marian import Config, MarianMTModel
from tests.support.translators import PAD, SIZES, WORDS, logits, of_transformers, write

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

APART = dict(share_encoder_decoder_embeddings=False, decoder_vocab_size=70)
CONFIGS = {
    "usual": dict(activation_function="swish", scale_embedding=True),
    "apart": APART | dict(activation_function="relu", d_model=60),
    "untied": dict(tie_word_embeddings=False, activation_function="gelu"),
    "apart-untied": APART | dict(tie_word_embeddings=False, activation_function="gelu_new"),
    "odd": dict(d_model=15, encoder_attention_heads=3, decoder_attention_heads=5),
}
RNG = np.random.default_rng(0)
SOURCES = [RNG.integers(2, WORDS, n) for n in (17, 1, 40, 6)]
TARGETS = [RNG.integers(2, WORDS, n) for n in (9, 30, 1, 20)]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])


def check(folder):
    model, theirs = models.load(folder), of_transformers(folder)
    for source, target in zip(SOURCES, TARGETS, strict=True):
        expected = logits(theirs, source, [PAD, *target]).logits[0].numpy()
        found = model.logits(source, target)
        assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_logits_are_those_of_transformers(folder):
    check(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_stored(dtype, tmp_path):
    check(write(tmp_path, dtype))
    weights = models.load(tmp_path)._model.weights
    assert weights["model.decoder.layers.2.encoder_attn.v_proj.weight"].dtype.name == dtype


def test_texts_that_are_read_together_and_token_by_token_change_no_bit(folder):
    model = models.load(folder)
    network = model._model
    starts = np.cumsum([0, *map(len, SOURCES)])
    context = network.context(network.encode(np.concatenate(SOURCES), starts), starts)
    fed = [[PAD, *x] for x in TARGETS]
    read = [[] for _ in fed]
    for step in range(max(map(len, fed))):
        parts = [x[step : step + 1] for x in fed]
        context.feed([len(x) for x in parts])
        rows = network.head(network(np.concatenate(parts).astype(np.int64), context))
        for i, row in zip([i for i, x in enumerate(parts) if x], rows, strict=True):
            read[i].append(row)
    for source, target, rows in zip(SOURCES, TARGETS, read, strict=True):
        alone = model.logits(source, target)
        assert_allclose(rows, alone, rtol=0, atol=1e-5 * abs(alone).max())
        assert_array_equal(rows[0], model.logits(source, [])[0])


def test_a_table_may_have_the_name_of_any_that_it_is(tmp_path):
    new = dict(_safetensors.read(write(tmp_path)).tensors)
    config = Config.read(SIZES)
    expected = MarianMTModel.sanitize(config, new)
    assert expected.keys() == MarianMTModel.shapes(config).keys()
    table = new.pop("model.shared.weight")
    names = [f"model.{x}.embed_tokens.weight" for x in ("encoder", "decoder")]
    for name in [*names, "lm_head.weight"]:
        found = MarianMTModel.sanitize(config, new | {name: table})
        assert found.keys() == expected.keys()
        for x in [*names, "lm_head.weight"]:
            assert_array_equal(found[x], table)


def test_a_head_without_bias_has_one_of_zeros(tmp_path):
    weights = dict(_safetensors.read(write(tmp_path)).tensors)
    del weights["final_logits_bias"]
    found = MarianMTModel.sanitize(Config.read(SIZES), weights)
    assert_array_equal(found["lm_head.bias"], np.zeros(WORDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "tanh"}, "activation_function must be 'gelu' or .*, got 'tanh'"),
        ({"decoder_layers": 1001}, "decoder_layers must be at most 1000, got 1001"),
        ({"d_model": 50}, "d_model must be a multiple of encoder_attention_heads, 4, got 50"),
        ({"decoder_vocab_size": 7}, "decoder_vocab_size must be None or 60, got 7"),
        ({"normalize_before": True}, "normalize_before must be False, got True"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm must be False, got True"),
        ({"static_position_embeddings": False}, "static_position_embeddings must be True, .*"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder must be True, got False"),
        ({"d_model": None}, "d_model must be there, and is not"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Config.read(SIZES | changes)
