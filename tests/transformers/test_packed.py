# SPDX-License-Identifier: Apache-2.0
"""Sequences packed in a row: each sees itself alone, forward and backward, or it is refused."""
# ruff: noqa: E501 - the tables have a line per case

import copy
import itertools
import re

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from tests.transformers.models import (
    DECODERS,
    ENCODERS,
    TOLERANCE,
    gradients,
    model_of,
    record,
    tokens,
)

LENGTHS = (10, 14, 1, 30)
STARTS = torch.tensor([0, 10, 24, 25, 55], dtype=torch.int32)
PARTS = [slice(int(i), int(j)) for i, j in itertools.pairwise(STARTS)]
PACKED = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 30, "max_length_k": 30}
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
IDS = tokens(1, 55)
WAYS = {
    "cu_seq_lens": PACKED,
    "the longest in a tensor": PACKED
    | {"max_length_q": torch.tensor(30), "max_length_k": torch.tensor([30])},
    "cu_seq_lens_q": {"cu_seq_lens_q": STARTS},
    "cu_seq_lens_k": {"cu_seq_lens_k": STARTS.tolist()},
    "and a mask": PACKED | {"attention_mask": torch.ones(1, 55, dtype=torch.long)},
}
WITHOUT_CACHE = {  # where transformers makes a mask of position_ids that restart
    "position_ids": {"use_cache": False},
    "both": PACKED | {"use_cache": False},
}
CASES = [
    *((name, way) for name in DECODERS | ENCODERS if name != "llama4" for way in WAYS.items()),
    *((name, way) for name in ("llama", "mistral", "gpt2") for way in WITHOUT_CACHE.items()),
]
ATTENTION = AttentionInterface()["fastattn"]
CHUNKS = "'fastattn' cannot chunk packed sequences told by cu_seq_lens_q: pass position_ids that"
CROSS = "cu_seq_lens_q and cu_seq_lens_k must be "


def assert_alone(name, out):
    """Compare with what eager gives each sequence."""
    eager = model_of(name, "eager")
    for part in PARTS:
        torch.testing.assert_close(out[:, part], eager(input_ids=IDS[:, part])[0], **TOLERANCE)


def of_random(heads=4, kv_heads=2, length=55, grad=False):
    """Return a query, key and value of one row."""
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, n, length, 8, generator=rng, requires_grad=grad)
        for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.promise(
    "packed-sequences-see-themselves",
    "transformers-means-eager",
    "transformers-makes-no-mask-of-pairs",
)
@pytest.mark.parametrize("implementation", ["fastattn", "fastattn_flash"])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_each_sees_itself_alone(monkeypatch, name, implementation, way):
    calls, others = record(monkeypatch, "varlen_attention"), record(monkeypatch)
    model = model_of(name, implementation)
    assert_alone(name, model(input_ids=IDS, position_ids=POSITIONS, **way[1])[0])
    assert (len(calls), others) == (2, [])  # one a layer
    assert not any("mask" in call for call in calls)


@pytest.mark.promise("transformers-means-eager", "transformers-refuses-other-attention")
def test_chunks_of_packed_sequences():
    """Chunks start anew in each sequence, where its positions do."""
    model = model_of("llama4", "fastattn")
    inputs = {"input_ids": IDS, "position_ids": POSITIONS}
    for way in WITHOUT_CACHE.values():
        assert_alone("llama4", model(**inputs, **way)[0])
    for wrong in ({}, {"use_cache": False, "position_ids": torch.arange(55)[None]}):
        with pytest.raises(NotImplementedError, match=CHUNKS):
            model(**inputs | PACKED | wrong)
    other = torch.tensor([0, 10, 17, 24, 25, 55])  # positions do not restart at 17
    with pytest.raises(NotImplementedError, match=CHUNKS):
        model(**inputs, use_cache=False, cu_seq_lens_q=other)


@pytest.mark.promise("transformers-refuses-other-attention")
@pytest.mark.parametrize(
    "changed",
    [
        copy.deepcopy,
        lambda mask: mask[:, :, :, :55],
        lambda mask: copy.deepcopy(mask)[:, :, :55].clone(),
        lambda mask: torch.ones(1, 1, 55, 55, dtype=torch.bool) & mask,
        lambda mask: torch.cat(mask.split(30, -1), -1),
        lambda mask: torch.zeros(1, 1, 55, 55).masked_fill(~mask, -torch.inf),
    ],
)
def test_chunks_of_a_mask_that_a_model_changed(monkeypatch, changed):
    """Whatever is made of the mask, its chunks are those of the row."""
    module = transformers.models.llama4.modeling_llama4
    chunked = module.create_chunked_causal_mask
    monkeypatch.setattr(
        module, "create_chunked_causal_mask", lambda **given: changed(chunked(**given))
    )
    model = model_of("llama4", "fastattn")
    inputs = {"input_ids": IDS, "position_ids": POSITIONS, **PACKED}
    with pytest.raises(NotImplementedError, match=CHUNKS):
        model(**inputs)
    out = model(**inputs, use_cache=False)[0]
    monkeypatch.undo()
    assert_alone("llama4", out)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize(
    "numbers", [(0, 0, 0, 1, 1, 2, 2, 2), (3, 3, 7, 7, 7, 7, 7, 9), (0, 1) * 4]
)
@pytest.mark.parametrize("window", [None, 2])
def test_the_mask_of_packed_sequences(numbers, window):
    """Whoever asks for its numbers gets those of transformers, of rows that differ too."""
    rows = torch.tensor([numbers, sorted(numbers)])
    kind = masking_utils.sliding_window_causal_mask_function(window) if window else None
    function = masking_utils.and_masks(
        kind or masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(rows),
    )
    asked = {"batch_size": 2, "q_length": 8, "kv_length": 8, "mask_function": function}
    whole = masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False)
    mask = AttentionMaskInterface()["fastattn"](**asked)
    query, key, value = (torch.cat([x, x.flip(1)]) for x in of_random(4, 4, 8))
    outs = [ATTENTION(torch.nn.Module(), query, key, value, x)[0] for x in (mask, whole)]
    torch.testing.assert_close(*outs, **TOLERANCE)
    assert torch.equal(mask & True, whole)


def test_rows_of_a_batch_that_restart(monkeypatch):
    calls = record(monkeypatch, "varlen_attention")
    models = [model_of("mistral", x) for x in ("eager", "fastattn")]
    two = torch.cat([torch.arange(n) for n in (30, 25)])[None]
    inputs = {"input_ids": tokens(2, 55), "position_ids": torch.cat([POSITIONS, two])}
    expected, out = (model(**inputs, use_cache=False)[0] for model in models)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert [call.get("window") for call in calls] == [(5, None)] * 2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_one_sequence_is_a_row(name):
    model = model_of(name, "fastattn")
    one = {"cu_seq_lens_q": STARTS[::4], "cu_seq_lens_k": STARTS[::4]}
    assert torch.equal(model(input_ids=IDS, **one)[0], model(input_ids=IDS)[0])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_no_sequence_gets_in_a_sequence_without_tokens(name):
    model = model_of(name, "fastattn")
    empty = torch.tensor([0, 0, 10, 24, 24, 25, 55, 55])
    inputs = {"input_ids": IDS, "position_ids": POSITIONS}
    expected = model(**inputs, **PACKED)[0]
    for more in ({}, {"output_attentions": True}):
        out = model(**inputs, cu_seq_lens_q=empty, cu_seq_lens_k=empty, **more)[0]
        torch.testing.assert_close(out, expected, **TOLERANCE)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert"])
def test_attentions_of_packed_sequences(name):
    model, eager = model_of(name, "fastattn"), model_of(name, "eager")
    given = {"position_ids": POSITIONS, "output_attentions": True}
    out = model(input_ids=IDS, **given, **PACKED)
    assert_alone(name, out[0])
    for part in PARTS:
        with torch.no_grad():
            alone = eager(input_ids=IDS[:, part], output_attentions=True)
        for ours, theirs in zip(out.attentions, alone.attentions, strict=True):
            torch.testing.assert_close(ours[..., part, part], theirs, **TOLERANCE)
            assert ours[..., part, :].sum() == pytest.approx(float(theirs.sum()), rel=1e-5)


@pytest.mark.promise("transformers-means-eager")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_a_step_of_training(name):
    """Packed, a batch has the gradients that it has padded."""
    packed, padded = model_of(name, "fastattn").train(), model_of(name, "eager").train()
    rows, seen = torch.zeros(4, 30, dtype=torch.long), torch.zeros(4, 30, dtype=torch.long)
    for i, part in enumerate(PARTS):
        rows[i, : LENGTHS[i]] = IDS[0, part]
        seen[i, : LENGTHS[i]] = 1
    for model in (packed, padded):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    given = {"input_ids": IDS, "position_ids": POSITIONS}
    losses = []
    for states in (
        packed(**given, **PACKED)[0][0],
        padded(input_ids=rows, attention_mask=seen)[0][seen.bool()],
    ):
        wanted = torch.arange(len(states)) % states.shape[-1]
        losses.append(cross_entropy(states, wanted))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], **TOLERANCE)
    ours, theirs = gradients(packed), gradients(padded)
    assert ours.keys() == theirs.keys()
    for weights, expected in theirs.items():
        assert (ours[weights] - expected).abs().max() <= 1e-5, weights


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mask_of_pairs_beside(name, added):
    """It hides more; what it does not hide stays hidden between sequences."""
    model = model_of(name, "fastattn")
    mask = torch.ones(1, 1, 55, 55, dtype=torch.bool)
    if name == "llama":
        mask = mask.tril()
    mask[..., 40:, 30] = False
    inputs = {"input_ids": IDS, "position_ids": POSITIONS}

    def given(part):
        seen = mask[..., part, part]
        return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if added else seen

    out = model(**inputs, attention_mask=given(slice(None)), **PACKED)[0]
    for part in PARTS:
        alone = model(input_ids=IDS[:, part], attention_mask=given(part))[0]
        torch.testing.assert_close(out[:, part], alone, **TOLERANCE)


def test_position_bias_and_sinks():
    query, key, value = of_random(grad=True)
    rng = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 4, 55, 55, generator=rng, requires_grad=True)
    options = {"scaling": 0.3, "softcap": 5.0, "s_aux": torch.randn(4, generator=rng)}
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = ATTENTION(module, query, key, value, None, position_bias=bias, **options, **PACKED)
    ours = torch.autograd.grad(out.square().sum(), (query, key, value, bias))
    parts = [
        ATTENTION(
            module,
            *(x[:, :, part] for x in (query, key, value)),
            None,
            position_bias=bias[..., part, part],
            **options,
        )[0]
        for part in PARTS
    ]
    alone = torch.cat(parts, 1)
    torch.testing.assert_close(out, alone, **TOLERANCE)
    theirs = torch.autograd.grad(alone.square().sum(), (query, key, value, bias))
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, expected, **TOLERANCE)


@pytest.mark.parametrize("bias", [None, torch.zeros(1, 4, 55, 55)])
def test_dropout_stays_in_its_sequence(bias):
    """What is dropped is drawn from torch's seed, and NaN in one sequence reaches no other."""
    query, key, value = of_random()
    key[:, :, :10] = value[:, :, :10] = torch.nan
    module = torch.nn.Module().train()

    def attend(dropout):
        torch.manual_seed(3)
        given = {"dropout": dropout, "position_bias": bias}
        return ATTENTION(module, query, key, value, None, **given, **PACKED)[0]

    out = attend(0.5)
    assert out[:, :10].isnan().all()
    assert torch.equal(out[:, 10:], attend(0.5)[:, 10:])
    assert not out[:, 10:].isnan().any()
    assert not torch.equal(out[:, 10:], attend(0.0)[:, 10:])


@pytest.mark.parametrize("name", ["llama", "llama4", "bert"])
def test_compiled(name):
    torch.compiler.reset()
    model = model_of(name, "fastattn")
    inputs = {"input_ids": IDS, "position_ids": POSITIONS, "use_cache": False, **PACKED}
    if name == "bert":
        del inputs["use_cache"]
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], **TOLERANCE)
        with pytest.raises(ValueError, match=r"cu_seq_lens_q must be within 0\.\.55"):
            compiled(**inputs | {"cu_seq_lens_q": STARTS + 1})
        if name == "llama4":
            for wrong in ({"use_cache": True}, {"position_ids": torch.arange(55)[None]}):
                with pytest.raises(NotImplementedError, match=CHUNKS):
                    compiled(**inputs | wrong)
        torch.compiler.reset()
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="where packed sequences start is"):
            whole(**inputs)


# What is refused.


def test_under_caches():
    """What is packed may fill a cache, and is refused where the cache holds more."""
    model = model_of("llama", "fastattn")
    inputs = {"input_ids": IDS, "position_ids": POSITIONS, **PACKED}
    filled = transformers.DynamicCache(config=model.config)
    static = transformers.StaticCache(config=model.config, max_cache_len=55)
    for cache in (filled, static):
        assert_alone("llama", model(**inputs, cache=cache)[0])
    longer = transformers.StaticCache(config=model.config, max_cache_len=64)
    for cache, keys in ((filled, 110), (longer, 64)):
        refused = f"end with {keys}, the number of keys, a cache's included, got 0..55"
        with pytest.raises(ValueError, match=f"^cu_seq_lens_k must begin with 0 and {refused}$"):
            model(**inputs, cache=cache)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seq_lens_q": STARTS[:-1]}, ValueError, "cu_seq_lens_q must begin with 0 and end with 55, the number of queries, got 0..25"),
        ({"cu_seq_lens_k": STARTS[:-1]}, ValueError, "cu_seq_lens_k must begin with 0 and end with 55, the number of keys, a cache's included, got 0..25"),
        ({"cu_seq_lens_q": STARTS[1:]}, ValueError, "cu_seq_lens_q must begin with 0 and end with 55, the number of queries, got 10..55"),
        ({"cu_seq_lens_q": STARTS * 2}, ValueError, "cu_seq_lens_q must be within 0..55, the rows there are, got 0..110"),
        ({"cu_seq_lens_q": torch.tensor([0, 24, 10, 55])}, ValueError, "cu_seq_lens_q must ascend, got 24 before 10 at 1"),
        ({"cu_seq_lens_q": STARTS.float()}, TypeError, "cu_seq_lens_q must be an array of integers, not float32"),
        ({"cu_seq_lens_k": STARTS[None]}, ValueError, "cu_seq_lens_k must have shape (sequences + 1,), got cu_seq_lens_k.shape=(1, 5)"),
        ({"cu_seq_lens_k": torch.tensor([0, 30, 55])}, ValueError, CROSS + "equally long, got 5 and 3 entries"),
        ({"cu_seq_lens_k": torch.tensor([0, 10, 23, 25, 55])}, ValueError, CROSS + "equal in a causal layer and in one with a window, got 24 and 23 at 2"),
        ({"max_length_q": 29}, ValueError, "max_length_q must be 30, the longest of cu_seq_lens_q, or more, got 29"),
        ({"max_length_k": torch.tensor(14)}, ValueError, "max_length_k must be 30, the longest of cu_seq_lens_k, or more, got 14"),
        ({"max_length_q": torch.tensor([30, 30])}, TypeError, "max_length_q must be an int, not Tensor"),
        ({"max_length_q": torch.tensor(torch.nan)}, TypeError, "max_length_q must be an int, not float"),
        ({"max_length_q": torch.nan}, TypeError, "max_length_q must be an int, not float"),
        ({"max_length_k": "x"}, TypeError, "max_length_k must be an int, not str"),
    ],
)  # fmt: skip
@pytest.mark.promise("transformers-refuses-other-attention")
def test_starts_that_disagree(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        model_of("llama", "fastattn")(input_ids=IDS, position_ids=POSITIONS, **PACKED | changes)


def test_a_batch_of_rows_with_starts():
    with pytest.raises(ValueError, match=r"^cu_seq_lens_q must tell of one row .* a batch of 2$"):
        model_of("bert", "fastattn")(input_ids=tokens(2, 55), **PACKED)


def test_other_numbers_of_keys():
    """Cross-attention: each sequence's queries see its keys, of which it may have none."""
    query, (_, key, value) = of_random()[0], of_random(length=20)
    starts = torch.tensor([0, 7, 7, 12, 20])
    told = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": starts}
    out, _ = ATTENTION(torch.nn.Module(), query, key, value, None, **told)
    for part, i, j in zip(PARTS, starts[:-1], starts[1:], strict=True):
        keys = (key[:, :, i:j], value[:, :, i:j])
        alone = ATTENTION(torch.nn.Module(), query[:, :, part], *keys, None)[0]
        torch.testing.assert_close(out[:, part], alone, **TOLERANCE)
