# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes a call on a GPU when the environment asks for one.

Calls fastattn.cuda._choose, which asks no GPU; whole calls are in the emulator.
"""

import re

import pytest

from fastattn.cuda import _choose
from fastattn.cuda._choose import FORMS, Choice, Question
from tests.support.problems import make_problem

PLAIN = Question(
    query_dtype="bfloat16",
    key_dtype="bfloat16",
    head_dim=128,
    value_head_dim=128,
    q_len=1024,
    kv_len=1024,
    group=1,
    given=(),
    scale=0.1,
    far=False,
    capability=(9, 0),
)
# What each of these calls can be computed by, best first.
FORWARD = {
    "hopper": (PLAIN, ("wgmma", "mma", "simt")),
    "head_dim 96": (PLAIN._replace(head_dim=96, value_head_dim=96), ("mma", "simt")),
    "head_dim 80": (PLAIN._replace(head_dim=80, value_head_dim=80), ("simt",)),
    "ampere": (PLAIN._replace(capability=(8, 0)), ("mma", "simt")),
    "turing": (PLAIN._replace(capability=(7, 5)), ("simt",)),
    "float32": (PLAIN._replace(query_dtype="float32", key_dtype="float32"), ("simt",)),
    "few queries": (PLAIN._replace(q_len=1), ("decode", "wgmma", "mma", "simt")),
    "few queries, ampere": (PLAIN._replace(q_len=1, capability=(8, 0)), ("decode", "mma", "simt")),
    "mask": (PLAIN._replace(given=("mask",)), ("simt",)),
}
BACKWARD = {
    "hopper": (PLAIN, ("wgmma", "mma", "simt")),
    "few queries": (PLAIN._replace(q_len=1), ("wgmma", "mma", "simt")),
    "ampere": (PLAIN._replace(capability=(8, 0)), ("mma", "simt")),
    "head_dim 96": (PLAIN._replace(head_dim=96, value_head_dim=96), ("simt",)),
}
CALLS = [
    *(pytest.param(_choose.forward, *x, id=name) for name, x in FORWARD.items()),
    *(
        pytest.param(lambda q: _choose.backward(q, False), *x, id=f"backward, {name}")
        for name, x in BACKWARD.items()
    ),
]


@pytest.fixture
def ask(monkeypatch):
    """Let a test set the variable, which is read once."""

    def set_variable(name):
        if name is None:
            monkeypatch.delenv(_choose.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(_choose.VARIABLE, name)
        _choose.forced.cache_clear()

    yield set_variable
    _choose.forced.cache_clear()


@pytest.mark.promise("gpu-kernel-can-be-forced")
@pytest.mark.parametrize(("choose", "question", "possible"), CALLS)
def test_the_environment_chooses_among_what_can(choose, question, possible, ask):
    for nothing in (None, ""):
        ask(nothing)
        assert choose(question).form == possible[0]
    reason = choose(question).reason
    for form in FORMS:
        ask(form)
        if form in possible:
            assert choose(question) == Choice(form, "FASTATTN_CUDA_KERNEL asks for it")
            continue
        choices = ", ".join(x for x in FORMS if x in possible)
        text = f"FASTATTN_CUDA_KERNEL='{form}' cannot compute this call, these can: {choices} "
        with pytest.raises(ValueError, match=f"^{re.escape(text + f'({reason})')}$"):
            choose(question)


@pytest.mark.promise("gpu-kernel-can-be-forced")
@pytest.mark.parametrize("name", ["MMA", "mma ", "flash", "avx2"])
def test_an_unknown_kernel_is_refused(name, ask):
    ask(name)
    text = f"FASTATTN_CUDA_KERNEL='{name}' is not one of: wgmma, mma, decode, simt"
    for choose in (_choose.forward, lambda question: _choose.backward(question, True)):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            choose(PLAIN)


def test_the_variable_is_read_once(ask, monkeypatch):
    ask("mma")
    assert _choose.forward(PLAIN).form == "mma"
    monkeypatch.setenv(_choose.VARIABLE, "simt")
    assert _choose.forward(PLAIN).form == "mma"


@pytest.mark.promise("gpu-kernel-can-be-forced")
@pytest.mark.parametrize("form", ["wgmma", "mma", "simt"])
def test_a_call_obeys(form, ask):
    """In the emulator of a Hopper GPU, where a call without the variable takes wgmma."""
    pytest.importorskip("numba_cuda", reason="needs the extra `cuda`")
    from fastattn import cuda
    from tests.cuda.cases import assert_right
    from tests.cuda.fake_device import fake_device

    arrays = make_problem(33, 40, 64, heads=1, batch=(1,), dtype="float16")
    ask(form)
    with fake_device((9, 0)) as device:
        operands = [device.array(x) for x in arrays]
        plan = cuda.explain(*operands)
        assert (plan["kernel"], plan["gradients"]) == (form, form)
        assert plan["reason"] == "FASTATTN_CUDA_KERNEL asks for it"
        out, lse = cuda.attention(*operands, return_lse=True)
        assert [name for name in device.launched if form in name] == device.launched
        assert_right(device.values(out), device.values(lse), *arrays)


def test_explain_says_that_decode_has_no_gradients(ask):
    pytest.importorskip("numba_cuda", reason="needs the extra `cuda`")
    from fastattn import cuda
    from tests.cuda.fake_device import fake_device

    arrays = make_problem(1, 40, 64, heads=1, batch=(1,), dtype="float16")
    ask("decode")
    with fake_device((9, 0)) as device:
        plan = cuda.explain(*[device.array(x) for x in arrays])
    assert plan["kernel"] == "decode"
    assert plan["gradients"].startswith(
        "none: FASTATTN_CUDA_KERNEL='decode' cannot compute this call, these can: wgmma, mma, simt"
    )
