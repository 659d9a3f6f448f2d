# SPDX-License-Identifier: Apache-2.0
"""Models give, write and learn what they do with transformers' own attention."""

import itertools

import pytest
import torch
import transformers
from transformers import AttentionInterface

from tests.transformers.models import (
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    TOLERANCE,
    assert_alike,
    gradients,
    model_of,
    padding,
    record,
    tokens,
)

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
                    input_ids=tokens()[:, start:stop], attention_mask=mask[:, :stop], cache=cache
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
