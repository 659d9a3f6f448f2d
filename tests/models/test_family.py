# SPDX-License-Identifier: Apache-2.0
"""What families share: whatever a config.json says is computed with, or refused."""

import dataclasses
import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn.models import bert, gpt2, llama, marian, whisper
from fastattn.models._context import Context
from fastattn.models._family import RotaryConfig
from fastattn.models._load import FAMILIES

HEADS = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
HEADS |= dict(intermediate_size=8, max_position_embeddings=8)
SIDE = ("layers", "attention_heads", "ffn_dim")
SIDES = dict.fromkeys([f"{x}_{part}" for x in ("encoder", "decoder") for part in SIDE], 2)
SIDES |= dict(vocab_size=9, d_model=8)
USUAL = {
    llama.Config: HEADS | {"model_type": "qwen2"},
    gpt2.Config: dict(vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2),
    bert.Config: HEADS | {"type_vocab_size": 2},
    marian.Config: SIDES | {"max_position_embeddings": 8},
    whisper.Config: SIDES | dict(num_mel_bins=8, max_source_positions=8, max_target_positions=8),
}
HOSTILE = [
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31 - 1,
    2**63,
    10**400,
    1.5,
    1e308,
    float("nan"),
    "",
    "x\ud800",
]
HOSTILE += [[], {}, [{}], [[]] * 2, ["full_attention"] * 2, {"rope_type": "linear", "factor": 1e9}]
HOSTILE += [
    {"rope_type": {}},
    {"rope_theta": 10**400},
    {"full_attention": {}},
    {"type": "x" * 10**5},
]


def test_every_family_is_here():
    assert {config for _, config in FAMILIES.values()} == USUAL.keys()


@pytest.mark.parametrize("config", USUAL, ids=lambda x: x.__module__)
def test_any_value_of_any_key_is_taken_or_refused(config):
    refusals = []
    for key, value in itertools.product(config.__dataclass_fields__, HOSTILE):
        try:
            config.read(USUAL[config] | {key: value})
        except ValueError as error:
            refusals.append(str(error))
    assert max(map(len, refusals)) < 500
    assert len(refusals) < len(config.__dataclass_fields__) * len(HOSTILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partial(RotaryConfig):
    turns_part = True


def test_a_part_of_the_columns_is_turned_in_pairs():
    config = Partial.read({"partial_rotary_factor": 0.5})
    assert config.rotary_dim(8) == 4
    assert len(config.frequencies(8)) == 2
    for part in (0.4, 1.5):
        with pytest.raises(ValueError, match=rf"must be even, from 2 to 8, got 8 \* {part}"):
            Partial.read({"partial_rotary_factor": part}).rotary_dim(8)


def test_null_is_as_good_as_nothing():
    config = llama.Config.read(USUAL[llama.Config] | {"rms_norm_eps": None, "head_dim": None})
    assert (config.rms_norm_eps, config.head_size) == (1e-6, 4)
    assert llama.Config.read(USUAL[llama.Config] | {"sliding_window": None}).sliding_window is None


def test_a_context_numbers_positions_and_keeps_values_of_another_size():
    context = Context(3, 1, 1, 4, value_head_dim=2)
    context.feed([2, 0, 3])
    assert_array_equal(context.positions, [0, 1, 0, 1, 2])
    x = np.zeros((5, 1, 4), np.float32)
    value = np.arange(10, dtype=np.float32).reshape(5, 1, 2)
    means = [[0, 1], [1, 2], [4, 5], [5, 6], [6, 7]]  # of what each sees: all keys are alike
    assert_array_equal(context.attend(0, np.repeat(x, 3, 1), x, value), np.tile(means, 3))
    context.reorder([1, 2])
    assert_array_equal(context.lengths, [0, 3])
    context.feed([1, 1])
    assert_array_equal(context.positions, [0, 3])
    assert_array_equal(context.attend(0, x[:2], x[:2], value[:2]), [[0, 1], [5, 6]])


def test_a_sequence_goes_on_in_several_ways():
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 40, 2, 8), np.float32)

    def read(context, *rows):
        context.feed([len(x) for x in rows])
        rows = np.concatenate(rows)
        return context.attend(0, query[rows], key[rows], value[rows])

    context = Context(3, 1, 2, 8)
    read(context, np.arange(20), np.arange(5), np.arange(3))
    context.reorder([2, 0, 0, 2, 0])
    assert context.lengths.tolist() == [3, 20, 20, 3, 20]
    nexts = np.array([[3], [20], [21], [5], [22]])
    found = read(context, *nexts)
    context.reorder([4, 1, 4])
    again = read(context, [30], [31], [32, 33])
    starts = [np.arange(n) for n in (3, 20, 20, 3, 20)]
    for row, start, new in zip(found, starts, nexts, strict=True):
        alone = Context(1, 1, 2, 8)
        read(alone, start)
        assert_array_equal(row, read(alone, new)[0])
    for rows, history in ((again[:1], [22, 30]), (again[1:2], [20, 31]), (again[2:], [22, 32, 33])):
        alone = Context(1, 1, 2, 8)
        read(alone, np.arange(20))
        read(alone, history[:1])
        assert_array_equal(rows, read(alone, history[1:]))


def test_all_layers_of_qwen2_may_slide():
    stated = USUAL[llama.Config] | {"use_sliding_window": True, "sliding_window": 3}
    for first, windows in [(0, [3, 3]), (1, [None, 3])]:
        config = llama.Config.read(stated | {"max_window_layers": first})
        assert [config.window(i) for i in range(2)] == windows
