# SPDX-License-Identifier: Apache-2.0
"""The plain formula in float64, in the words of flash-attn, and tensors in its layout."""

import torch

HEADS, KV_HEADS, DIM = 4, 2, 16


def tensors(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def problem(q_len=9, kv_len=14, batch=2, dtype=torch.float64):
    keys = (batch, kv_len, KV_HEADS, DIM)
    return tensors((batch, q_len, HEADS, DIM), keys, keys, dtype=dtype)


def plain(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, kept=1.0):
    """Return out and lse of one sequence, of shapes (length, heads, dim) and (heads, length)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    shift = k.shape[0] - q.shape[0]
    distance = torch.arange(k.shape[0]) - (torch.arange(q.shape[0])[:, None] + shift)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    unseen = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        unseen |= distance > 0
    if window[0] >= 0:
        unseen |= distance < -window[0]
    if window[1] >= 0:
        unseen |= distance > window[1]
    scores = scores.masked_fill(unseen, -torch.inf)
    blind = unseen.all(dim=1)[:, None]
    probs = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("hqk,khd->qhd", probs * kept, v), scores.logsumexp(-1)


def plain_batch(q, k, v, slopes=None, **options):
    """Return out and lse of sequences of any lengths, as lists."""
    results = [
        plain(
            *x, slopes=slopes[i] if slopes is not None and slopes.ndim == 2 else slopes, **options
        )
        for i, x in enumerate(zip(q, k, v, strict=True))
    ]
    return [list(x) for x in zip(*results, strict=True)]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float32)
CASES = {
    "nothing": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "left alone": {"window_size": (3, -1)},
    "right alone": {"window_size": (-1, 1)},
    "window and causal": {"window_size": (4, 4), "causal": True},
    "softcap": {"softcap": 1.5},
    "softcap off": {"softcap": -1.0},
    "None is off": {"softcap": None, "window_size": None},
    "None is unlimited": {"window_size": (None, 1)},
    "slopes": {"alibi_slopes": SLOPES},
    "slopes of each": {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES]), "causal": True},
    "deterministic": {"deterministic": True},
}
WORDS = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "slopes"}


def in_words(options):
    words = {
        WORDS.get(k, k): x for k, x in options.items() if k != "deterministic" and x is not None
    }
    if "window" in words:
        words["window"] = tuple(-1 if side is None else side for side in words["window"])
    return words


def gradients_agree(actual, expected, inputs):
    """Assert that results agree, and their gradients by the inputs."""
    grad = tensors((expected.numel(),), seed=9)[0].reshape(expected.shape)
    close(actual, expected)
    both = [torch.autograd.grad(x, inputs, grad, retain_graph=True) for x in (actual, expected)]
    for a, b in zip(*both, strict=True):
        close(a, b)


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
