# SPDX-License-Identifier: Apache-2.0
"""`fastattn.torch`: results and gradients against torch's own of the plain formula, in float64."""

import numpy as np
import torch

import fastattn
import fastattn.torch
from tests.fuzz import problem
from tests.fuzz.compare import finfo, formulas, near
from tests.fuzz.problem import Problem, chance, choice, generator

LAYOUTS = ("plain", "plain", "plain", "heads inside", "columns outside", "stepped", "inside")


def draw(rng):
    """Draw a problem that torch can hold."""
    spec = problem.draw(rng)
    for name in ("key_offset", "head_offset", "batch_offset"):
        spec["options"].pop(name, None)
    for operand in spec["operands"]:
        operand["layout"] = choice(rng, LAYOUTS)
    for name in ("mask", "bias"):
        if name in spec["options"]:
            spec["options"][name]["layout"] = choice(rng, ("plain", "columns outside"))
    if spec["q_len"] * spec["kv_len"] > 40_000:
        spec["q_len"] = choice(rng, (1, 2, 17, 40))
    spec["grad_lse"], spec["sdpa"] = chance(rng, 0.5), chance(rng, 0.3)
    spec["wants"] = [chance(rng, 0.8) for _ in range(5)]
    if spec["sdpa"]:
        keep = ("mask", "scale", "is_causal") if chance(rng, 0.7) else ("scale", "is_causal")
        spec["options"] = {name: x for name, x in spec["options"].items() if name in keep}
        if "mask" in spec["options"]:
            spec["options"].pop("is_causal", None)
            if spec["options"]["mask"]["dtype"] not in ("bool", spec["dtype"]):
                spec["options"]["mask"]["dtype"] = "bool"
        spec.pop("kv_dtype", None)
        spec["grad_lse"] = False
    return spec


def tensor(x):
    """Return the tensor of an array, over the same memory where torch can hold it."""
    x = np.asarray(x)
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(np.asarray(x.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(x):
    """Return the array of a tensor."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(problem.dtype_of("bfloat16"))
    return x.numpy()


def check(spec):
    """Raise if a result or gradient is not that of the formula."""
    p = Problem(spec)
    fastattn.set_num_threads(spec["threads"])
    options = dict(p.options)
    leaves = [tensor(x) for x in p.operands]
    names = ["query", "key", "value"]
    for name in ("mask", "bias", "sinks", "alibi_slopes"):
        if name in options:
            options[name] = tensor(options[name])
    for name in ("bias", "sinks"):
        if name in options:
            leaves.append(options[name])
            names.append(name)
    wants = dict(zip(("query", "key", "value", "bias", "sinks"), spec["wants"], strict=True))
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(wants[name])
    if spec["sdpa"]:
        given = {"scale": options.get("scale"), "is_causal": bool(options.get("is_causal"))}
        p.options = {x: y for x, y in p.options.items() if x != "query_offset"}
        if given["is_causal"]:
            p.options["query_offset"] = 0
        out = fastattn.torch.scaled_dot_product_attention(
            *leaves[:3], attn_mask=options.get("mask"), enable_gqa=spec["group"] > 1, **given
        )
        lse = None
    else:
        out, lse = fastattn.torch.attention(*leaves[:3], return_lse=True, **options)
    truth, plain = formulas(*p.operands, p.options)
    flat = truth.flat
    near(
        "out",
        array(out)[None] if flat else array(out),
        truth.out,
        truth.out_bound,
        plain.out,
        truth.eps,
    )
    if not out.requires_grad or not out.numel():
        return
    rng = generator(spec["data"], "grads")
    grad_out = tensor(rng.standard_normal(tuple(out.shape)).astype(p.dtype))
    grad_lse, both = None, [(out, grad_out)]
    if spec["grad_lse"] and lse.requires_grad:
        grad_lse = tensor(rng.standard_normal(tuple(lse.shape)).astype(array(lse).dtype))
        sees = truth.sees[0, ..., 0] if flat else truth.sees[..., 0]
        both.append((lse, grad_lse * torch.from_numpy(sees)))
    torch.autograd.backward(*zip(*both, strict=True))
    expected = by_torch(p, truth, names, grad_out, grad_lse)
    in_truth = truth.gradients(
        array(grad_out),
        None if grad_lse is None else array(grad_lse),
        out_info=finfo(p.dtype),
        pairs_eps=float(finfo(p.dtype).eps) if p.dtype.itemsize == 2 else 0.0,
    )
    bounds = {name: x[1:] for name, x in zip(names, in_truth, strict=False)}
    if "bias" in names:
        bounds["bias"] = (truth.of_bias(p.options["bias"].shape)[1], None)
    if "sinks" in names:
        bounds["sinks"] = (truth.of_sinks()[1], None)
    for name, leaf in zip(names, leaves, strict=True):
        assert (leaf.grad is None) == (not wants[name]), f"{name} has a gradient: {not wants[name]}"
        if wants[name]:
            wanted = expected[name].numpy()
            bound, size = bounds[name]
            near(f"d{name}", array(leaf.grad), wanted, 2 * bound, wanted, truth.eps, size)


def by_torch(p, truth, names, grad_out, grad_lse):
    """Return the gradients that torch finds of the formula, written with its own operators."""
    arrays = dict(zip(("query", "key", "value"), p.operands, strict=True)) | p.options
    leaves = {
        name: tensor(np.array(arrays[name], copy=True)).double().requires_grad_() for name in names
    }
    seen = torch.from_numpy(truth.seen)

    def whole(x):
        x = x[None] if x.ndim == 2 else x
        x = x.repeat_interleave(p.heads // x.shape[-3], dim=-3)
        return x.expand(*truth.pairs[:-3], *x.shape[-3:])

    query, key, value = (whole(leaves[name]) for name in ("query", "key", "value"))
    scores = float(truth.scale) * query @ key.transpose(-1, -2)
    cap = p.options.get("softcap")
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if "bias" in leaves:
        scores = scores + leaves["bias"].masked_fill(leaves["bias"] == -torch.inf, 0)
    mask = p.options.get("mask")
    if mask is not None and mask.dtype != bool:
        mask = tensor(mask).double()
        scores = scores + mask.masked_fill(mask == -torch.inf, 0)
    if p.options.get("alibi_slopes") is not None:
        offset = torch.as_tensor(np.asarray(p.options.get("query_offset", 0)))[
            ..., None, None, None
        ]
        at = torch.arange(truth.pairs[-2])[:, None] + offset
        slopes = tensor(np.array(p.options["alibi_slopes"])).double()[..., None, None]
        scores = scores - slopes * (torch.arange(truth.pairs[-1]) - at).abs()
    # A row that sees nothing has no gradient, and log of nothing has one.
    blind = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & ~blind, -torch.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True).masked_fill(blind, 0)
    denominator = lse
    if "sinks" in leaves:
        sinks = leaves["sinks"][:, None, None].expand(lse.shape)
        denominator = torch.logaddexp(lse, sinks)
    probs = torch.exp(scores - denominator).masked_fill(~seen, 0)
    if p.options.get("dropout_p"):
        probs = probs * torch.from_numpy(np.asarray(truth.factor, np.float64))
    out = (probs @ value).masked_fill(blind, 0)
    grad_out = grad_out.double().reshape(out.shape)
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse[..., 0] * grad_lse.double()).sum()
    loss.backward()
    return {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
