# SPDX-License-Identifier: Apache-2.0
"""fastattn.torch under torch's modes and switches, and given tensors that are more than numbers.

Each row of the table of modes and switches in docs/torch.md has a case here of the same name.
"""

import contextlib
import functools
import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
import fastattn.torch as ft
from tests.torch import overriding
from tests.torch.problems import (
    DIRECT,
    EXACT,
    F,
    both,
    by_name,
    near,
    patched,
    rand,
    small_operands,
)

pytestmark = pytest.mark.filterwarnings("ignore")
OFF = "torch's flash attention is switched off"
WATCHED = "a transform or mode is active"


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def flash_off():
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# The rows.

CASES = {
    "a class that overrides `__torch_function__`": overriding.functions,
    "a class that overrides `__torch_dispatch__`": overriding.operators,
    "a class that overrides neither": overriding.nothing,
}


def row(name):
    """Register a case of the table by the first words of its row, which must be unique there."""

    def register(case):
        CASES[name] = case
        return case

    return register


def operators(run_it):
    """Return the names of the operators that run_it() calls."""
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        run_it()
    return names


@row("`no_grad`, `inference_mode`")
def no_grad():
    leaves = small_operands(grad=True)

    def check(sdpa):
        with torch.no_grad():
            assert not sdpa(*leaves).requires_grad
        with torch.inference_mode():
            made = [x + 1 for x in leaves]
            assert sdpa(*made).is_inference()
        near(sdpa(*made), EXACT(*made))
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            sdpa(leaves[0], *made[1:])

    check(DIRECT)
    with ft.patch() as p:
        check(by_name)
    assert p.report()["left"] == {}


@row("`autocast`")
def autocast():
    leaves = [x.detach().float().requires_grad_() for x in small_operands()]
    masks = [None, torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, 7)]

    def gradients(sdpa, mask, dtype):
        with torch.autocast("cpu", dtype=dtype):
            out = sdpa(*leaves, attn_mask=mask)
            with torch.autocast("cpu", enabled=False):
                assert sdpa(*leaves).dtype == torch.float32
        assert out.dtype == dtype
        return torch.autograd.grad(out.float().sin().sum(), leaves)

    def check(sdpa):
        for dtype in (torch.bfloat16, torch.float16):
            for mask in masks:
                exact = gradients(EXACT, mask, dtype)
                for ours, theirs in zip(gradients(sdpa, mask, dtype), exact, strict=True):
                    assert ours.dtype == torch.float32
                    near(ours, theirs, tolerance=0.05)

    both(check, 12)


@row("`sdpa_kernel(SDPBackend.MATH)`, `enable_flash_sdp(False)`")
def switches():
    tensors = small_operands()
    for switch in (lambda: sdpa_kernel(SDPBackend.MATH), flash_off):

        def check(sdpa, switch=switch):
            with switch():
                for options in ({}, {"is_causal": True}, {"attn_mask": causal_lower_right(5, 7)}):
                    assert "fastattn" not in "".join(
                        operators(lambda options=options: sdpa(*tensors, **options))
                    )
                near(sdpa(*tensors), EXACT(*tensors))
            out = sdpa(*tensors, attn_mask=causal_lower_right(5, 7))
            with switch():
                near(sdpa(*tensors, attn_mask=causal_lower_right(5, 7)), out)

        check(DIRECT)
        with ft.patch() as p:
            check(by_name)
        assert p.report()["answered"] == 1
        assert p.report()["left"] == {WATCHED: 3, OFF: 2}
        with switch():
            assert "fastattn.attention.default" in operators(lambda: ft.attention(*tensors))


@row("`set_default_device`, `set_default_dtype`")
def defaults():
    tensors = small_operands()
    options = {
        "alibi_slopes": [0.1, 0.3],
        "query_offset": [2],
        "kv_lengths": [6],
        "sinks": [0.1, 0.3],
        "is_causal": True,
    }
    expected = ft.attention(*tensors, **options)
    torch.manual_seed(0)
    dropped = DIRECT(*tensors, dropout_p=0.5)
    results = []

    def again():
        results.append(ft.attention(*tensors, **options))

    leaves = small_operands(grad=True)
    for default in (
        default_device("meta"),
        default_dtype(torch.float64),
        default_dtype(torch.float16),
    ):
        with default:
            both(lambda sdpa: near(sdpa(*tensors), EXACT(*tensors)))
            torch.manual_seed(0)
            both(lambda sdpa: sdpa(*tensors, dropout_p=0.5).sum())
            torch.manual_seed(0)
            assert torch.equal(DIRECT(*tensors, dropout_p=0.5), dropped)
            assert torch.equal(ft.attention(*tensors, **options), expected)
            operators(again)
            assert torch.equal(results.pop(), expected)
            ft.attention(*leaves, **options).sum().backward()
            assert leaves[0].grad.device.type == "cpu"


class Spy(TorchFunctionMode):
    """Remembers the attention functions that it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "attention" in getattr(func, "__name__", ""):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@row("`TorchFunctionMode`")
def function_mode():
    query, key, value = small_operands()
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    calls = {
        DIRECT: lambda: DIRECT(query, key, value, scale=0.5),
        ft.attention: lambda: ft.attention(query, key, value, softcap=2.0),
        ft.varlen_attention: lambda: ft.varlen_attention(*packed, [0, 5], [0, 7]),
    }
    for function, call in calls.items():
        with Spy() as spy, Spy() as inner:
            out = call()
        assert spy.seen == inner.seen == [function]
        near(out, call())

    class Double(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return 2 * out if func is F.scaled_dot_product_attention else out

    def check(sdpa):
        with Spy() as spy, Double():
            out = sdpa(query, key, value, scale=0.5)
            assert spy.seen == [F.scaled_dot_product_attention]
        near(out, 2 * EXACT(query, key, value, scale=0.5))

    patched(check)


@row("`TorchDispatchMode`, `make_fx`, `torch.jit.trace`")
def dispatch_mode():
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = small_operands()
    seen = operators(lambda: DIRECT(*tensors, dropout_p=0.5))
    assert "fastattn.attention.default" in seen

    def traced(sdpa):
        made = make_fx(lambda *x: sdpa(*x))(*tensors)
        twice = [2 * x for x in tensors]
        near(made(*twice), EXACT(*twice))
        return [str(node.target) for node in made.graph.nodes]

    assert "fastattn.attention.default" in traced(DIRECT)
    draws = [
        str(x.target) for x in make_fx(lambda *x: DIRECT(*x, dropout_p=0.5))(*tensors).graph.nodes
    ]
    assert "aten.randint.default" in draws  # and no seed that stays the same
    patched(lambda sdpa: operators(lambda: sdpa(*tensors)), 0, {WATCHED: 1})
    patched(traced, 0, {WATCHED: 1})
    for sdpa in (DIRECT, by_name):
        with ft.patch() as p:
            script = torch.jit.trace(lambda *x, sdpa=sdpa: sdpa(*x), tensors, check_trace=False)
        assert p.report()["left"] == ({} if sdpa is DIRECT else {WATCHED: 1})
        twice = [2 * x for x in tensors]
        near(script(*twice), EXACT(*twice))
    leaves = small_operands(grad=True)
    out = DIRECT(*leaves).sum()
    assert "fastattn.attention_backward.default" in operators(out.backward)


class Calls(torch.nn.Module):
    """Calls torch's function by its name."""

    def forward(self, query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


class CallsToo(Calls):
    pass


class CallsOurs(torch.nn.Module):
    def forward(self, query, key, value):
        return ft.scaled_dot_product_attention(query, key, value)


@row("`torch.fx.symbolic_trace`")
def symbolic_trace():
    tensors = small_operands()

    def recorded(module):
        graph = torch.fx.symbolic_trace(module)
        near(graph(*tensors), EXACT(*tensors))
        return [node.target for node in graph.graph.nodes if node.op == "call_function"]

    assert recorded(CallsOurs()) == [DIRECT]
    with ft.patch() as p:
        assert recorded(Calls()) == [EXACT]
    assert p.report()["left"] == {"type Proxy": 1}


@row("`torch.jit.script`")
def script():
    tensors = small_operands()
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(CallsOurs())
    with ft.patch(), pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(CallsToo())
    scripted = torch.jit.script(Calls())
    with ft.patch() as p:
        near(scripted(*tensors), EXACT(*tensors))
    assert (p.report()["answered"], p.report()["left"]) == (0, {})


@row("`torch.compile`, `torch.export`")
def compiled():
    tensors = small_operands()

    def in_math(query, key, value):
        with sdpa_kernel(SDPBackend.MATH):
            return by_name(query, key, value)

    def under_patch(function, *arguments, **how):
        expected = function(*arguments)
        torch._dynamo.reset()
        with ft.patch() as p:
            out = torch.compile(function, backend="eager", **how)(*arguments)
        near(out, expected)
        return p.report()["answered"], p.report()["left"]

    assert under_patch(by_name, *tensors, fullgraph=True) == (1, {})
    assert under_patch(in_math, *tensors, fullgraph=True) == (0, {OFF: 1})
    for bias in (causal_upper_left(5, 7), causal_lower_right(5, 7)):
        assert under_patch(by_name, *tensors, bias, fullgraph=True) == (1, {})
    with default_device("meta"):
        assert under_patch(by_name, *tensors, fullgraph=True) == (1, {})
    negated = tensors[0].as_subclass(overriding.Negated)
    assert under_patch(by_name, negated, *tensors[1:]) == (1, {"type Negated": 1})
    negated = tensors[0].as_subclass(overriding.NegatedByTable)
    assert under_patch(by_name, negated, *tensors[1:]) == (0, {"type NegatedByTable": 1})
    with Spy() as spy:
        assert under_patch(by_name, *tensors) == (1, {})
    assert len(spy.seen) == 2  # one of them is what is expected
    torch._dynamo.reset()
    with pytest.raises(TypeError, match="overrides __torch_function__"):
        torch.compile(DIRECT, backend="eager")(negated, *tensors[1:])
    torch._dynamo.reset()
    program = torch.export.export(CallsOurs(), tuple(tensors), strict=False)
    assert "fastattn.attention.default" in str(program.graph)


@row("`torch.func` transforms (`grad`, `vmap`, `jvp`)")
def transforms():
    query, key, value = small_operands()

    def total(sdpa):
        return lambda x: sdpa(x, key, value).sum()

    calls = [
        lambda sdpa: torch.func.grad(total(sdpa))(query),
        lambda sdpa: torch.vmap(lambda x: sdpa(x, key[0], value[0]))(query),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
            call(DIRECT)
        patched(lambda sdpa, call=call: near(call(sdpa), call(EXACT)), 0, {WATCHED: 1})
    with sdpa_kernel(SDPBackend.MATH):
        patched(lambda sdpa: torch.func.jvp(total(sdpa), (query,), (query,)), 0, {WATCHED: 1})


@row("forward-mode derivatives")
def forward_mode():
    query, key, value = small_operands()
    leaf = rand(1, 2, 5, 8, grad=True)
    out = DIRECT(leaf, key, value)
    with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = torch.autograd.forward_ad.make_dual(query, query)

        def check(sdpa):
            tangent = torch.autograd.forward_ad.unpack_dual(sdpa(dual, key, value)).tangent
            assert tangent.abs().max() > 0

        patched(check, 0, {WATCHED: 1})
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            ft.attention(dual, key, value)
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.autograd.grad(out, leaf, dual)


@row("many gradients at once: `is_grads_batched`, `jacobian(vectorize=True)`, `vmap` of a backward")
def batched_gradients():
    leaves = small_operands(grad=True)
    packed = [x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves]
    bias, sinks = rand(5, 7, grad=True), rand(2, grad=True)
    calls = [
        (lambda: DIRECT(*leaves), leaves),
        (lambda: DIRECT(*leaves, dropout_p=0.5), leaves),
        (lambda: ft.attention(*leaves, window=(2, 0), query_offset=2), leaves),
        (lambda: ft.attention(*leaves, bias=bias, sinks=sinks), [*leaves, bias, sinks]),
        (lambda: ft.attention(*leaves, softcap=2.0, return_lse=True)[1], leaves[:2]),
        (lambda: ft.varlen_attention(*packed, [0, 2, 5], [0, 4, 7]), packed),
    ]
    for call, wanted in calls:
        out = call()
        many = rand(3, *out.shape)
        grad = functools.partial(torch.autograd.grad, out, wanted, retain_graph=True)
        expected = [torch.stack(each) for each in zip(*map(grad, many), strict=True)]
        for got in (grad(many, is_grads_batched=True), torch.vmap(grad)(many)):
            assert all(map(torch.equal, got, expected))

    def jacobian(sdpa):
        return torch.autograd.functional.jacobian(
            lambda x: sdpa(x, x, x).sum((0, 1)), small_operands()[0], vectorize=True
        )

    both(lambda sdpa: near(jacobian(sdpa), jacobian(EXACT)))


@row("second derivatives")
def second_derivatives():
    leaf = rand(1, 2, 5, 8, grad=True)

    def penalty(sdpa):
        (grad,) = torch.autograd.grad(sdpa(leaf, leaf, leaf).sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.norm().square(), leaf)[0]

    def refused(sdpa):
        with pytest.raises(NotImplementedError, match=r"sdpa_kernel\(SDPBackend.MATH\)"):
            penalty(sdpa)

    both(refused)
    refused(ft.attention)
    out = DIRECT(leaf, leaf, leaf)
    many = torch.stack([torch.ones_like(out)] * 2)
    (grad,) = torch.autograd.grad(out, leaf, many, is_grads_batched=True, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        (grad.sum() + leaf.sum()).backward()
    with sdpa_kernel(SDPBackend.MATH):
        expected = penalty(EXACT)
        assert expected.abs().max() > 0
        both(lambda sdpa: near(penalty(sdpa), expected), 0, {OFF: 1})


@row("`checkpoint`, `saved_tensors_hooks`, `detect_anomaly`, `functional_call`")
def around_gradients():
    from torch.utils.checkpoint import checkpoint

    def hooked(sdpa, *tensors):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: [x.clone()], lambda x: x[0]):
            return sdpa(*tensors)

    def anomalous(sdpa, *tensors):
        with torch.autograd.detect_anomaly():
            return sdpa(*tensors)

    class Scales(torch.nn.Module):
        def __init__(self, sdpa):
            super().__init__()
            self.sdpa, self.factor = sdpa, torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, query, key, value):
            return self.sdpa(query * self.factor, key, value)

    def called(sdpa, *tensors):
        factor = torch.full((1,), 2.0, dtype=torch.float64)
        return torch.func.functional_call(Scales(sdpa), {"factor": factor}, tensors)

    ways = (
        functools.partial(checkpoint, use_reentrant=True),
        functools.partial(checkpoint, use_reentrant=False),
        hooked,
        anomalous,
        called,
    )

    def gradients(way, sdpa):
        leaves = small_operands(grad=True)
        way(sdpa, *leaves).sin().sum().backward()
        return [x.grad for x in leaves]

    def check(sdpa):
        for way in ways:
            for ours, theirs in zip(gradients(way, sdpa), gradients(way, EXACT), strict=True):
                near(ours, theirs)

    check(DIRECT)
    with ft.patch() as p:
        check(by_name)
    assert p.report()["answered"] >= len(ways)
    assert p.report()["left"] == {}


@row("`use_deterministic_algorithms`")
def deterministic_algorithms():
    """Write all of what torch then fills with NaN."""
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False

    def check(sdpa):
        for options in ({}, {"attn_mask": mask}):
            leaves = small_operands(grad=True)
            with deterministic():
                out = sdpa(*leaves, **options)
                out.sum().backward()
                assert not sdpa(*small_operands(kv_len=0)).any()
            near(out, EXACT(*leaves, **options))
            assert all(x.grad.isfinite().all() for x in leaves)

    both(check, 4)


@row('tensors on `torch.device("meta")`')
def meta():
    tensors = [x.to("meta") for x in small_operands()]
    for function in (DIRECT, ft.attention, fastattn.attention):
        with pytest.raises(TypeError, match="query must hold numbers, got a tensor on the device"):
            function(*tensors)
    patched(lambda sdpa: sdpa(*tensors).device.type == "meta", 0, {"device meta": 1})


@row("nested, sparse, quantised tensors, other dtypes")
def other_tensors():
    query, key, value = small_operands()
    nested = torch.nested.nested_tensor([query[0], query[0]])
    for x, why in (
        (nested, "nested tensor"),
        (query.to_sparse(), "layout torch.sparse_coo"),
        (torch.quantize_per_tensor(query.float(), 0.1, 0, torch.qint8), "dtype torch.qint8"),
        (query.to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    ):
        for function in (DIRECT, ft.attention):
            with pytest.raises(TypeError, match="query must"):
                function(x, key, value)
        with ft.patch() as p, contextlib.suppress(RuntimeError):  # torch's own does some of them
            by_name(x, x, x)
        assert p.report()["left"] == {why: 1}


@row("`torch.nn.attention.bias.CausalBias` as `attn_mask`")
def causal_bias():
    for q_len, kv_len in ((5, 7), (5, 5), (7, 5)):
        leaves = small_operands(q_len, kv_len, grad=True)
        mask = {
            causal_upper_left: torch.ones(q_len, kv_len, dtype=torch.bool).tril(),
            causal_lower_right: torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len),
        }
        for make, seen in mask.items():
            bias, expected = make(q_len, kv_len), EXACT(*leaves, attn_mask=seen)
            expected = [expected, *torch.autograd.grad(expected.sum(), leaves)]

            def check(sdpa, bias=bias, expected=expected, leaves=leaves):
                out = sdpa(*leaves, attn_mask=bias)
                assert type(out) is torch.Tensor
                ours = [out, *torch.autograd.grad(out.sum(), leaves)]
                for got, right in zip(ours, expected, strict=True):
                    near(got, right)

            both(check)
            for name in ("mask", "bias"):
                for call in (ft.attention, fastattn.attention):
                    with pytest.raises(TypeError, match=f"{name} must"):
                        call(*(x.detach() for x in leaves), **{name: bias})
    tensors, bias = small_operands(), causal_lower_right(5, 7)
    with pytest.raises(ValueError, match=r"for the lengths of query and key, \(5, 7\), got one"):
        DIRECT(*tensors, attn_mask=causal_upper_left(9, 9))
    with ft.patch() as p:  # torch's own does not look
        near(by_name(*tensors, attn_mask=causal_upper_left(9, 9)), EXACT(*tensors, is_causal=True))
        with pytest.raises(RuntimeError):
            by_name(*tensors, attn_mask=causal_lower_right(5, 8))
    assert p.report()["answered"] == 0
    for sdpa in (DIRECT, EXACT):
        with pytest.raises(ValueError, match="causal=True"):
            sdpa(*tensors, attn_mask=bias, is_causal=True)
    with ft.patch(), pytest.raises(ValueError, match="is_causal=True"):
        by_name(*tensors, attn_mask=bias, is_causal=True)
    meta = [x.to("meta") for x in tensors]
    patched(lambda sdpa: sdpa(*meta, attn_mask=bias), 0, {"device meta": 1})


@row("a value with more or fewer rows than the key; a scale that is NaN")
def garbage():
    query, key, _ = small_operands()

    class Named(torch.Tensor):
        pass

    def check(sdpa):
        for rows in (3, 11):
            for leaf in (query, query.clone().requires_grad_(), query.as_subclass(Named)):
                with pytest.raises(ValueError, match="value"):
                    sdpa(leaf, key, rand(1, 2, rows, 8))
        with pytest.raises(ValueError, match="scale must be finite"):
            sdpa(query, key, key, scale=float("nan"))
        longer = rand(1, 2, 11, 8)
        with pytest.raises(ValueError, match="value"):
            operators(lambda: sdpa(query, key, longer))

    both(check, 0)


@row("other arguments that break a rule")
def other_errors():
    query, key, value = small_operands()
    for arguments, options in (
        ((query, key[..., :3], value), {}),
        ((query, key, value), {"attn_mask": torch.ones(9, 9, dtype=torch.bool)}),
        ((query, key, value), {"dropout_p": 2.0}),
        ((query, rand(3, 2, 7, 8), rand(5, 2, 7, 8)), {}),
        ((query, rand(1, 3, 7, 8), rand(1, 3, 7, 8)), {"enable_gqa": True}),
    ):
        with pytest.raises((TypeError, ValueError)) as ours:
            DIRECT(*arguments, **options)
        with ft.patch() as p, pytest.raises(RuntimeError):
            by_name(*arguments, **options)
        assert p.report()["left"] == {f"{ours.type.__name__}: {ours.value}": 1}


def rows_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "torch.md").read_text()
    table = page.split("| mode or switch |")[1].split("\n\n")[0]
    return re.findall(r"^\| (.+?) \|", table.split("|---|---|---|\n")[1], re.MULTILINE)


@pytest.mark.promise("torch-modes-are-honoured")
@pytest.mark.parametrize("name", rows_of_the_page())
def test_modes(name):
    (case,) = (case for start, case in CASES.items() if name.startswith(start))
    case()


@pytest.mark.promise("torch-modes-are-honoured")
def test_no_case_without_a_row():
    rows = rows_of_the_page()
    assert len(rows) == len(CASES)
    assert all(any(name.startswith(start) for name in rows) for start in CASES)


def test_tensors_without_memory():
    freed = rand(1, 2, 5, 8)
    freed.untyped_storage().resize_(0)
    options = {"softcap": 2.0}
    for x in (
        freed,
        torch._efficientzerotensor(1, 2, 5, 8),
        torch._to_functional_tensor(rand(5, 8)),
    ):
        for function in (ft.attention, fastattn.attention):
            with pytest.raises(TypeError, match="query must be a tensor that NumPy can read"):
                function(x, x, x, **options)
        with pytest.raises(TypeError, match="query must be a tensor that NumPy can read"):
            ft.scaled_dot_product_attention(x, x, x)
