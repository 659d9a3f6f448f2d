# SPDX-License-Identifier: Apache-2.0
"""Forward and backward on their own, as programs that know flash-attn's interface call them."""

import inspect

import pytest
import torch

from fastattn.flash_attn import _activations as activations
from fastattn.flash_attn import _forward_backward as interface
from fastattn.flash_attn import _norms as norms
from fastattn.flash_attn import _padding as padding
from fastattn.flash_attn import _rotary as rotary
from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_func
from tests.flash_attn.problems import close, plain, plain_batch, tensors

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
CASES = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window_size_left": 4, "window_size_right": 2},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.3},
    "slopes": {"alibi_slopes": SLOPES, "causal": True},
    "dropout": {"dropout_p": 0.3},
}


def arguments(case):
    """Return the arguments of a forward, of a backward, and of a public function."""
    given = {
        "dropout_p": 0.0,
        "softmax_scale": None,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    } | CASES[case]
    public = {k: x for k, x in given.items() if not k.startswith("window")}
    public["window_size"] = (given["window_size_left"], given["window_size_right"])
    return given, public


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("varlen", [False, True])
def test_forward_and_backward(case, varlen):
    given, public = arguments(case)
    if varlen:
        arrays = tensors((20, 4, 16), (21, 2, 16), (21, 2, 16))
        lengths = (torch.tensor([0, 9, 9, 20]), torch.tensor([0, 7, 12, 21]), 11, 9)
        calls = flash_attn_varlen_func, interface._flash_attn_varlen_forward
        backward = interface._flash_attn_varlen_backward
    else:
        arrays, lengths = tensors((2, 9, 4, 16), (2, 14, 2, 16), (2, 14, 2, 16)), ()
        calls = flash_attn_func, interface._flash_attn_forward
        backward = interface._flash_attn_backward
    arrays = [x.requires_grad_() for x in arrays]
    results = []
    for call, options in zip(calls, (public, given), strict=True):
        torch.manual_seed(3)
        probs = {"return_attn_probs" if options is public else "return_softmax": True}
        results.append(call(*arrays, *lengths, **options, **probs))
    (out, lse, _), (*both, probs, state) = results
    assert torch.equal(both[0], out)
    assert torch.equal(both[1], lse)
    assert not both[0].requires_grad
    assert probs.numel() == 0
    grad = tensors(out.shape, seed=4)[0]
    places = [torch.full_like(x, torch.nan) for x in arrays]
    sums = backward(
        grad, *arrays, *both, *places, *lengths, **given, deterministic=False, rng_state=state
    )
    for a, b in zip(places, torch.autograd.grad(out, arrays, grad), strict=True):
        close(a, b)
    assert sums.shape == lse.shape
    close(sums, (grad * out.detach()).sum(-1).transpose(-1, -2))


def test_programs_can_read_the_arguments_of_forward_and_backward():
    names = [x for x in vars(interface) if x.endswith(("_forward", "_backward"))]
    assert len(names) == 8
    for name in names:
        function = getattr(interface, name)
        spec = inspect.getfullargspec(function)
        assert spec.args == list(inspect.signature(function).parameters)
        assert {"softcap", "window_size_left", "window_size_right"} < set(spec.args)


def test_backward_in_parts():
    """As in ring attention: the gradients of parts of the keys, by the whole's out and lse."""
    q, k, v = (x.requires_grad_() for x in tensors((2, 9, 4, 16), (2, 14, 2, 16), (2, 14, 2, 16)))
    outs, lses = (torch.stack(x) for x in plain_batch(q, k, v))
    given, _ = arguments("nothing")
    blocks = [slice(0, 5), slice(5, 14)]
    parts = [
        interface._flash_attn_forward(q, k[:, x], v[:, x], **given, return_softmax=False)[:2]
        for x in blocks
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    whole = sum(out * w for (out, _), w in zip(parts, weights, strict=True))
    close(whole, outs.detach())
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    close(lse, lses.detach())
    grad = tensors(outs.shape, seed=4)[0]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for x in blocks:
        part = torch.empty_like(q)
        interface._flash_attn_backward(
            grad, q, k[:, x], v[:, x], whole, lse, part, dk[:, x], dv[:, x], **given,
            deterministic=True,
        )  # fmt: skip
        dq += part
    for a, b in zip((dq, dk, dv), torch.autograd.grad(outs, (q, k, v), grad), strict=True):
        close(a, b)


def test_which_keys_of_packed_sequences_there_are():
    q, k, v = tensors((6, 4, 16), (21, 2, 16), (21, 2, 16))
    q_starts, kv_starts = torch.tensor([0, 2, 4, 6]), torch.tensor([0, 7, 12, 21])
    left, used = torch.tensor([1, 0, 2]), torch.tensor([7, 3, 2])
    given, _ = arguments("causal")
    out, lse, *_ = interface._flash_attn_varlen_forward(
        q, k, v, q_starts, kv_starts, 2, 9, **given, leftpad_k=left, seqused_k=used
    )
    rows = [slice(1, 7), slice(7, 10), slice(14, 14)]
    expected = [plain(q[2 * i : 2 * i + 2], k[x], v[x], causal=True) for i, x in enumerate(rows)]
    close(out, torch.cat([x for x, _ in expected]))
    close(lse, torch.cat([x for _, x in expected], dim=1))
    for wrong in ({"seqused_k": used + 9}, {"leftpad_k": left - 2}, {"seqused_k": used[:2]}):
        with pytest.raises(ValueError, match=r"^leftpad_k and seqused_k must"):
            interface._flash_attn_varlen_forward(
                q, k, v, q_starts, kv_starts, 2, 9, **given, **wrong
            )


def test_errors_of_backward():
    q, k, v = tensors((2, 9, 4, 16), (2, 14, 2, 16), (2, 14, 2, 16))
    given, _ = arguments("dropout")
    out, lse, *_ = interface._flash_attn_forward(q, k, v, **given, return_softmax=False)
    call = (out, q, k, v, out, lse)
    with pytest.raises(ValueError, match=r"^rng_state must be given with dropout_p"):
        interface._flash_attn_backward(*call, None, None, None, **given, deterministic=False)
    given["dropout_p"], places = 0.0, [torch.zeros_like(q), torch.zeros_like(q), None]
    with pytest.raises(ValueError, match=r"^dk must have shape \(2, 14, 2, 16\), got \(2, 9, 4, "):
        interface._flash_attn_backward(*call, *places, **given, deterministic=False)
    assert not places[0].any()
    interface._flash_attn_backward(
        *call, places[0], None, None, **given, deterministic=False
    )  # what is None is not wanted
    assert places[0].any()


@pytest.mark.parametrize("name", [x for x in dir(interface) if x.endswith("Func")])
def test_functions_of_autograd(name):
    public = next(x for x in vars(interface) if x.replace("_", "") == name.lower().replace("_", ""))
    function = getattr(interface, public)
    packed, varlen = "Packed" in name, "Varlen" in name
    shape = {(True, True): (11, 3, 4, 16), (True, False): (2, 11, 3, 4, 16)}.get(
        (packed, varlen), (11, 4, 16) if varlen else (2, 11, 4, 16)
    )
    if "KVPacked" in name and "QKV" not in name:
        plain_shape = (11, 4, 16) if varlen else (2, 11, 4, 16)
        arrays = tensors(plain_shape, (*shape[:-3], 2, *shape[-2:]))
    else:
        arrays = tensors(*[shape] * (1 if packed else 3))
    arrays = [x.requires_grad_() for x in arrays]
    starts = torch.tensor([0, 4, 11])
    lengths = ((starts, 7) if "QKV" in name else (starts, starts, 7, 7)) if varlen else ()
    options = (0.0, None, True, (3, -1), 0.0, None, False, False)
    if len(inspect.signature(function).parameters) > len((*arrays, *lengths, *options)):
        options += (None,)  # block_table
    expected = function(*arrays, *lengths, *options)
    apply = getattr(interface, name).apply
    for more in ((), (True,)):
        out = apply(*arrays, *lengths, *options, *more)
        assert out.requires_grad
        assert torch.equal(out, expected)
    assert not apply(*arrays, *lengths, *options, False).requires_grad


def test_the_default_device_changes_nothing():
    q, k, v = tensors((18, 4, 16), (18, 2, 16), (18, 2, 16), dtype=torch.float32)
    starts, given = [0, 9, 18], arguments("causal")[0]
    x, table = torch.ones(2, 9, 4, 8), torch.ones(20, 3)
    caches = torch.zeros(2, 2, 16, 2, 16).unbind()

    def calls():
        yield interface._flash_attn_varlen_forward(q, k, v, starts, starts, 9, 9, **given)[0]
        yield interface._flash_attn_varlen_forward(
            q, k, v, starts, starts, 9, 9, **given, seqused_k=torch.tensor([3, 9], device="cpu")
        )[3]
        yield rotary.apply_rotary(x, table, table, 2)
        new = (y.reshape(2, 9, *y.shape[1:]) for y in (q, k, v))
        query, key, value = new
        yield interface.flash_attn_with_kvcache(
            query, *caches, key, value, table[:, :2], table[:, :2], cache_seqlens=3, causal=True
        )
        yield padding.unpad_input(x, torch.ones(2, 9, device="cpu") > 0)[2]
        yield activations.swiglu(q, q)
        yield norms.rms_norm(q, torch.ones(16, device="cpu"), 1e-5)

    expected = [y.clone() for y in calls()]
    with torch.device("meta"):
        for actual, y in zip(calls(), expected, strict=True):
            assert torch.equal(actual, y)
