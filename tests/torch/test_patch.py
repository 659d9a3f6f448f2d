# SPDX-License-Identifier: Apache-2.0
"""`patch` puts our function in the place of torch's, says what it answered, and restores."""

import itertools
import threading

import pytest
import torch

import fastattn.torch as ft
from tests.torch.problems import EXACT, F, close, operands, plain_with_dropout, rand, state


@pytest.mark.promise("patch-restores")
def test_patch():
    before = state()
    tensors = operands()
    with ft.patch() as p:
        assert F.scaled_dot_product_attention is not EXACT
        assert not torch.backends.mha.get_fastpath_enabled()
        close(F.scaled_dot_product_attention(*tensors), EXACT(*tensors))
        assert p.report() == {"active": True, "answered": 1, "left": {}}
    assert state() == before
    assert str(p.report()).startswith("fastattn.torch.patch\n")
    assert p.report()["active"] is False


def test_plain_call_and_close():
    before = state()
    p = ft.patch()
    assert state() != before
    p.close()
    assert state() == before
    p.close()
    assert state() == before


@pytest.mark.promise("patch-restores")
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_patches_nest_and_close_in_any_order(order, switch):
    torch.backends.mha.set_fastpath_enabled(switch)
    try:
        before = state()
        patches = [ft.patch() for _ in range(3)]
        for count, place in enumerate(order):
            F.scaled_dot_product_attention(*operands())
            patches[place].close()
            assert (state() == before) == (count == 2)
        assert state() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.promise("patch-restores")
def test_patch_after_an_exception():
    before = state()
    with pytest.raises(KeyError), ft.patch(), ft.patch():
        raise KeyError
    assert state() == before


@pytest.mark.promise("patch-restores")
def test_a_patch_leaves_another_librarys_in_place():
    p = ft.patch()
    below = F.scaled_dot_product_attention

    def other(*tensors, **options):
        return below(*tensors, **options)

    F.scaled_dot_product_attention = other
    try:
        with ft.patch() as inner:
            F.scaled_dot_product_attention(*operands())
        assert F.scaled_dot_product_attention is other
        p.close()
        assert F.scaled_dot_product_attention is other
        close(other(*operands()), EXACT(*operands()))
        assert inner.report()["answered"] == 1
        assert p.report()["answered"] == 0
    finally:
        F.scaled_dot_product_attention = EXACT


@pytest.mark.promise("patch-restores")
def test_patch_in_threads():
    tensors = operands()
    expected = ft.scaled_dot_product_attention(*tensors)
    failures = []

    def keep_patching():
        try:
            for _ in range(50):
                with ft.patch() as p:
                    assert torch.equal(F.scaled_dot_product_attention(*tensors), expected)
                    assert p.report()["active"]
        except AssertionError as error:
            failures.append(error)

    before = state()
    threads = [threading.Thread(target=keep_patching) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state() == before


@pytest.mark.promise("patch-counts-what-it-leaves")
@pytest.mark.filterwarnings("ignore")
def test_what_is_left_to_torch_is_counted():
    x = rand(2, 3, 5, 4, dtype=torch.float32)
    meta = x.to("meta")

    class Subclass(torch.Tensor):
        pass

    cases = {
        "device meta": lambda sdpa: sdpa(meta, meta, meta).device,
        "type NestedTensor": lambda sdpa: sdpa(
            *[torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)] * 3
        ).shape[0],
        "type Subclass": lambda sdpa: type(sdpa(x.as_subclass(Subclass), x, x)),
        "a transform or mode is active": lambda sdpa: (
            torch.func.vmap(lambda y: sdpa(y, y, y))(x).shape
        ),
    }
    for why, case in cases.items():
        with ft.patch() as p:
            left = case(F.scaled_dot_product_attention)
        assert left == case(EXACT)
        assert p.report()["left"] == {why: 1}
        assert why in str(p.report())
    for bad in ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, {"dropout_p": 2.0}):
        with ft.patch() as p, pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(x, x, x, **bad)
        assert p.report()["answered"] == 0
        assert list(p.report()["left"].values()) == [1]


MODULES = (
    "MultiheadAttention",
    "padded",
    "TransformerEncoderLayer",
    "causal",
    "TransformerEncoder",
    "Transformer",
)


def modules(dropout=0.0):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": dropout}
    x, y = rand(3, 6, 16, dtype=torch.float32), rand(3, 4, 16, dtype=torch.float32)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6)
    mha = torch.nn.MultiheadAttention(16, 4, **options)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, **options)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    whole = torch.nn.Transformer(16, 4, 2, 2, 32, **options)
    return {
        "MultiheadAttention": (mha, lambda: mha(x, x, x, need_weights=False)[0], 1),
        "padded": (mha, lambda: mha(x, x, x, key_padding_mask=padding, need_weights=False)[0], 1),
        "TransformerEncoderLayer": (layer, lambda: layer(x), 1),
        "causal": (layer, lambda: layer(x, src_mask=causal, is_causal=True), 1),
        "TransformerEncoder": (encoder, lambda: encoder(x, src_key_padding_mask=padding), 2),
        "Transformer": (whole, lambda: whole(x, y), 6),
    }


@pytest.mark.promise("patch-counts-what-it-leaves", "torch-gradients")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, training):
    module, forward, calls = modules()[name]
    module.train(training)
    expected = forward()
    with ft.patch() as p:
        out = forward()
        with torch.no_grad():  # where the fast path would go around the function
            close(forward(), out)
        assert p.report() == {"active": True, "answered": 2 * calls, "left": {}}
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out.sum().backward()
    ours = [x.grad.clone() for x in module.parameters()]
    module.zero_grad()
    expected.sum().backward()
    for grad, parameter in zip(ours, module.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.promise("dropout-repeats-with-torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_modules_with_dropout(name, monkeypatch):
    """Every dropout of a module in training draws what it would beside the plain formula."""
    module, forward, calls = modules(dropout=0.1)[name]

    def run():
        torch.manual_seed(3)
        module.zero_grad()
        out = forward()
        out.sin().sum().backward()
        return [out.detach(), *(x.grad.clone() for x in module.parameters())]

    with ft.patch() as p:
        ours, again = run(), run()
        assert p.report() == {"active": True, "answered": 2 * calls, "left": {}}
    assert all(map(torch.equal, ours, again))
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", plain_with_dropout)
        theirs = run()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)
    module.eval()
    with ft.patch() as p:
        ours = forward()
        assert p.report()["answered"] == calls
    torch.testing.assert_close(ours, forward(), rtol=1e-5, atol=1e-5)


class Layer(torch.nn.Module):
    """A layer that calls ours by name."""

    def __init__(self, dropout_p):
        super().__init__()
        self.project, self.dropout_p = torch.nn.Linear(16, 48), dropout_p

    def forward(self, x, starts):
        query, key, value = self.project(x).unflatten(-1, (3, 4, 4)).unbind(-3)
        heads_first = [y.transpose(1, 2) for y in (query, key, value)]
        out = ft.scaled_dot_product_attention(*heads_first, None, self.dropout_p, is_causal=True)
        out = out + ft.attention(*heads_first, window=(2, 0))
        rows = [y.flatten(0, 1) for y in (query, key, value)]
        packed = ft.varlen_attention(*rows, starts, starts).unflatten(0, x.shape[:2])
        return (out.transpose(1, 2) + packed).flatten(-2)


@pytest.mark.promise("torch-compiles")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_compile_of_a_module(dropout_p, fresh_compiler):
    torch.manual_seed(0)
    layer = Layer(dropout_p)
    x, starts = rand(2, 6, 16, dtype=torch.float32), torch.tensor([0, 5, 12])
    explained = torch._dynamo.explain(layer)(x, starts)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    results = []
    for module in (layer, torch.compile(layer, fullgraph=True)):
        torch.manual_seed(1)
        out = module(x, starts)
        out.sin().sum().backward()
        results.append([out, *(y.grad.clone() for y in layer.parameters())])
        layer.zero_grad()
    if dropout_p == 0:  # else inductor draws another seed
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compile_under_patch(fresh_compiler):
    _, forward, _ = modules()["TransformerEncoderLayer"]
    expected = forward()
    with ft.patch() as p:
        for backend in ("eager", "inductor"):
            out = torch.compile(forward, fullgraph=True, backend=backend)()
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            report = p.report()
            assert report["answered"]
            assert not report["left"]
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(forward, fullgraph=True, backend="eager")(), expected, rtol=1e-5, atol=1e-5
    )
    assert p.report() == report | {"active": False}
