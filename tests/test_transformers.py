# SPDX-License-Identifier: Apache-2.0
"""fastattn.transformers: tiny models of random weights beside transformers' own attention."""

import copy
import importlib.util
import io
import itertools
import operator
import pickle
import warnings
from pathlib import Path

import child
import numpy as np
import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils  # noqa: E402

import fastattn  # noqa: E402
import fastattn.torch  # noqa: E402
import fastattn.transformers  # noqa: E402

fastattn.transformers.register()
transformers.logging.set_verbosity_error()

VOCABULARY = 61
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # attention that depends on the tokens
    **SPECIAL,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
    "decoder_start_token_id": 2,
    **SPECIAL,
}
# Class of the model, of its config, and what the config is given.
DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER
        | {
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER
        | {
            "sliding_window": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        DECODER
        | {
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 128,
            "initializer_range": 0.2,
            "scale_attn_by_inverse_layer_idx": True,
            **SPECIAL,
        },
    ),
}
ENCODER_DECODERS = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **SPECIAL,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
    ),
}
ENCODERS = {
    "bert": (
        "BertModel",
        "BertConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.2,
        },
    ),
}
MIXED = {  # our attention in some of the layers alone
    "bigbird_pegasus": (
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        SEQ2SEQ | {"attention_type": "original_full", "max_position_embeddings": 64},
    ),
    "git": (
        "GitForCausalLM",
        "GitConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            },
            **SPECIAL,
        },
    ),
}
ALL = DECODERS | ENCODER_DECODERS | ENCODERS | MIXED


@pytest.fixture(autouse=True)
def one_thread():
    """Threads would wait for each other longer than such models compute."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def model_of(name, implementation, **changes):
    """Return a model in eval mode; the same weights for any implementation."""
    model, config, settings = ALL[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**settings | changes)
    config._attn_implementation = implementation
    made = getattr(transformers, model)(config).eval()
    assert made.config._attn_implementation == implementation
    return made


@pytest.fixture
def pair(request):
    return [model_of(request.param, implementation) for implementation in ("eager", "fastattn")]


def tokens(batch=2, length=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=rng)


def padding(side, lengths=(24, 17), length=24):
    """Return what tells tokens from padding."""
    seen = torch.arange(length) < torch.tensor(lengths)[:, None]
    return (seen.flip(-1) if side == "left" else seen).long()


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(models, rows=..., **inputs):
    """Compare the first of what models return, and the gradients, by those rows alone."""
    results = [model(**inputs)[0][rows] for model in models]
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    weights = torch.linspace(-1, 1, results[0].numel()).reshape(results[0].shape)
    for result in results:
        (result * weights).mean().backward()
    theirs, ours = map(gradients, models)
    assert theirs.keys() == ours.keys()
    assert theirs
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE, msg=name)


def record(monkeypatch):
    """Return a list that gets the keywords of each call of fastattn.torch.attention."""
    calls = []
    attention = fastattn.torch.attention

    def attend(*tensors, **keywords):
        calls.append({n: x for n, x in keywords.items() if x is not None})
        return attention(*tensors, **keywords)

    monkeypatch.setattr(fastattn.torch, "attention", attend)
    return calls


# Models.


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("pair", DECODERS, indirect=True)
def test_decoder(pair):
    assert_alike(pair, input_ids=tokens(), use_cache=False)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pair", DECODERS, indirect=True)
def test_decoder_with_padding(pair, side):
    mask = padding(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "position_ids": positions}
    assert_alike(pair, mask.bool(), use_cache=False, **inputs)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("pair", ENCODERS, indirect=True)
def test_encoder(pair, side):
    mask = padding(side, (24, 24) if side == "none" else (24, 17))
    assert_alike(pair, mask.bool(), input_ids=tokens(), attention_mask=mask)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("pair", ENCODER_DECODERS, indirect=True)
def test_encoder_decoder(pair, side):
    inputs = source_of(pair[0], side)
    decoded = padding(side, (10, 7), 10) if side != "none" else torch.ones(2, 10).long()
    assert_alike(
        pair,
        decoded.bool(),
        decoder_input_ids=tokens(2, 10, seed=1),
        decoder_attention_mask=decoded,
        use_cache=False,
        **inputs,
    )


def source_of(model, side="none"):
    """Return what the encoder reads."""
    if model.config.model_type == "whisper":
        rng = torch.Generator().manual_seed(0)
        return {"input_features": torch.randn(2, 8, 40, generator=rng)}
    return {
        "input_ids": tokens(),
        "attention_mask": padding(side, (24, 24) if side == "none" else (24, 17)),
    }


# Writing token by token.


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("pair", DECODERS, indirect=True)
def test_generate(pair, side, cache):
    mask = padding(side, (24, 24) if side == "none" else (24, 17))
    assert_same_text(pair, cache, input_ids=tokens(), attention_mask=mask)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pair", ENCODER_DECODERS, indirect=True)
def test_generate_from_source(pair, cache):
    assert_same_text(pair, cache, **source_of(pair[0], "right"))


def assert_same_text(models, cache, **inputs):
    texts = [
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=12,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in models
    ]
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    for theirs, ours in zip(texts[0].logits, texts[1].logits, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.promise("transformers-means-eager")
def test_beams():
    models = [model_of("llama", implementation) for implementation in ("eager", "fastattn")]
    texts = [
        model.generate(
            tokens(), attention_mask=padding("left"), num_beams=3, do_sample=False, max_new_tokens=8
        )
        for model in models
    ]
    assert torch.equal(*texts)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("pair", ["llama", "mistral", "gpt_oss", "gemma2"], indirect=True)
def test_prompt_in_parts(pair, side, static):
    """A few queries stand behind the keys of earlier calls, and in front of an empty cache."""
    mask = padding(side, (24, 24) if side == "none" else (24, 17))
    results = []
    for model in pair:
        cache = (
            transformers.StaticCache(config=model.config, max_cache_len=40)
            if static
            else transformers.DynamicCache(config=model.config)
        )
        parts = []
        for start, stop in itertools.pairwise((0, 9, 10, 24)):
            with torch.no_grad():
                out = model(
                    input_ids=tokens()[:, start:stop],
                    attention_mask=mask[:, :stop],
                    cache=cache,
                )
            parts.append(out.logits)
        results.append(torch.cat(parts, 1)[mask.bool()])
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.promise("transformers-makes-no-mask-of-pairs")
def test_prompt_in_parts_has_no_mask_of_pairs(monkeypatch):
    model = model_of("llama", "fastattn")
    calls = record(monkeypatch)
    cache = transformers.DynamicCache(config=model.config)
    for start, stop in ((0, 9), (9, 24)):
        model(input_ids=tokens()[:, start:stop], cache=cache)
    assert calls[0] == {"is_causal": True, "query_offset": 0, "scale": 8**-0.5}
    assert calls[-1] == {"is_causal": True, "query_offset": 9, "scale": 8**-0.5}


def test_packed_sequences():
    models = [model_of("llama", implementation) for implementation in ("eager", "fastattn")]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    assert_alike(models, input_ids=tokens(1), position_ids=positions, use_cache=False)


def test_mask_of_the_user():
    models = [model_of("llama", implementation) for implementation in ("sdpa", "fastattn")]
    seen = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    seen |= torch.eye(24, dtype=bool)
    assert_alike(models, input_ids=tokens(), attention_mask=seen, use_cache=False)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for model in models:
        model.zero_grad()
    assert_alike(models, input_ids=tokens(), attention_mask=added, use_cache=False)


# What is returned beside.


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("pair", DECODERS | ENCODERS, indirect=True)
def test_output_attentions(pair, side):
    mask = padding(side, (24, 24) if side == "none" else (24, 17))
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    with torch.no_grad():
        theirs, ours = (model(**inputs, output_attentions=True).attentions for model in pair)
    assert len(theirs) == len(ours) == 2
    rows = mask.bool()
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = (x.transpose(1, 2)[rows] for x in (a, b))
        torch.testing.assert_close(b, a, **TOLERANCE)


@pytest.mark.parametrize("pair", ENCODER_DECODERS, indirect=True)
def test_output_attentions_of_both_sides(pair):
    inputs = source_of(pair[0], "right")
    with torch.no_grad():
        theirs, ours = (
            model(**inputs, decoder_input_ids=tokens(2, 10, seed=1), output_attentions=True)
            for model in pair
        )
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(theirs[name]) == 2
        for a, b in zip(theirs[name], ours[name], strict=True):
            torch.testing.assert_close(b, a, **TOLERANCE)


# Training.


@pytest.mark.promise("dropout-repeats-with-torch")
def test_dropout_repeats_with_torch_and_is_right_in_the_mean():
    attend = AttentionInterface()["fastattn"]
    module = torch.nn.Module()
    x = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0)).unbind()
    exact = attend(module, *x, None)[0]
    torch.manual_seed(1)
    first, second = (attend(module, *x, None, dropout=0.2)[0] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, attend(module, *x, None, dropout=0.2)[0])
    assert not torch.equal(first, second)
    mean = sum(attend(module, *x, None, dropout=0.2)[0] for _ in range(2000)) / 2000
    torch.testing.assert_close(mean, exact, atol=0.1, rtol=0)
    assert torch.equal(exact, attend(module.eval(), *x, None, dropout=0.2)[0])


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_training_with_checkpoints(name):
    """What is computed again in the backward pass drops the same pairs."""
    changes = (
        {"attention_dropout": 0.3}
        if name == "llama"
        else {"dropout_rate": 0.3}
        if name == "t5"
        else {"attention_probs_dropout_prob": 0.3}
    )
    found = []
    for checkpoints in (False, True):
        model = model_of(name, "fastattn", **changes).train()
        if checkpoints:
            model.activation_checkpointing_enable()
        inputs = {"decoder_input_ids": tokens(2, 10)} if name == "t5" else {}
        torch.manual_seed(5)
        model(input_ids=tokens(), **inputs, use_cache=False)[0].square().mean().backward()
        found.append(gradients(model))
    for parameter, grad in found[0].items():
        torch.testing.assert_close(found[1][parameter], grad, **TOLERANCE, msg=parameter)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_compile(name):
    model = model_of(name, "fastattn")
    inputs = {"input_ids": tokens(), "attention_mask": padding("right")}
    expected = model(**inputs)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs)[0], expected, **TOLERANCE)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5"])
def test_half_precision(name, dtype):
    """No further from float32 than twice transformers' own."""
    inputs = {"input_ids": tokens(), "attention_mask": padding("right")}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens(2, 10, seed=1)
    exact = model_of(name, "eager")(**inputs)[0]
    theirs, ours = (
        (model_of(name, implementation).to(dtype)(**inputs)[0] - exact).abs().max()
        for implementation in ("eager", "fastattn")
    )
    assert ours <= 2 * theirs


# What a query sees, in which words.


@pytest.mark.promise("transformers-makes-no-mask-of-pairs")
@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("llama", "none", {"is_causal", "query_offset"}),
        ("llama", "right", {"is_causal", "query_offset", "kv_lengths"}),
        ("llama", "left", {"is_causal", "query_offset", "mask"}),
        ("mistral", "none", {"is_causal", "query_offset", "window"}),
        ("mistral", "left", {"is_causal", "query_offset", "window", "mask"}),
        ("bert", "none", set()),
        ("bert", "right", {"kv_lengths"}),
        ("bert", "left", {"mask"}),
    ],
)
def test_no_mask_of_pairs(monkeypatch, name, side, words):
    calls = record(monkeypatch)
    mask = padding(side, (24, 24) if side == "none" else (24, 17))
    model_of(name, "fastattn")(input_ids=tokens(), attention_mask=mask)
    for call in calls:
        assert call.keys() - {"scale"} == words
        if "mask" in call:
            assert call["mask"].shape == (2, 1, 1, 24)


def causal():
    return masking_utils.causal_mask_function


def bidirectional():
    return masking_utils.bidirectional_mask_function


def window(n=5):
    return masking_utils.sliding_window_causal_mask_function(n)


def window_both_ways(n=5):
    return masking_utils.sliding_window_bidirectional_mask_function(n)


def chunks(n=4, left_padding=(0, 0)):
    return masking_utils.chunked_causal_mask_function(n, torch.tensor(left_padding))


def prefix(n=6):
    return masking_utils.or_masks(causal(), lambda b, h, q, k: k < n)


def one_chunk():
    return chunks(100)


def chunks_behind_padding():
    return chunks(4, (0, 3))


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize(
    "pattern",
    [
        causal,
        bidirectional,
        window,
        window_both_ways,
        chunks,
        chunks_behind_padding,
        one_chunk,
        prefix,
    ],
)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "q_offset", "kv_offset"),
    [
        (8, 8, 0, 0),
        (1, 8, 7, 0),
        (3, 8, 5, 0),
        (5, 16, 0, 0),
        (4, 16, 6, 0),
        (1, 16, 9, 0),
        (1, 5, 12, 8),
        (3, 7, 12, 8),
        (2, 1, 0, 0),
        (8, 3, 0, 0),
    ],
)
def test_every_pattern_is_what_torch_gets(pattern, q_len, kv_len, q_offset, kv_offset):
    """The words, and what an operation finds, say what transformers' mask says."""
    attend, ours = AttentionInterface()["fastattn"], AttentionMaskInterface()["fastattn"]
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, q_len, 8, generator=rng)
    key, value = torch.randn(2, 2, 2, kv_len, 8, generator=rng).unbind()
    positions = kv_offset + kv_len
    is_causal = pattern not in (bidirectional, window_both_ways)
    module = torch.nn.Module()
    module.is_causal = is_causal
    paddings = [
        None,
        torch.ones(2, positions, dtype=bool),
        padding("right", (positions, max(1, positions - 3)), positions).bool(),
        padding("left", (positions, max(1, positions - 3)), positions).bool(),
        torch.ones(2, min(positions, q_offset + q_len), dtype=bool),
        torch.rand(2, positions, generator=rng) < 0.5,
    ]
    for attention_mask, static in itertools.product(paddings, (False, True)):
        asked = {
            "batch_size": 2,
            "q_length": q_len,
            "kv_length": kv_len,
            "q_offset": torch.tensor(q_offset) if static else q_offset,
            "kv_offset": kv_offset,
            "mask_function": pattern(),
            "attention_mask": attention_mask,
        }
        whole = masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False)
        expected = fastattn.torch.attention(query, key, value, mask=whole)
        for skip in (True, False):
            mask = ours(
                **asked,
                allow_is_causal_skip=skip and is_causal,
                allow_is_bidirectional_skip=skip and not is_causal,
            )
            assert skip or mask is not None
            out = attend(module, query, key, value, mask)[0].transpose(1, 2)
            torch.testing.assert_close(out, expected, **TOLERANCE)
            if mask is not None:
                assert mask.shape == whole.shape
                assert mask.dtype == torch.bool
                assert torch.equal(mask & True, whole)
                assert torch.equal(mask[:, :, 1:, :2], whole[:, :, 1:, :2])
                out = attend(module, query, key, value, mask)[0].transpose(1, 2)
                torch.testing.assert_close(out, expected, **TOLERANCE)


def test_a_pattern_that_was_written_to():
    attend, ours = AttentionInterface()["fastattn"], AttentionMaskInterface()["fastattn"]
    x = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = ours(batch_size=1, q_length=6, kv_length=6, allow_is_causal_skip=False)
    mask[:, :, 3] = False
    out = attend(torch.nn.Module(), x, x, x, mask)[0]
    assert (out[:, 3] == 0).all()
    assert (out[:, [0, 1, 2, 4, 5]] != 0).all()


@pytest.mark.promise("empty-rows-are-zero-everywhere")
def test_a_row_that_sees_nothing_is_zero():
    model = model_of("llama", "fastattn")
    seen = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    mask = padding("left")
    model(input_ids=tokens(), attention_mask=mask)
    assert (seen[0][~mask.bool()] == 0).all()
    assert (seen[0][mask.bool()] != 0).all()


# Errors.


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
    path = Path(__file__).parent / "sweeps" / "transformers_models.py"
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


@pytest.mark.parametrize("function", [causal, chunks_behind_padding, prefix])
def test_a_mask_of_one_query_is_a_plain_tensor(function):
    """It may go to a model that was compiled for writing, which knows no other classes."""
    made = AttentionMaskInterface()["fastattn"](
        batch_size=2,
        q_length=1,
        kv_length=8,
        q_offset=7,
        mask_function=function(),
        attention_mask=padding("left", (8, 5), 8).bool(),
    )
    assert type(made) is torch.Tensor


# What stands for a mask, in the hands of others.


def pattern(q_len=6, kv_len=6):
    """Return what layers get of a causal model whose second sequence is padded."""
    made = AttentionMaskInterface()["fastattn"](
        batch_size=2,
        q_length=q_len,
        kv_length=kv_len,
        attention_mask=padding("right", (kv_len, 3), kv_len).bool(),
        allow_is_causal_skip=False,
    )
    assert type(made) is not torch.Tensor
    return made


def attended(mask):
    x = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    return AttentionInterface()["fastattn"](torch.nn.Module(), x, x, x, mask)[0]


def saved_and_loaded(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy in a dict": lambda mask: copy.deepcopy({"attention_mask": mask})["attention_mask"],
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
    "torch.save": saved_and_loaded,
    "clone": torch.clone,
    "detach": torch.Tensor.detach,
    "to": lambda mask: mask.to("cpu"),
    "numpy": lambda mask: torch.from_numpy(mask.numpy()),
    "asarray": lambda mask: torch.from_numpy(np.asarray(mask)),
    "tolist": lambda mask: torch.tensor(mask.tolist()),
    "from_dlpack": torch.from_dlpack,
    "share_memory_": torch.Tensor.share_memory_,
    "unbind": lambda mask: torch.stack(list(mask)),
    "untyped_storage": lambda mask: torch.tensor(mask.untyped_storage().tolist()).view(mask.shape),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_pattern_that_is_copied_or_converted(name):
    """Calibrators store what a layer was called with, and replay it."""
    expected, whole = attended(pattern()), pattern().whole()
    mask = pattern()
    copied = COPIES[name](mask)
    assert torch.equal(copied.bool(), whole)
    torch.testing.assert_close(attended(copied.bool()), expected, **TOLERANCE)
    torch.testing.assert_close(attended(mask), expected, **TOLERANCE)


def test_a_copy_of_a_pattern_is_none_of_the_original():
    for written in (False, True):
        mask = pattern()
        if written:
            mask[:, :, 3] = False
        copied = copy.deepcopy(mask)
        copied[:, :, 0] = False
        assert (attended(copied)[:, 0] == 0).all()
        assert (attended(mask)[:, 0] != 0).all()
        assert (attended(mask)[:, 3] == 0).all() == (attended(copied)[:, 3] == 0).all() == written


def test_a_pattern_prints_as_the_mask():
    assert repr(pattern()) == repr(pattern().whole())


def sum_of(mask):
    return int(mask.sum())


def test_a_pattern_in_another_process():
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(sum_of, (pattern(),)) == int(pattern().sum())


def test_every_method_of_a_tensor():
    """A pattern does what the mask does: the same result, or an error of the same kind."""
    assert child.run(methods_that_differ) == []


def methods_that_differ():
    differ = {"data_ptr", "const_data_ptr", "_version", "_cdata", "__hash__", "__class__"}
    differ |= {"__doc__", "__module__", "_neg_view", "__getstate__", "_python_dispatch", "set_"}
    random = {"bernoulli_", "random_", "chalf"}
    warnings.simplefilter("ignore")

    def outcome(x, name):
        try:
            found = getattr(x, name)
            found = found() if callable(found) else found
        except Exception as error:
            return type(error).__name__
        return found

    def alike(ours, theirs):
        if isinstance(theirs, (bool, int, str, list, torch.Size, torch.dtype)):
            return ours == theirs
        if not isinstance(theirs, torch.Tensor) or theirs.layout != torch.strided:
            return type(ours) is type(theirs)
        return ours.shape == theirs.shape and bool(
            (ours & True if ours.dtype == torch.bool else ours.nan_to_num())
            .eq(theirs & True if theirs.dtype == torch.bool else theirs.nan_to_num())
            .all()
        )

    return [
        name
        for name in sorted(set(dir(torch.Tensor)) - differ - random)
        if not alike(*(outcome(x, name) for x in (pattern(), pattern().whole())))
    ]


def test_a_pattern_whose_memory_is_asked_for_is_an_error():
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(pattern())


@pytest.mark.parametrize(
    "add",
    [
        lambda scores, mask: scores + mask,
        lambda scores, mask: mask + scores,
        lambda scores, mask: scores.add_(mask),
        lambda scores, mask: torch.add(scores, mask),
        lambda scores, mask: torch.ops.aten.add(scores, mask),
        operator.iadd,
    ],
)
def test_a_pattern_is_not_added_to_scores(add):
    with pytest.raises(NotImplementedError, match="a layer adds its bool mask to scores"):
        add(torch.zeros(2, 4, 6, 6), pattern())


@pytest.mark.parametrize(
    "made",
    [
        lambda mask: mask[..., :6],
        lambda mask: mask & torch.ones(2, 1, 6, 6, dtype=torch.bool),
        lambda mask: mask.expand(2, 2, 6, 6),
        copy.deepcopy,
        lambda mask: torch.nn.Parameter(mask, requires_grad=False),
    ],
)
def test_what_is_made_of_a_pattern_is_not_added_to_scores(made):
    mask = made(pattern())
    with pytest.raises(NotImplementedError, match="a layer adds its bool mask to scores"):
        torch.zeros(2, 2, 6, 6) + mask
    torch.testing.assert_close(attended(mask), attended(pattern()), **TOLERANCE)


def test_what_is_made_of_a_pattern_elsewhere_is_there():
    assert pattern().to("meta").device.type == "meta"
    assert pattern().to_sparse().layout == torch.sparse_coo


def test_a_layer_told_by_its_config_alone():
    """Nobody is asked then; its mask is none that the kernel has words for."""
    model = model_of("git", "eager")
    model.config._attn_implementation = "fastattn"
    with pytest.raises(NotImplementedError, match="a layer adds its bool mask to scores"):
        model(input_ids=tokens())


def test_the_mask_has_numbers_whoever_asks_first():
    """The pattern outlives those who trace with it."""
    expected = attended(pattern())
    mask = pattern()
    with FakeTensorMode(allow_non_fake_inputs=True):
        mask.sum()
    torch.testing.assert_close(attended(mask), expected, **TOLERANCE)
    mask = pattern()
    with torch.inference_mode():
        mask.sum()
    mask[:, :, 0] = False
    assert (attended(mask)[:, 0] == 0).all()
    mask, others = pattern(), torch.ones(3, 2, 1, 6, 6, dtype=torch.bool)
    assert torch.equal(torch.vmap(lambda other: other & mask)(others)[2], mask)
    torch.testing.assert_close(attended(mask), expected, **TOLERANCE)


def test_a_mask_that_is_no_tensor():
    with pytest.raises(TypeError, match="attention_mask must be a tensor, not ndarray"):
        attended(np.ones((2, 1, 6, 6), dtype=bool))


def test_a_model_that_extends_one():
    class Mine(transformers.LlamaForCausalLM):
        pass

    Mine.__module__ = "__main__"  # whose source transformers cannot read
    config = transformers.LlamaConfig(**DECODER)
    config._attn_implementation = "fastattn"
    Mine(config)


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
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


STARTS = torch.tensor([0, 10, 24], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 14, "max_length_k": 14}


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_packed_sequences_without_positions(name):
    """They would see each other."""
    model = model_of(name, "fastattn")
    ids = tokens(1)
    for mask in (None, torch.ones(1, 24, dtype=torch.long)):
        with pytest.raises(NotImplementedError, match="got cu_seq_lens_q of 2 sequences without"):
            model(input_ids=ids, attention_mask=mask, **PACKED)
    with pytest.raises(NotImplementedError, match="got cu_seq_lens_k of 2 sequences without"):
        model(input_ids=ids, **PACKED | {"cu_seq_lens_q": None})
    one = PACKED | {"cu_seq_lens_q": STARTS[::2], "cu_seq_lens_k": STARTS[::2]}
    assert torch.equal(model(input_ids=ids, **one)[0], model(input_ids=ids)[0])


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("added", [False, True])
def test_packed_sequences_with_a_mask(name, added):
    model = model_of(name, "fastattn")
    ids, parts = tokens(1), (slice(0, 10), slice(10, 24))
    mask = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    for part in parts:
        mask[..., part, part] = True
    if name == "llama":
        mask = mask.tril()
    leaking = mask.clone()
    leaking[..., 12, 3] = True
    if added:
        mask, leaking = (
            torch.zeros(x.shape).masked_fill(~x, torch.finfo(torch.float32).min)
            for x in (mask, leaking)
        )
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, **PACKED}
    out = model(attention_mask=mask, **inputs)[0]
    for part in parts:
        alone = model(input_ids=ids[:, part])[0]
        torch.testing.assert_close(out[:, part], alone, **TOLERANCE)
    with pytest.raises(NotImplementedError, match="got cu_seq_lens_q of 2 sequences without"):
        model(attention_mask=leaking, **inputs)


def test_packed_sequences_with_positions_and_lengths():
    models = [model_of("llama", implementation) for implementation in ("eager", "fastattn")]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    assert_alike(models, input_ids=tokens(1), position_ids=positions, use_cache=False, **PACKED)


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len"), [(2, 6, 9), (2, 4, 4), (2, 3, 6), (3, 6, 6), (2, 6, 1)]
)
def test_a_mask_made_for_other_lengths(batch, q_len, kv_len):
    """A cache that returns more keys than the mask has columns, say."""
    query = torch.randn(batch, 4, q_len, 8)
    key = torch.randn(batch, 2, kv_len, 8)
    lengths = r"attention_mask.shape=\(2, 1, 6, 6\), query.shape=\(.*\), key.shape=\(.*\)"
    attend = AttentionInterface()["fastattn"]
    with pytest.raises(ValueError, match=f"must have the lengths of query and key, got {lengths}"):
        attend(torch.nn.Module(), query, key, key, pattern())
    if kv_len != 1:
        with pytest.raises(ValueError, match="mask"):
            attend(torch.nn.Module(), query, key, key, pattern().whole())


def test_mask_without_axes():
    x = torch.zeros(2, 2, 2, 8)
    mask = torch.ones(2, 2, dtype=bool)
    with pytest.raises(ValueError, match=r"got attention_mask.shape=\(2, 2\)"):
        AttentionInterface()["fastattn"](torch.nn.Module(), x, x, x, mask)


def test_other_devices():
    x = torch.zeros(1, 2, 4, 8, device="meta")
    with pytest.raises(TypeError, match="query must hold numbers, got a tensor on the device meta"):
        AttentionInterface()["fastattn"](torch.nn.Module(), x, x, x, None)
