# SPDX-License-Identifier: Apache-2.0
"""GPT-2 says what transformers says, however a text is read, and what it is not is refused."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import models
from fastattn.models import _safetensors
from fastattn.models.gpt2 import Config, GPT2Model
from tests.support.decoders import check_logits, check_sequences, write

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

SIZES = dict(vocab_size=101, n_positions=96, n_embd=48, n_layer=3, n_head=6)
ODD = dict(n_inner=56, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True)
CONFIGS = {
    "gpt2": {},
    "odd": ODD | dict(activation_function="gelu_pytorch_tanh"),
    "unscaled": dict(scale_attn_weights=False, reorder_and_upcast_attn=True),
}
IDS = np.random.default_rng(0).integers(0, 101, 90)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    config = transformers.GPT2Config(**SIZES | CONFIGS[request.param])
    return write(tmp_path_factory.mktemp(request.param), config)


def test_logits_are_those_of_transformers_however_a_text_is_read(folder):
    check_logits(folder, IDS)


def test_sequences_that_are_read_together_change_no_bit(folder):
    check_sequences(folder, IDS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_stored(dtype, tmp_path):
    folder = write(tmp_path, transformers.GPT2Config(**SIZES), dtype)
    check_logits(folder, IDS)
    model = models.load(folder)._model
    assert model.weights["h.0.mlp.c_fc.weight"].dtype.name == dtype


def test_older_files_have_shorter_names_and_hold_masks(tmp_path):
    new = dict(_safetensors.read(write(tmp_path, transformers.GPT2Config(**SIZES))).tensors)
    old = {name.removeprefix("transformer."): x for name, x in new.items()}
    old |= {f"h.0.attn.{name}": np.ones((1, 1, 96, 96)) for name in ("bias", "masked_bias")}
    config = Config.read(SIZES)
    found, expected = (GPT2Model.sanitize(config, x) for x in (old, new))
    assert found.keys() == expected.keys() == GPT2Model.shapes(config).keys()
    assert_array_equal(found["h.2.attn.c_attn.weight"], new["transformer.h.2.attn.c_attn.weight"].T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new' or .*'relu'"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"n_embd": 50}, "n_embd must be a multiple of n_head, 6, got 50"),
        ({"n_layer": 1001}, "n_layer must be at most 1000, got 1001"),
        ({"n_inner": 0}, "n_inner must be an integer from 1 to .* or null, got 0"),
        ({"n_positions": None}, "n_positions must be there, and is not"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Config.read(SIZES | changes)
