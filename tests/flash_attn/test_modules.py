# SPDX-License-Identifier: Apache-2.0
"""Do the modules of flash_attn mean what flash-attn's do? Beside plain formulas in float64."""

import json

import pytest
import torch
from torch.nn import functional

from fastattn.flash_attn import _activations as activations
from fastattn.flash_attn import _collectives as collectives
from fastattn.flash_attn import _feed_forward as feed_forward
from fastattn.flash_attn import _losses as losses
from fastattn.flash_attn import _mha as mha
from fastattn.flash_attn import _norms as norms
from fastattn.flash_attn import _padding as padding
from fastattn.flash_attn import _patch_embed as patch_embed
from tests.flash_attn.problems import close, gradients_agree, plain_batch, tensors, turned
from tests.support.child import start

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
