# SPDX-License-Identifier: Apache-2.0
"""Models and calls that are refused, and those that only look so."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface

import fastattn
from tests.transformers.models import (
    DECODER,
    ENCODERS,
    MIXED,
    TOLERANCE,
    VOCABULARY,
    model_of,
    tokens,
)


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize("name", ["Bloom", "MPNet", "DebertaV2", "Falcon"])
def test_models_with_attention_of_their_own(name):
    fastattn.transformers.register()  # again
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=VOCABULARY
    )
    with pytest.raises(ValueError, match=f"{name}Model does not support attn_impl.*='fastattn'"):
        transformers.AutoModel.from_config(config, attn_implementation="fastattn")
    transformers.AutoModel.from_config(config, attn_implementation="eager")


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize("name", MIXED)
def test_models_with_attention_of_both_kinds(name):
    own = {"git": "GitAttention", "bigbird_pegasus": "BigBirdPegasusSelfAttention"}[name]
    refused = f"does not support attn_implementation='fastattn': it .* in its own way in {own}, "
    with pytest.raises(ValueError, match=refused):
        model_of(name, "fastattn")
    model = model_of(name, "eager")
    inputs = {"input_ids": tokens()} | ({"use_cache": False} if name == "git" else {})
    expected = model(**inputs)[0]
    with pytest.raises(ValueError, match=refused):
        model.set_attn_implementation("fastattn")
    assert {m.config._attn_implementation for m in parts_of(model)} == {"eager"}
    assert torch.equal(model(**inputs)[0], expected)


def parts_of(model):
    return [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]


def test_a_part_that_asks_for_attention_may_have_it():
    model = model_of("git", "eager")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vision = model.git.image_encoder
    expected = vision(pixels)[0]
    vision.set_attn_implementation("fastattn")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(vision(pixels)[0], expected, **TOLERANCE)


def test_a_part_that_transformers_passes_over():
    """A part with a config and attention of its own keeps both, as when the model is made."""
    mpnet = transformers.MPNetConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=VOCABULARY
    )
    decoder = transformers.BertConfig(
        **ENCODERS["bert"][2], is_decoder=True, add_cross_attention=True
    )
    model = transformers.EncoderDecoderModel(
        encoder=transformers.MPNetModel(mpnet), decoder=transformers.BertLMHeadModel(decoder)
    ).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 9, seed=1)}
    expected = model(**inputs).logits
    for told in ("fastattn", {"decoder": "fastattn"}):
        model.set_attn_implementation("eager")
        model.set_attn_implementation(told)
        assert model.decoder.config._attn_implementation == "fastattn"
        assert model.encoder.config._attn_implementation != "fastattn"
        torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)
    with pytest.raises(ValueError, match="MPNetModel does not support"):
        model.encoder.set_attn_implementation("fastattn")


@pytest.mark.promise("transformers-refuses-other-attention")
def test_a_model_with_a_table_of_implementations():
    config = transformers.SamConfig()
    with pytest.raises(ValueError, match="in its own way in SamVisionLayer, without"):
        transformers.SamModel._from_config(config, attn_implementation="fastattn")


def test_sweep(monkeypatch):
    """The script that sweeps all models tells those that run, are refused, or are wrong."""
    path = Path(__file__).parents[1] / "sweeps" / "transformers_models.py"
    spec = importlib.util.spec_from_file_location("transformers_models", path)
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    found = {
        kind: sweep.in_a_child(kind, name)["status"]
        for kind, name in (("bert", "BertModel"), ("git", "GitModel"), ("mamba", "MambaModel"))
    }
    assert found == {"bert": "equal", "git": "refused", "mamba": "equal, without attention"}
    assert len(sweep.classes()) > 800
    theirs = fastattn.transformers._attention.attention
    monkeypatch.setattr(
        fastattn.transformers._attention,
        "attention",
        lambda *arguments, **named: (theirs(*arguments, **named)[0] * 0.99, None),
    )
    assert sweep.in_a_child("bert", "BertModel")["status"] == "differs"


def test_a_model_that_extends_one():
    class Mine(transformers.LlamaForCausalLM):
        pass

    Mine.__module__ = "__main__"  # whose source transformers cannot read
    config = transformers.LlamaConfig(**DECODER)
    config._attn_implementation = "fastattn"
    Mine(config)


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "read_index"])
def test_what_is_not_supported(name):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=rf"\({name}\), as Module asks for"):
        AttentionInterface()["fastattn"](torch.nn.Module(), x, x, x, None, **{name: x})


def test_sinks_that_are_not_passed():
    module = torch.nn.Module()
    module.sinks = torch.nn.Parameter(torch.zeros(2))
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="has sinks, and does not pass them"):
        AttentionInterface()["fastattn"](module, x, x, x, None)


def test_mask_without_axes():
    x = torch.zeros(2, 2, 2, 8)
    mask = torch.ones(2, 2, dtype=bool)
    with pytest.raises(ValueError, match=r"got attention_mask.shape=\(2, 2\)"):
        AttentionInterface()["fastattn"](torch.nn.Module(), x, x, x, mask)


def test_other_devices():
    x = torch.zeros(1, 2, 4, 8, device="meta")
    with pytest.raises(TypeError, match="query must hold numbers, got a tensor on the device meta"):
        AttentionInterface()["fastattn"](torch.nn.Module(), x, x, x, None)
