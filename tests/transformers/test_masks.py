# SPDX-License-Identifier: Apache-2.0
"""What a query sees, in which words; what stands for a mask, in the hands of others."""

import copy
import io
import itertools
import operator
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import fastattn
from tests.support import child
from tests.transformers.models import TOLERANCE, model_of, padding, record, tokens

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


def packed(numbers=(0,) * 5 + (1,) * 9 + (2,) * 18):
    """Sequences of a row of 32, of which the pattern may be a part."""
    of_sequence = torch.tensor(numbers).repeat(2, 1)
    return masking_utils.and_masks(
        causal(), masking_utils.packed_sequence_mask_function(of_sequence)
    )


def packed_and_mixed():
    return packed((0, 1) * 16)


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
        packed,
        packed_and_mixed,
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


def test_a_mask_that_is_no_tensor():
    with pytest.raises(TypeError, match="attention_mask must be a tensor, not ndarray"):
        attended(np.ones((2, 1, 6, 6), dtype=bool))
