# SPDX-License-Identifier: Apache-2.0
"""Models under context_parallel: over ranks a loss and its gradients are those of one process.

What would be another computation over ranks is refused, by all of them. All cases run in one pair
of processes.
"""
# ruff: noqa: E501 - the tables have a line per case

import re
import traceback

import pytest

from tests.distributed.launch import ROOT, values

pytest.importorskip("transformers", exc_type=ImportError)

PAGE = ROOT / "docs" / "distributed.md"
LENGTH = 46  # the ranks' rows are not equally many
RANKS = 2
STARTS = [0, 5, 24, 24, 40, LENGTH]
WINDOW = {"sliding_window": 13}  # it reaches from chunk to chunk
# Of each case: the model, what its config and the call are given beside tokens and positions.
CASES = {
    "causal": ("llama", {}, {}),
    "without a cache": ("llama", {}, {"use_cache": False}),
    "not causal": ("llama", {"is_causal": False}, {}),
    "a mask that hides nothing": ("llama", {}, {"attention_mask": "ones"}),
    "a mask of the rows by all keys": ("llama", {}, {"attention_mask": "pairs"}),
    "packed": ("llama", {}, {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}),
    "packed, without a cache": ("llama", {}, {"cu_seq_lens_q": STARTS, "use_cache": False}),
    "packed, positions of the row": ("mistral", WINDOW, {"cu_seq_lens_q": STARTS, "position_ids": "row"}),
    "checkpoints": ("llama", {}, {"checkpoints": True}),
    "dropout": ("llama", {"attention_dropout": 0.4}, {"training": True}),
    "windows": ("mistral", WINDOW, {"batch": 2}),
    "windows, without a cache": ("mistral", WINDOW, {"use_cache": False}),
    "windows and softcap": ("gemma2", WINDOW, {}),
    "windows and sinks": ("gpt_oss", WINDOW, {}),
    "positions that are learnt": ("gpt2", {}, {}),
    "positions that start late": ("gpt2", {}, {"position_ids": "late"}),
}  # fmt: skip
REFUSED = {
    "padding": ("llama", {"attention_mask": "padding"}, "NotImplementedError: attn_implementation='fastattn' has no padding (an attention_mask that hides tokens) under fastattn.torch.context_parallel"),
    "no positions": ("llama", {"position_ids": None}, "ValueError: position_ids must be those of this rank's rows under fastattn.torch.context_parallel"),
    "positions of the first rows": ("llama", {"position_ids": "of a rank"}, "ValueError: position_ids must be those"),
    "positions that restart": ("llama", {"position_ids": "restart"}, "ValueError: position_ids must be those"),
    "positions that restart, without a cache": ("llama", {"position_ids": "restart", "use_cache": False}, "ValueError: position_ids must be those"),
    "positions that restart at each chunk": ("llama", {"position_ids": "chunks", "use_cache": False}, "ValueError: position_ids must be those"),
    "other packed sequences": ("llama", {"cu_seq_lens_q": [0, 9, LENGTH // 2]}, f"ValueError: cu_seq_lens_q must begin with 0 and end with {LENGTH}, the number of tokens of all ranks under fastattn.torch.context_parallel, got 0..{LENGTH // 2}"),
    "two ways to pack": ("llama", {"cu_seq_lens_q": [0, 9, LENGTH], "cu_seq_lens_k": [0, 8, LENGTH]}, "ValueError: cu_seq_lens_q and cu_seq_lens_k must be equal under"),
    "packed rows": ("llama", {"cu_seq_lens_q": [0, 9, LENGTH], "batch": 2, "position_ids": "row"}, "ValueError: query, key and value must have batch axes of size 1 with documents"),
    "a mask of the own rows": ("llama", {"attention_mask": "own"}, "ValueError: attention_mask must have a column for each key of all ranks under fastattn.torch.context_parallel"),
    "chunks": ("llama4", {}, "NotImplementedError: attn_implementation='fastattn' has no mask beside causal ones and sliding windows under"),
    "attentions": ("llama", {"output_attentions": True}, "NotImplementedError: attn_implementation='fastattn' has no output_attentions under"),
    "no positions in the layers": ("bart", {"position_ids": None}, "NotImplementedError: BartAttention must be told position_ids under"),
}  # fmt: skip


def inputs_of(given):
    """Return the whole inputs of a call, and what else it is given."""
    import torch

    from tests.transformers.models import tokens

    given = dict(given)
    rows = torch.arange(LENGTH)
    batch = given.pop("batch", 1)
    starts = torch.tensor(given.get("cu_seq_lens_q", [0, LENGTH]))
    within = rows - starts[torch.searchsorted(starts, rows, right=True) - 1]
    positions = {"row": rows, "late": rows + 7, "restart": rows % 9, "chunks": rows % 12}
    asked = given.pop("position_ids", "within")
    whole = {"input_ids": tokens(batch, LENGTH)}
    if asked not in (None, "of a rank"):
        whole["position_ids"] = positions.get(asked, within)[None].expand(batch, -1).contiguous()
    mask = given.pop("attention_mask", None)
    if mask in ("ones", "padding"):
        whole["attention_mask"] = torch.ones(batch, LENGTH, dtype=torch.long)
        whole["attention_mask"][:, :3] = mask == "ones"
    seen = torch.rand(1, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.7
    if mask in ("pairs", "own"):
        whole["attention_mask"] = seen | torch.eye(LENGTH, dtype=torch.bool)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in given:
            given[name] = torch.tensor(given[name], dtype=torch.int32)
    return whole, given


def targets_of(tokens):
    """Return the token that follows each, which a model would look for among the rank's rows."""
    import torch

    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)


def loss_and_gradients(model, whole, targets, given):
    """Return what the rows that are here add to the mean over all of them."""
    import torch

    from tests.transformers.models import gradients

    given = dict(given)
    torch.manual_seed(0)  # of dropout
    model.train(given.pop("training", False))
    if given.pop("checkpoints", False):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    count = given.pop("count")
    # shift_labels are what counts; without labels, a model computes no loss
    result = model(**whole, **given, labels=targets, shift_labels=targets, num_items_in_batch=count)
    result.loss.backward()
    return result.loss.detach(), gradients(model)


def over_ranks(comm, model, whole, targets, given):
    """Return the loss and the gradients, the sums over ranks of what each has of them."""
    from torch import distributed

    import fastattn.torch

    buffers = [targets, *whole.values()]
    dims = [1] * len(buffers)
    for i, x in enumerate(buffers):
        if x.dim() == 4:
            dims[i] = 2
    with fastattn.torch.context_parallel(comm, buffers=buffers, buffer_seq_dims=dims):
        loss, grads = loss_and_gradients(model, whole, targets, given)
    for x in (loss, *grads.values()):
        distributed.all_reduce(x)
    return loss, grads


def differences(comm, name, settings, given):
    """Return how far loss and gradients are from one process's, relative to the largest number."""
    from tests.transformers.models import model_of

    whole, given = inputs_of(given)
    targets = targets_of(whole["input_ids"])
    given["count"] = (targets != -100).sum()
    found = over_ranks(comm, model_of(name, "fastattn", **settings), whole, targets, given)
    expected = loss_and_gradients(model_of(name, "fastattn", **settings), whole, targets, given)
    pairs = [(found[0], expected[0])]
    assert found[1].keys() == expected[1].keys()
    pairs += [(found[1][x], expected[1][x]) for x in expected[1]]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def found_by(comm):
    """Return for each case the largest difference, or what was raised."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for case, (name, settings, given) in CASES.items():
        try:
            found[case] = differences(comm, name, settings, given)
        except Exception:
            found[case] = traceback.format_exc()
    return found


def refused_by(comm):
    """Return what each call raised."""
    import torch

    import fastattn.torch
    from tests.transformers.models import model_of

    torch.set_num_threads(1)
    raised = {}
    for case, (name, given, _) in REFUSED.items():
        whole, given = inputs_of(given)
        model = model_of(name, "fastattn")
        buffers = list(whole.values())
        try:
            with (
                torch.no_grad(),
                fastattn.torch.context_parallel(
                    comm, buffers=buffers, buffer_seq_dims=[1] * len(buffers)
                ),
            ):
                if case == "positions of the first rows":
                    given["position_ids"] = torch.arange(whole["input_ids"].shape[1])[None]
                if case == "a mask of the own rows":
                    rows = whole["input_ids"].shape[1]
                    whole["attention_mask"] = torch.ones(1, 1, rows, rows, dtype=torch.bool)
                model(**whole, **given)
            raised[case] = "nothing"
        except (NotImplementedError, ValueError) as error:
            raised[case] = f"{type(error).__name__}: {error}"
    return raised


@pytest.mark.promise("ranks-are-one-process")
def test_loss_and_gradients_are_those_of_one_process(tmp_path):
    for found in values("gloo", RANKS, found_by, folder=tmp_path, timeout=200):
        for case, each in found.items():
            assert isinstance(each, float), f"{case}: {each}"
            assert each < 1e-5, (case, each)


@pytest.mark.promise("ranks-agree-first")
def test_what_would_be_wrong_over_ranks_is_refused(tmp_path):
    found = values("gloo", RANKS, refused_by, folder=tmp_path, timeout=200)
    for case, (*_, message) in REFUSED.items():
        told = [each[case] for each in found]
        assert any(x.startswith(message) for x in told), (case, told)
        assert all(x.startswith(message) or message[:60] in x for x in told), (case, told)


def differences_of_the_page(comm, folder):
    """Return how far the gradients of the page's lines, which are run here, are from the whole."""
    import torch
    import transformers
    from torch.distributed.device_mesh import init_device_mesh

    import fastattn.torch
    from tests.transformers.models import gradients, model_of, tokens

    model_of("llama", "fastattn").save_pretrained(folder)  # the first rank alone writes
    torch.distributed.barrier()
    names = {
        "torch": torch,
        "fastattn": fastattn,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "folder": folder,
        "tokens": tokens(1, LENGTH),
        "mesh": {"cp": init_device_mesh("cpu", (RANKS,))},
    }
    lines = re.search(r"## Models of transformers\n.*?```\n(.*?)```", PAGE.read_text(), re.S)[1]
    exec(lines, names)
    model = model_of("llama", "eager")
    model(input_ids=tokens(1, LENGTH), labels=tokens(1, LENGTH)).loss.backward()
    found, expected = gradients(names["model"]), gradients(model)
    return max(float((found[x] - y).abs().max() / y.abs().max()) for x, y in expected.items())


@pytest.mark.skipif(not PAGE.exists(), reason="no pages beside the tests")
def test_the_lines_of_the_page(tmp_path):
    found = values("gloo", RANKS, differences_of_the_page, str(tmp_path), folder=tmp_path)
    assert max(found) < 1e-5
