# SPDX-License-Identifier: Apache-2.0
"""Do the modules of flash_attn mean what flash-attn's do? Beside plain formulas in float64."""

import importlib
import inspect
import json
import re

import pytest
from child import start

torch = pytest.importorskip("torch", exc_type=ImportError)

from test_flash_attn import close, plain, plain_batch, tensors  # noqa: E402
from torch.nn import functional  # noqa: E402

from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: E402

(
    activations,
    collectives,
    feed_forward,
    interface,
    losses,
    mha,
    norms,
    padding,
    patch_embed,
    rotary,
) = (
    importlib.import_module(f"fastattn.flash_attn._{name}")
    for name in (
        *("activations", "collectives", "feed_forward", "interface", "losses"),
        *("mha", "norms", "padding", "patch_embed", "rotary"),
    )
)


def gradients_agree(actual, expected, inputs):
    """Assert that results agree, and their gradients by the inputs."""
    grad = tensors((expected.numel(),), seed=9)[0].reshape(expected.shape)
    close(actual, expected)
    both = [torch.autograd.grad(x, inputs, grad, retain_graph=True) for x in (actual, expected)]
    for a, b in zip(*both, strict=True):
        close(a, b)


# Rotary embeddings.


def turned(x, angles, interleaved, sign=1):
    """Turn x of shape (..., heads, head_dim) by angles of shape (..., pairs)."""
    pairs = angles.shape[-1]
    first, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.split(pairs, dim=-1)
    turn = torch.polar(torch.ones_like(angles), sign * angles)[..., None, :]
    z = torch.complex(a, b) * turn
    out = torch.zeros_like(first)
    if interleaved:
        out[..., 0::2], out[..., 1::2] = z.real, z.imag
    else:
        out[..., :pairs], out[..., pairs:] = z.real, z.imag
    return torch.cat((out, rest), dim=-1)


ANGLES = tensors((20, 3), seed=5)[0]
OFFSETS = {"none": 0, "int": 4, "each": torch.tensor([7, 0], dtype=torch.int32)}
BOTH = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def positions(length, offset):
    steps = torch.arange(length)
    return steps + (offset[:, None].long() if isinstance(offset, torch.Tensor) else offset)


@BOTH
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(interleaved, offset, inplace):
    x = tensors((2, 9, 4, 8))[0].requires_grad_()
    expected = turned(x, ANGLES[positions(9, OFFSETS[offset])], interleaved)
    given = x * 1.0
    out = rotary.apply_rotary_emb(
        given, ANGLES.cos(), ANGLES.sin(), interleaved, inplace, OFFSETS[offset]
    )
    gradients_agree(out, expected, [x])
    close(given.detach(), (expected if inplace else x).detach())
    back = rotary.apply_rotary(
        out,
        ANGLES.cos(),
        ANGLES.sin(),
        OFFSETS[offset],
        interleaved=interleaved,
        conjugate=True,
    )
    close(back, x)


@BOTH
@pytest.mark.parametrize("offset", [0, torch.tensor([3, 0, 9, 1])])
def test_rotary_of_packed_sequences(interleaved, offset):
    starts = torch.tensor([0, 4, 4, 9, 11], dtype=torch.int32)
    x = tensors((11, 4, 8))[0].requires_grad_()
    places = torch.cat([torch.arange(n) for n in starts.diff()])
    if isinstance(offset, torch.Tensor):
        places = places + offset.repeat_interleave(starts.diff())
    expected = turned(x, ANGLES[places], interleaved)
    out = rotary.apply_rotary_emb(
        x, ANGLES.cos(), ANGLES.sin(), interleaved, False, offset, starts, 5
    )
    gradients_agree(out, expected, [x])


def test_rotary_in_place_where_torch_has_no_way():
    """The gradient flows through what is returned; torch refuses what is no longer right."""
    cos, sin = ANGLES.cos(), ANGLES.sin()
    leaf = tensors((2, 9, 4, 8))[0].requires_grad_()
    expected = turned(leaf, ANGLES[:9], False)
    grad = torch.autograd.grad(expected.sin().sum(), leaf)[0]
    values = expected.detach().clone()
    saved = torch.exp(leaf * 1.0)
    saved_out = rotary.apply_rotary_emb(saved, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(saved_out.sum(), leaf)  # exp needs its result
    out = rotary.apply_rotary_emb(leaf, cos, sin, inplace=True)
    for x in (out, leaf):
        close(x.detach(), values)
    close(torch.autograd.grad(out.sin().sum(), leaf)[0], grad)

    whole = tensors((2, 2, 9, 4, 8))[0].requires_grad_()
    first, second = (whole * 1.0).unbind(0)
    expected = turned(whole[0], ANGLES[:9], False)
    out = rotary.apply_rotary_emb(first, cos, sin, inplace=True)
    gradients_agree(out, expected, [whole])
    for x in (first, second):
        with pytest.raises(RuntimeError, match="replace the inplace operation"):
            x.sum()


@BOTH
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_of_qkv(interleaved, grouped, scaled):
    qkv = tensors((2, 9, 8, 6) if grouped else (2, 9, 3, 4, 6))[0].requires_grad_()
    q, k, v = qkv.split((4, 2, 2), dim=2) if grouped else qkv.unbind(2)
    scale = 1.5 if scaled else 1.0
    q, k = (turned(x, ANGLES[:9], interleaved) for x in (q, k))
    expected = (torch.cat if grouped else torch.stack)((q * scale, k / scale, v), dim=2)
    cos, sin = ANGLES.cos(), ANGLES.sin()
    keys = (cos / scale, sin / scale) if scaled else (None, None)
    given = qkv * 1.0
    out = rotary.apply_rotary_emb_qkv_(
        given, cos * scale, sin * scale, *keys, interleaved, num_heads_q=4 if grouped else None
    )
    gradients_agree(out, expected, [qkv])
    close(given.detach(), expected.detach())


def test_rotary_of_kv():
    kv = tensors((2, 9, 2, 4, 8))[0].requires_grad_()
    expected = torch.stack((turned(kv[:, :, 0], ANGLES[2:11], False), kv[:, :, 1]), dim=2)
    given = kv * 1.0
    out = rotary.apply_rotary_emb_kv_(given, ANGLES.cos(), ANGLES.sin(), seqlen_offsets=2)
    gradients_agree(out, expected, [kv])
    close(given.detach(), expected.detach())


@BOTH
def test_rotary_by_torch(interleaved):
    x = tensors((2, 20, 4, 8))[0].requires_grad_()
    out = rotary.apply_rotary_emb_torch(x, ANGLES.cos(), ANGLES.sin(), interleaved)
    gradients_agree(out, turned(x, ANGLES, interleaved), [x])
    angles = torch.stack((ANGLES, 2 * ANGLES))
    out = rotary.apply_rotary_emb_torch(x, angles.cos(), angles.sin(), interleaved)
    gradients_agree(out, turned(x, angles, interleaved), [x])


@BOTH
@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_rotary_embedding(interleaved, scale_base):
    module = rotary.RotaryEmbedding(6, 100.0, interleaved, scale_base).double()
    angles = torch.arange(12.0)[:, None] * 100.0 ** (-torch.tensor([0.0, 2.0, 4.0]) / 6)
    scale = torch.ones(12, 3)
    if scale_base is not None:
        base = (torch.tensor([0.0, 2.0, 4.0]) + 0.4 * 6) / (1.4 * 6)
        scale = base ** ((torch.arange(12.0)[:, None] - 6) / scale_base)
    angles, scale = angles[3:].double(), scale[3:, None].double()
    scale = scale.repeat_interleave(2, -1) if interleaved else torch.cat((scale, scale), -1)
    q, kv = tensors((2, 9, 4, 6), (2, 9, 2, 4, 6))
    turned_q = turned(q, angles, interleaved) * scale
    turned_k = turned(kv[:, :, 0], angles, interleaved) / scale
    qkv = torch.cat((q[:, :, None], kv), dim=2)
    out = module(qkv, seqlen_offset=3)
    rest = module(q.clone(), kv.clone(), seqlen_offset=torch.tensor([3, 3]), max_seqlen=12)
    for actual, expected in (
        (out, torch.stack((turned_q, turned_k, kv[:, :, 1]), dim=2)),
        (rest[0], turned_q),
        (rest[1], torch.stack((turned_k, kv[:, :, 1]), dim=2)),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert out is qkv
    assert not module.state_dict()
    module(q.clone(), kv.clone())  # shorter: the table stays
    assert module._seq_len_cached == 12


def test_rotary_in_half_precision_is_rounded_once():
    x = tensors((1, 9, 2, 8), dtype=torch.bfloat16)[0]
    exact = turned(x.double(), ANGLES[:9], False)
    cos, sin = (y.float() for y in (ANGLES.cos(), ANGLES.sin()))
    out = rotary.apply_rotary_emb(x, cos, sin)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


ROTARY_ERRORS = {
    "rows": ({"seqlen_offsets": 12}, "must have a row for each position, got 20 rows and position"),
    "negative": ({"seqlen_offsets": -1}, "got 20 rows and position -1"),
    "each": (
        {"seqlen_offsets": torch.tensor([0, 12])},
        "must have a row for each position, got 20 rows and position 20",
    ),
    "offsets": ({"seqlen_offsets": torch.ones(2)}, "seqlen_offsets must be integers of shape (2,)"),
    "axes": ({"cu_seqlens": torch.tensor([0, 9])}, "x must have shape (total, heads, head_dim)"),
    "wide": (
        {"cos": torch.ones(20, 5), "sin": torch.ones(20, 5)},
        "cos and sin must be equally large, with at most head_dim / 2 columns, got cos.shape=",
    ),
    "table": ({"cos": torch.ones(20)}, "cos must have shape (positions, rotary_dim / 2), got"),
}


@pytest.mark.parametrize("case", ROTARY_ERRORS)
def test_rotary_errors(case):
    changes, message = ROTARY_ERRORS[case]
    given = {"x": torch.ones(2, 9, 4, 8), "cos": torch.ones(20, 3), "sin": torch.ones(20, 3)}
    with pytest.raises(ValueError, match=re.escape(message)):
        rotary.apply_rotary(**given | changes, inplace=True)


def test_other_rotary_errors():
    table = torch.ones(20, 3)
    with pytest.raises(ValueError, match=r"^cu_seqlens must ascend from 0 to 9, the rows of x"):
        rotary.apply_rotary(torch.ones(9, 4, 8), table, table, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"^num_heads_q must leave as many heads for keys as"):
        rotary.apply_rotary_emb_qkv_(torch.ones(2, 9, 8, 8), table, table, num_heads_q=3)
    with pytest.raises(ValueError, match=r"^qkv must have shape"):
        rotary.apply_rotary_emb_qkv_(torch.ones(2, 9, 8), table, table)
    with pytest.raises(ValueError, match=r"^kv must have shape"):
        rotary.apply_rotary_emb_kv_(torch.ones(2, 9, 3, 4, 8), table, table)
    with pytest.raises(ValueError, match=r"^max_seqlen must be given where seqlen_offset is a"):
        rotary.RotaryEmbedding(6)(torch.ones(1, 2, 3, 4, 8), seqlen_offset=torch.tensor([0]))


# Forward and backward on their own.


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


# Padding.


def test_sequences_that_share_rows():
    hidden = tensors((3, 6, 2))[0].requires_grad_()
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [0] * 6, [3, 2, 1, 0, 0, 0]])
    tokens, indices, starts, longest = padding.unpad_input_for_concatenated_sequences(
        hidden, lengths
    )
    rows = torch.cat((hidden[0, :5], hidden[2]))
    gradients_agree(tokens, rows, [hidden])
    assert indices.tolist() == [0, 1, 2, 3, 4, *range(12, 18)]
    assert starts.tolist() == [0, 2, 5, 8, 10, 11]
    assert (starts.dtype, longest) == (torch.int32, 3)
    padded = padding.pad_input(tokens, indices, 3, 6)
    close(padded[0, :5].detach(), hidden[0, :5].detach())
    assert not padded[0, 5].any()
    chosen, whole = padding.IndexFirstAxisResidual.apply(hidden.flatten(0, 1), indices)
    assert torch.equal(chosen, tokens)
    assert torch.equal(whole, hidden.flatten(0, 1))
    assert torch.equal(padding.IndexFirstAxis.apply(hidden.flatten(0, 1), indices), tokens)
    again = padding.IndexPutFirstAxis.apply(tokens, indices, 18)
    assert torch.equal(again.reshape(3, 6, 2), padded)


# Norms, losses, activations and layers.


def plain_norm(x, weight, bias, eps, rms):
    if rms:
        out = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight
        return out if bias is None else out + bias
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("rms", [False, True])
def test_norms(rms):
    x, residual, x1, rowscale = tensors((3, 5, 8), (3, 5, 8), (3, 5, 8), (3, 5))
    weights = tensors(*[(8,)] * 4, seed=1)
    inputs = [y.requires_grad_() for y in (x, residual, x1, *weights)]
    w, b, w1, b1 = weights
    call = norms.rms_norm_fn if rms else norms.layer_norm_fn
    gradients_agree(call(x, w, b, eps=0.1), plain_norm(x, w, b, 0.1, rms), [x, w, b])
    out, out1, total = call(
        x, w, b, residual, x1, w1, b1, eps=0.1, prenorm=True, zero_centered_weight=True
    )
    gradients_agree(total, x + x1 + residual, inputs[:3])
    gradients_agree(out, plain_norm(x + x1 + residual, w + 1, b, 0.1, rms), [*inputs[:3], w, b])
    gradients_agree(out1, plain_norm(x + x1 + residual, w1 + 1, b1, 0.1, rms), [*inputs[:3], w1])
    scaled = call(x, w, None, residual, rowscale=rowscale)
    gradients_agree(scaled, plain_norm(x * rowscale[..., None] + residual, w, None, 1e-6, rms), [x])
    places = torch.empty(2, 3, 5, 8, dtype=torch.float64).unbind()
    with torch.no_grad():
        results = call(x, w, b, prenorm=True, out=places[0], residual_out=places[1])
        assert results[0] is places[0]
        close(places[0], plain_norm(x, w, b, 1e-6, rms))
        close(places[1], x)
    torch.manual_seed(0)
    out, kept, kept1 = call(x, w, b, x1=x1, dropout_p=0.5, return_dropout_mask=True)
    assert 0 < kept.sum() < kept.numel()
    assert not torch.equal(kept, kept1)
    gradients_agree(out, plain_norm(2 * x * kept + 2 * x1 * kept1, w, b, 1e-6, rms), [x, x1, w])
    name = "rms" if rms else "layer"
    older = getattr(norms, f"dropout_add_{name}_norm")
    layerscale = tensors((8,), seed=2)[0]
    out, total, mask = older(
        x, residual, w, b, 0.5, 0.1, rowscale, layerscale, True, return_dropout_mask=True
    )
    expected = 2 * x * rowscale[..., None] * layerscale * mask + residual
    gradients_agree(total, expected, [x, residual])
    gradients_agree(out, plain_norm(expected, w, b, 0.1, rms), [x, residual, w, b])
    module = (norms.DropoutAddRMSNorm if rms else norms.DropoutAddLayerNorm)(8, eps=0.1).double()
    close(module(x, residual), plain_norm(x + residual, 1.0 if rms else None, None, 0.1, rms))
    assert [n for n, _ in module.named_parameters()] == (["weight"] if rms else ["weight", "bias"])


def test_dtypes_of_norms():
    x, w = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8)
    out, total = norms.rms_norm_fn(x, w, None, prenorm=True, residual_in_fp32=True)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    residual = torch.full((2, 8), 2.0**-12)  # lost if the sum were rounded to bfloat16 first
    _, total = norms.layer_norm_fn(x, w, None, residual, prenorm=True)
    assert torch.equal(total, 1 + residual)
    module = norms.RMSNorm(8, eps=0.5, zero_centered_weight=True)
    assert not module.weight.any()
    close(module(torch.ones(8)), torch.ones(8) / 1.5**0.5)
    close(norms.RMSNorm(8)(torch.ones(8)), torch.ones(8) / (1 + 1e-5) ** 0.5)
    with pytest.raises(ValueError, match=r"^rowscale must not be given together with x1$"):
        norms.layer_norm_fn(x, w, None, x1=x, rowscale=torch.ones(2))
    with pytest.raises(ValueError, match=r"^dropout_p must be within 0..1"):
        norms.layer_norm_fn(x, w, None, dropout_p=1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(smoothing, reduction):
    logits = tensors((7, 5))[0].requires_grad_()
    labels = torch.tensor([0, 4, -1, 2, 2, -1, 3])
    expected = functional.cross_entropy(
        1.5 * logits, labels, ignore_index=-1, reduction=reduction, label_smoothing=smoothing
    )
    z = 0.1 * ((1.5 * logits).logsumexp(-1) ** 2)[labels >= 0]
    if reduction == "none":
        z = torch.zeros(7, dtype=torch.float64).index_put((labels >= 0,), z)
    else:
        z = z.sum() if reduction == "sum" else z.mean()
    loss = losses.CrossEntropyLoss(-1, reduction, smoothing, 1.5, 0.1, return_z_loss=True)
    actual, actual_z = loss(logits, labels)
    gradients_agree(actual, expected + z, [logits])
    close(actual_z, z.detach())
    assert not actual_z.requires_grad


def test_cross_entropy_of_half_precision():
    logits = torch.tensor([[9.0, -9.0, 0.25]], dtype=torch.bfloat16)
    loss, z = losses.cross_entropy_loss(logits, torch.tensor([1]))
    assert (loss.dtype, z.tolist()) == (torch.float32, [0.0])
    close(loss, logits.float().logsumexp(-1) + 9)
    with pytest.raises(ValueError, match=r"^labels must be within 0..2 or -100, got 3$"):
        losses.cross_entropy_loss(logits, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"^logits must have shape \(rows, classes\) and labels"):
        losses.cross_entropy_loss(logits, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"^logit_scale must be > 0, got 0$"):
        losses.cross_entropy_loss(logits, torch.tensor([1]), logit_scale=0)
    with pytest.raises(NotImplementedError, match="reduction must be"):
        losses.CrossEntropyLoss(reduction="max")


def test_activations():
    x, y, g = (t.requires_grad_() for t in tensors((4, 6), (4, 6), (4, 6)))
    bias = tensors((6,), seed=3)[0].requires_grad_()
    cubic = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    gelu = 0.5 * x * (1 + torch.tanh(cubic))
    gradients_agree(activations.gelu_fwd(x), gelu, [x])
    close(activations.gelu_bwd(g, x), torch.autograd.grad(gelu, x, g)[0])
    square = torch.where(x > 0, x, 0) ** 2
    gradients_agree(activations.sqrelu_fwd(x), square, [x])
    close(activations.sqrelu_bwd(g, x), torch.autograd.grad(square, x, g)[0])
    close(activations.relu_bwd(g, x), g * (x >= 0))
    swiglu = x / (1 + torch.exp(-x)) * y
    gradients_agree(activations.swiglu(x, y), swiglu, [x, y])
    for a, b in zip(
        activations.swiglu_bwd(x, y, g), torch.autograd.grad(swiglu, (x, y), g), strict=True
    ):
        close(a, b)
    biased = activations.bias_gelu(x, bias)
    close(biased, activations.gelu_fwd(x + bias))
    for a, b in zip(
        activations.bias_gelu_back(g, x, bias),
        torch.autograd.grad(biased, (x, bias), g),
        strict=True,
    ):
        close(a, b)


def test_feed_forward():
    x = tensors((2, 5, 8))[0].requires_grad_()
    for name, function in {
        "gelu_approx": lambda y: functional.gelu(y, approximate="tanh"),
        "relu": torch.relu,
        "sqrelu": lambda y: torch.relu(y) ** 2,
    }.items():
        fused = feed_forward.FusedMLP(8, 12, 4, activation=name, return_residual=True).double()
        mlp = feed_forward.Mlp(8, 12, 4, activation=function).double()
        mlp.load_state_dict(fused.state_dict())
        expected = function(x @ fused.fc1.weight.T + fused.fc1.bias) @ fused.fc2.weight.T
        out, rest = fused(x)
        assert rest is x
        gradients_agree(out, expected + fused.fc2.bias, [x, fused.fc1.weight])
        close(mlp(x), out)
    for activation in (torch.sigmoid, functional.silu, torch.relu):
        gated = feed_forward.GatedMlp(8, 10, activation=activation, multiple_of=8).double()
        y, gate = functional.linear(x, gated.fc1.weight, gated.fc1.bias).split(16, dim=-1)
        expected = functional.linear(y * activation(gate), gated.fc2.weight, gated.fc2.bias)
        gradients_agree(gated(x), expected, [x, gated.fc1.weight])
    dense = feed_forward.FusedDense(8, 3, return_residual=True).double()
    close(dense(x)[0], functional.linear(x, dense.weight, dense.bias))
    assert dense(x)[1] is x
    weights = fused.fc1.weight, fused.fc2.weight
    for call in (
        lambda: feed_forward.FusedMLP(8, activation="silu"),
        lambda: feed_forward.fused_mlp_func(x, *weights, activation="silu"),
    ):
        with pytest.raises(ValueError, match=r"^activation must be one of \['gelu_approx'"):
            call()


# Modules of attention.


def test_slopes():
    assert mha.get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert mha.get_alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_weights(causal):
    qkv = tensors((2, 9, 3, 4, 16))[0]
    expected = torch.stack(plain_batch(*qkv.unbind(2), causal=causal, scale=0.3)[0])
    close(mha.FlashSelfAttention(causal, 0.3)(qkv), expected)
    close(mha.SelfAttention(causal, 0.3)(qkv), expected)
    close(mha.FlashSelfAttention(not causal, 0.3)(qkv, causal=causal), expected)
    starts = torch.tensor([0, 9, 18], dtype=torch.int32)
    packed = mha.FlashSelfAttention(causal, 0.3)(qkv.flatten(0, 1), None, starts, 9)
    close(packed, expected.flatten(0, 1))
    q, kv = qkv[:, 2:, 0], qkv[:, :, 1:, :2]
    k, v = kv.unbind(2)
    expected = torch.stack(plain_batch(q, k, v, causal=causal)[0])
    close(mha.FlashCrossAttention(causal)(q, kv), expected)
    close(mha.CrossAttention(causal)(q, kv), expected)
    packed = mha.FlashCrossAttention(causal)(
        q.flatten(0, 1), kv.flatten(0, 1), None, starts // 9 * 7, 7, starts, 9
    )
    close(packed, expected.flatten(0, 1))
    kept = torch.arange(9) < torch.tensor([[8], [9]])
    held = [[x[i, :n] for i, n in enumerate((8, 9))] for x in (k, v)]
    expected = torch.stack(plain_batch(q, *held, causal=causal)[0])
    close(mha.CrossAttention(causal)(q, kv, key_padding_mask=kept), expected)


def test_dropout_is_for_training():
    qkv = tensors((2, 9, 3, 4, 16))[0]
    for module in (mha.FlashSelfAttention, mha.SelfAttention):
        inner = module(attention_dropout=0.5)
        torch.manual_seed(0)
        first = inner(qkv)
        assert not torch.equal(inner(qkv), first)
        torch.manual_seed(0)
        assert torch.equal(inner(qkv), first)
        inner.eval()
        assert torch.equal(inner(qkv), inner(qkv))


def plain_mha(module, x, x_kv=None, rotary_dim=0, **options):
    """Return what MHA computes, by torch's matrix products and `plain`."""
    heads, kv_heads, dim = module.num_heads, module.num_heads_kv, module.head_dim
    if module.cross_attn:
        q = functional.linear(x, module.Wq.weight, module.Wq.bias)
        kv = functional.linear(x_kv, module.Wkv.weight, module.Wkv.bias)
    else:
        qkv = functional.linear(x, module.Wqkv.weight, module.Wqkv.bias)
        q, kv = qkv[..., : heads * dim], qkv[..., heads * dim :]
    q = q.unflatten(-1, (heads, dim))
    k, v = kv.unflatten(-1, (2, kv_heads, dim)).unbind(-3)
    if rotary_dim:
        pairs = torch.arange(0, rotary_dim, 2) / rotary_dim
        angles = (torch.arange(x.shape[1])[:, None] / 10000.0**pairs).double()
        q, k = (turned(y, angles, False) for y in (q, k))
    out = torch.stack(plain_batch(q, k, v, **options)[0])
    return functional.linear(out.flatten(-2), module.out_proj.weight, module.out_proj.bias)


def is_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("flash", [False, True])
def test_mha(kv_heads, flash):
    torch.manual_seed(0)
    x, other = (y.requires_grad_() for y in tensors((2, 9, 64), (2, 12, 64)))
    make = {"num_heads_kv": kv_heads, "use_flash_attn": flash, "causal": True}
    module = mha.MHA(64, 4, rotary_emb_dim=8, **make, return_residual=True).double()
    out, rest = module(x)
    assert rest is x
    expected = plain_mha(module, x, rotary_dim=8, causal=True)
    is_near(out, expected)
    grads = [torch.autograd.grad(y.sin().sum(), (x, module.Wqkv.weight)) for y in (out, expected)]
    for a, b in zip(*grads, strict=True):
        is_near(a, b)
    cross = mha.MHA(64, 4, cross_attn=True, checkpointing=True, **make).double()
    gradients_agree(cross(x, other), plain_mha(cross, x, other, causal=True), [x, other])
    subset = cross(other, mixer_subset=slice(-3, None))
    close(subset, plain_mha(cross, other, other, causal=True)[:, -3:])
    if flash:
        window = mha.MHA(64, 4, use_alibi=True, window_size=(3, -1), **make).double()
        slopes = torch.tensor(mha.get_alibi_slopes(4))
        expected = plain_mha(window, x, causal=True, window=(3, -1), slopes=slopes)
        close(window(x), expected)
        starts = torch.tensor([0, 9, 18])
        packed = window(x.flatten(0, 1), cu_seqlens=starts, max_seqlen=9)
        close(packed, expected.flatten(0, 1))
    elif kv_heads == 4:
        kept = torch.arange(9) < torch.tensor([[9], [7]])
        masked = mha.MHA(64, 4, **make).double()
        out = masked(x, key_padding_mask=kept)
        close(out[1, :7], plain_mha(masked, x[1:, :7], causal=True)[0])


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_mha_with_a_cache(flash, each):
    torch.manual_seed(0)
    x = tensors((2, 9, 64))[0]
    module = mha.MHA(
        64, 4, 2, causal=True, layer_idx=3, rotary_emb_dim=8, use_flash_attn=flash
    ).double()
    params, outs = mha.InferenceParams(16, 2), []
    with torch.no_grad():
        for begin, end in ((0, 5), (5, 6), (6, 9)):
            params.seqlen_offset = begin
            if each and begin and flash:
                params.lengths_per_sample = torch.full((2,), begin, dtype=torch.int32)
            outs.append(module(x[:, begin:end], inference_params=params))
    is_near(torch.cat(outs, dim=1), plain_mha(module, x, rotary_dim=8, causal=True))
    assert module.allocate_inference_cache(2, 16).shape == params.key_value_memory_dict[3].shape
    params.seqlen_offset, params.lengths_per_sample = 15, None
    module = mha.MHA(64, 4, 2, layer_idx=3, use_flash_attn=flash).double()
    with pytest.raises(ValueError, match="room"):
        module(x[:, :3], inference_params=params)


def test_mha_errors():
    for changes, kind, message in (
        ({"num_heads_kv": 3}, ValueError, "num_heads must be a multiple of num_heads_kv"),
        ({"dwconv": True}, NotImplementedError, "dwconv is not supported"),
        ({"use_alibi": True}, ValueError, "use_alibi and window_size need use_flash_attn=True"),
        ({"cross_attn": True, "rotary_emb_dim": 8}, ValueError, "rotary_emb_dim must be 0 with"),
    ):
        with pytest.raises(kind, match=message):
            mha.MHA(64, 4, **changes)
    x, module = torch.ones(2, 9, 64), mha.MHA(64, 4, use_flash_attn=True)
    for arguments, message in (
        ({"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)}, "key_padding_mask must not be"),
        ({"x_kv": x}, "x_kv and mixer_subset need cross_attn=True"),
        ({"inference_params": mha.InferenceParams(9, 2)}, "layer_idx must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            module(x, **arguments)
    starts = torch.tensor([0, 9])
    with pytest.raises(ValueError, match="cu_seqlens needs use_flash_attn=True"):
        mha.MHA(64, 4)(x[0], cu_seqlens=starts)
    with pytest.raises(ValueError, match="inference_params must be given without key_padding_mask"):
        module(x[0], cu_seqlens=starts, inference_params=mha.InferenceParams(9, 2))
    with pytest.raises(ValueError, match="cu_seqlens_k must be given with cu_seqlens, got None"):
        mha.FlashCrossAttention()(x, x, cu_seqlens=starts)


def test_a_cache_begins_anew():
    params = mha.InferenceParams(16, 2, 5, lengths_per_sample=torch.tensor([5, 4]))
    params.reset(32, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (32, 4, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]


def test_patches():
    module = patch_embed.PatchEmbed((8, 12), 4, 3, 5, torch.nn.LayerNorm).double()
    x = tensors((2, 3, 8, 12))[0].requires_grad_()
    weight = module.proj.weight.reshape(5, 3, 4, 4)
    expected = functional.conv2d(x, weight, module.proj.bias, stride=4)
    expected = functional.layer_norm(expected.permute(0, 2, 3, 1), (5,))
    gradients_agree(module(x), expected.flatten(1, 2), [x])
    module.flatten = False
    close(module(x), expected)
    assert (module.grid_size, module.num_patches) == ((2, 3), 6)
    with pytest.raises(ValueError, match=r"^x must have shape \(batch, in_chans, \*\(8, 12\)\)"):
        module(x[:, :, :4])


# Collectives.


def collective_results(folder, rank):
    """Return what each collective gives, and its gradient, as one of two processes."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    group, results = torch.distributed.group.WORLD, []
    for call in (collectives.all_gather, collectives.reduce_scatter, collectives.all_reduce):
        x = (torch.arange(8.0).reshape(4, 2) * (rank + 1)).requires_grad_()
        out = call(x, group)
        (out * (torch.arange(float(out.numel())).reshape(out.shape) + rank)).sum().backward()
        results.append([out.tolist(), x.grad.tolist()])
    try:
        collectives.reduce_scatter(torch.ones(3), group)
    except ValueError as error:
        results.append(str(error))
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
def test_collectives(tmp_path):
    processes = [start(collective_results, str(tmp_path), rank) for rank in range(2)]
    ended = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    results = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    x = [torch.arange(8.0).reshape(4, 2) * (rank + 1) for rank in range(2)]

    def weights(rank, *shape):
        return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + rank

    for rank in range(2):
        gathered, scattered, reduced, refusal = results[rank]
        both = weights(0, 8, 2) + weights(1, 8, 2)
        assert gathered == [torch.cat(x).tolist(), both[4 * rank :][:4].tolist()]
        part = sum(x)[2 * rank :][:2].tolist()
        assert scattered == [part, torch.cat([weights(i, 2, 2) for i in range(2)]).tolist()]
        assert reduced == [sum(x).tolist(), weights(rank, 4, 2).tolist()]
        assert refusal == "the first axis must be a multiple of 2, the processes, got (3,)"


def test_tensor_parallelism_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(NotImplementedError, match=r"^process_group is not supported: gather the"):
        losses.cross_entropy_loss(torch.ones(1, 3), torch.tensor([1]), process_group="two")
    for call in (feed_forward.FusedDense(8, 3), feed_forward.FusedMLP(8)):
        with pytest.raises(NotImplementedError, match=r"^process_group is not supported: fastattn"):
            call(torch.ones(8), process_group="two")


def test_shares_of_processes():
    assert [collectives.get_dim_for_local_rank(10, 4, i) for i in range(4)] == [3, 3, 2, 2]
    assert [collectives.get_dim_for_local_rank(48, 2, i, 16) for i in range(2)] == [32, 16]
    with pytest.raises(ValueError, match=r"^dim must be a multiple of multiple_of, got 10 and 4$"):
        collectives.get_dim_for_local_rank(10, 4, 0, 4)


# Default devices.


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
