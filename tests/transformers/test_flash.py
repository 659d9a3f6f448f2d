# SPDX-License-Identifier: Apache-2.0
"""The second name, `fastattn_flash`: the same attention, and what transformers asks of "flash"."""

import contextlib
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AttentionInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward

import fastattn.flash_attn
from tests.transformers.models import (
    ALL,
    MIXED,
    TOLERANCE,
    VOCABULARY,
    model_of,
    padding,
    record,
    tokens,
)


def functions(implementation):
    """Return what transformers has behind a name: dense, varlen, paged, and two for padding."""
    return modeling_flash_attention_utils.lazy_import_flash_attention(implementation)[0]


def test_registered_alone():
    """In a process of its own: nobody has loaded another implementation before."""
    code = """if True:
        import fastattn.transformers, transformers
        fastattn.transformers.register()
        config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        model = transformers.AutoModel.from_config(config, attn_implementation="fastattn_flash")
        print(model.config._attn_implementation)
        """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "fastattn_flash\n", ran.stderr


def test_functions_stay_behind_others():
    """Whatever transformers has loaded in between, or failed to load."""
    fastattn.transformers.register()
    fastattn.transformers.register()
    for other in ("flash_attention_2", "somebody/attention", None):
        with contextlib.suppress(ImportError, ValueError):
            functions(other)
        dense, varlen, *_ = functions("fastattn_flash")
        assert dense is fastattn.flash_attn.flash_attn_func
        assert varlen is fastattn.flash_attn.flash_attn_varlen_func
    with pytest.raises(ImportError):
        functions("flash_attention_2")
    assert functions("fastattn_flash")[1] is varlen


@pytest.mark.parametrize("seen", [None, padding("left", (9, 6), 9).bool()])
def test_transformers_own_way_to_these_functions(seen):
    """A layer that calls flash-attn through transformers gets ours too."""
    layer = model_of("llama", "fastattn_flash").model.layers[0].self_attn
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 8, generator=rng)
    key, value = torch.randn(2, 2, 2, 9, 8, generator=rng)
    theirs, _ = flash_attention_forward(layer, query, key, value, seen)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    mask = mask if seen is None else mask & seen[:, None, None, :]
    ours, _ = AttentionInterface()["fastattn_flash"](layer, query, key, value, mask)
    rows = slice(None) if seen is None else seen
    torch.testing.assert_close(theirs[rows], ours[rows], **TOLERANCE)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("name", [x for x in ALL if x not in {*MIXED, "whisper", "llama4"}])
def test_padded_batches(name):
    """The same numbers as under the first name, and texts."""
    models = [model_of(name, x) for x in ("fastattn", "fastattn_flash")]
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    if models[0].config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(2, 7, seed=1)
    results = [model(**inputs)[0] for model in models]
    assert torch.equal(*results)
    if models[0].can_generate():
        inputs.pop("decoder_input_ids", None)
        for cache in ("dynamic", "static"):
            options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
            texts = [model.generate(**inputs, **options) for model in models]
            assert torch.equal(*texts)


def test_from_a_folder(tmp_path):
    model_of("bert", "eager").save_pretrained(tmp_path)
    given = {"input_ids": tokens(), "attention_mask": padding("right")}
    ours, theirs = (
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=x).eval()(**given)[0]
        for x in ("fastattn_flash", "eager")
    )
    seen = padding("right").bool()
    torch.testing.assert_close(ours[seen], theirs[seen], **TOLERANCE)


def test_a_model_that_names_implementations_of_its_own():
    """For others that it does not name, transformers would take the first of them."""
    kind = transformers.GptOssForCausalLM
    assert "fastattn_flash" not in kind._compatible_flash_implementations
    model = model_of("gpt_oss", "fastattn_flash")
    assert model.config._attn_implementation == "fastattn_flash"
    model.set_attn_implementation("eager")
    model.set_attn_implementation("fastattn_flash")
    assert model.config._attn_implementation == "fastattn_flash"


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize("name", ["Bloom", "MPNet", "Falcon", "GPTNeo"])
def test_models_with_attention_of_their_own(name):
    """Falcon and GPT-Neo would take their layers for flash-attn."""
    sizes = {"hidden_size": 32, "vocab_size": VOCABULARY, "num_hidden_layers": 1}
    if name == "GPTNeo":
        sizes = {"hidden_size": 32, "num_layers": 1, "attention_types": [[["global"], 1]]}
    config = getattr(transformers, f"{name}Config")(**sizes)
    config.num_attention_heads = 4
    refused = f"{name}Model does not support attn_implementation='fastattn_flash': it computes"
    with pytest.raises(ValueError, match=refused):
        transformers.AutoModel.from_config(config, attn_implementation="fastattn_flash")
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=refused):
        model.set_attn_implementation("fastattn_flash")
    assert model.config._attn_implementation == "eager"


@pytest.mark.promise("transformers-refuses-other-attention", "transformers-means-eager")
def test_a_layer_that_never_asks():
    """Kosmos-2.5 computes what is eager, to which it would add flash-attn's mask of 1 and 0."""
    from transformers.models.kosmos2_5 import modeling_kosmos2_5

    sizes = {"hidden_size": 32, "patch_embed_hidden_size": 24, "num_hidden_layers": 1}
    config = transformers.models.kosmos2_5.configuration_kosmos2_5.Kosmos2_5VisionConfig(
        **sizes, num_attention_heads=4, head_dim=8, intermediate_size=48
    )
    kind = modeling_kosmos2_5.Kosmos2_5VisionModel
    with pytest.raises(ValueError, match=r"'fastattn_flash': .* in Kosmos2_5VisionAttention"):
        kind._from_config(config, attn_implementation="fastattn_flash")
    patches = torch.randn(1, 9, 26, generator=torch.Generator().manual_seed(0)).abs()
    patches[:, 6:] = 0
    outs = []
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(0)
        outs.append(
            kind._from_config(config, attn_implementation=implementation).eval()(patches)[0]
        )
    torch.testing.assert_close(*outs, **TOLERANCE)


@pytest.mark.promise("transformers-refuses-other-attention")
def test_chunks_longer_than_one():
    """Refused by transformers under any name with "flash"."""
    model = model_of("llama4", "fastattn_flash")
    with pytest.raises(ValueError, match="cannot handle chunked attention"):
        model(input_ids=tokens())
    expected = model_of("llama4", "eager")(input_ids=tokens(2, 8))[0]
    torch.testing.assert_close(model(input_ids=tokens(2, 8))[0], expected, **TOLERANCE)


def test_images_of_a_batch_in_one_call(monkeypatch):
    """Qwen2-VL packs the patches of all images, and calls each by itself under other names."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    config = modeling_qwen2_vl.Qwen2VLVisionConfig(
        depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2
    )
    grid = torch.tensor([[1, 4, 6], [1, 2, 2], [2, 4, 4]])
    patches = torch.randn(60, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    results, calls = [], record(monkeypatch, "varlen_attention")
    for implementation in ("eager", "fastattn_flash"):
        torch.manual_seed(0)
        model = modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel._from_config(
            config, attn_implementation=implementation
        ).eval()
        results.append(model(patches, grid_thw=grid)[0])
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    assert len(calls) == 2
