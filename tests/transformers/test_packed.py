# SPDX-License-Identifier: Apache-2.0
"""Packed sequences see themselves alone, or are refused."""

import pytest
import torch

from tests.transformers.models import TOLERANCE, assert_alike, model_of, tokens

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
