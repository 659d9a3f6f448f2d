# SPDX-License-Identifier: Apache-2.0
"""Llama and its like say what transformers says, however a text is read, and refuse the rest."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import models
from fastattn.models.llama import Config
from tests.support.decoders import check_logits, check_sequences, write

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

SIZES = dict(vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=32)
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
SLIDING = dict(use_sliding_window=True, sliding_window=11)
CONFIGS = {
    "llama": ("Llama", {}),
    "llama-tied-llama3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-biases-linear": (
        "Llama",
        dict(attention_bias=True, mlp_bias=True, rope_parameters=LINEAR, head_dim=10),
    ),
    "mistral": ("Mistral", dict(sliding_window=11)),
    "mistral-whole": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", SLIDING | dict(max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True)),
    "qwen3-sliding": (
        "Qwen3",
        SLIDING | dict(head_dim=8, layer_types=["sliding_attention", *["full_attention"] * 2]),
    ),
}
IDS = np.random.default_rng(0).integers(0, 101, 90)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    kind, changes = CONFIGS[request.param]
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return write(tmp_path_factory.mktemp(request.param), config)


def test_logits_are_those_of_transformers_however_a_text_is_read(folder):
    check_logits(folder, IDS)


def test_sequences_that_are_read_together_change_no_bit(folder):
    check_sequences(folder, IDS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_stored(dtype, tmp_path):
    folder = write(tmp_path, transformers.LlamaConfig(**SIZES), dtype)
    check_logits(folder, IDS)
    model = models.load(folder)._model
    assert model.weights["lm_head.weight"].dtype.name == dtype


def test_older_files_say_rotary_positions_in_other_keys():
    theta, rest = LLAMA3["rope_theta"], {k: x for k, x in LLAMA3.items() if k != "rope_theta"}
    new = Config.read(SIZES | dict(model_type="llama", rope_parameters=LLAMA3))
    old = SIZES | dict(model_type="llama", rope_theta=theta)
    rest |= {"type": rest.pop("rope_type")}
    for stated in (old | dict(rope_scaling=rest), old | dict(rope_scaling=LLAMA3)):
        assert_array_equal(Config.read(stated).frequencies(8), new.frequencies(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type must be 'llama' or 'mistral' or 'qwen2' or .*"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"hidden_size": None}, "hidden_size must be there, and is not"),
        ({"hidden_size": 47}, "hidden_size must be a multiple of num_attention_heads, 6, got 47"),
        ({"num_attention_heads": 5, "hidden_size": 40}, "of num_key_value_heads, 2, got 5"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers must be at most 1000, got 1001"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer .*, got True"),
        ({"vocab_size": 2**31}, "vocab_size must be an integer from 1 to .*, got 2147483648"),
        ({"head_dim": 7}, r"head_dim times .* must be even, from 2 to 7, got 7 \* 1.0"),
        ({"head_dim": "8"}, r"head_dim must be an integer .* or null, got '8'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number from 1e-30 to 1e30, got -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number .*, got nan"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"rope_theta": "x"}, "rope_theta must be a number .*, got 'x'"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object or null, got \[1\]"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}},
            "rope_scaling.rope_type must be one of default, linear, llama3, got 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": []}}, r"rope_parameters.rope_type must be .*, got \[\]"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor must be a number .*, got None"),
        (
            {"rope_parameters": {"attention_factor": 0.5}},
            "rope_parameters.attention_factor is not supported for rope_type 'default'",
        ),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
            "rope_parameters.high_freq_factor must be above low_freq_factor, 1.0, got 1.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1, got 0.5",
        ),
        ({"layer_types": ["full_attention"]}, "for each of num_hidden_layers, 3, got .*"),
        ({"layer_types": ["full_attention", {}, "x"]}, "layer_types must be 'full_attention' .*"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(changes, message):
    Config.read(SIZES | {"model_type": "llama", "architectures": ["x"]})
    with pytest.raises(ValueError, match=rf"^(.* )?{message}$"):
        Config.read(SIZES | {"model_type": "llama"} | changes)
