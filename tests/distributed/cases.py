# SPDX-License-Identifier: Apache-2.0
"""What is attended to over ranks in tests, and how it is held against one process."""

import itertools

import numpy as np

import fastattn
import fastattn.distributed as fd
from fastattn.distributed._comm import engine_of

LAYOUTS = {
    "contiguous": fd.contiguous,
    "zigzag": fd.zigzag,
    "uneven": lambda total, ranks: fd.contiguous(uneven(total, ranks)),
    "scattered": lambda total, ranks: scattered(total, ranks),
}
SLOPES = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
SINKS = np.array([0.5, -1, 2, -np.inf], np.float32)
OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "window": (37, None)},
    "window": {"window": (20, 11)},
    "alibi": {"is_causal": True, "alibi_slopes": SLOPES},
    "sinks": {"is_causal": True, "sinks": SINKS},
    "softcap": {"softcap": 5.0, "scale": 0.5},
    "dropout": {"is_causal": True, "dropout_p": 0.3, "seed": 7},
    "lengths": {"kv_lengths": np.array([90, 41])},
    "offsets": {"is_causal": True, "query_offset": np.array([-60, 30])},
    "offsets of keys": {
        "window": (20, 3),
        "query_offset": 40,
        "key_offset": np.array([30, -2]),
        "dropout_p": 0.2,
        "seed": 2**40,
        "head_offset": 3,
        "batch_offset": 9,
    },
    "slopes of batch": {"alibi_slopes": np.stack([SLOPES, 2 * SLOPES])},
}


def uneven(total, ranks):
    """Return lengths that differ, of which the second is 0."""
    if ranks == 1:
        return [total]
    lengths = [0] * ranks
    lengths[0] = total // 2
    for rank in range(2, ranks):
        lengths[rank] = (total - lengths[0]) // ranks
    lengths[-1] += total - sum(lengths)
    return lengths


def scattered(total, ranks):
    """Return a layout of short spans, dealt like cards, in falling order."""
    cuts = sorted({*range(0, total, 23), total})
    spans = list(itertools.pairwise(cuts))[::-1]
    return fd.Layout([spans[rank::ranks] for rank in range(ranks)])


class Case:
    """A whole problem, and what one process makes of it."""

    def __init__(
        self,
        options,
        total=101,
        kv_total=None,
        kv_heads=2,
        batch=(2,),
        dtype=np.float32,
        documents=None,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        kv_total = total if kv_total is None else kv_total

        def normal(*shape):
            return rng.standard_normal((*batch, *shape)).astype(dtype)

        self.query = normal(4, total, 16)
        self.key, self.value = normal(kv_heads, kv_total, 16), normal(kv_heads, kv_total, 24)
        self.grad_out = normal(4, total, 24)
        self.options, self.documents = options, documents
        self.wide = np.float64 if dtype == np.float64 else np.float32
        self.grad_lse = rng.standard_normal((*batch, 4, total)).astype(self.wide)

    def one_process(self):
        """Return out, lse, dq, dk, dv, and dsinks if there are sinks."""
        options, operands = dict(self.options), (self.query, self.key, self.value)
        wants = {"return_dsinks": options.get("sinks") is not None}
        if self.documents is None:
            out, lse = fastattn.attention(*operands, return_lse=True, **options)
            grads = fastattn.attention_backward(
                self.grad_out, *operands, out, lse, grad_lse=self.grad_lse, **wants, **options
            )
            return out, lse, *grads
        starts = (self.documents, self.documents)
        packed = [x[0].swapaxes(0, 1) for x in operands]
        out, lse = fastattn.varlen_attention(*packed, *starts, return_lse=True, **options)
        grads = fastattn.attention_backward(
            self.grad_out[0].swapaxes(0, 1),
            *packed,
            out,
            lse,
            cu_seqlens_q=starts[0],
            cu_seqlens_kv=starts[1],
            grad_lse=self.grad_lse[0],
            **wants,
            **options,
        )
        by_heads = [x.swapaxes(0, 1)[None] for x in (out, *grads[:3])]
        return by_heads[0], lse[None], *by_heads[1:], *grads[3:]

    def rank(self, comm, layout, kv_layout=None, backward=True, **how):
        """Return what one rank gets."""
        rank = engine_of(comm).rank
        kv = kv_layout or layout
        query, key, value = (
            layout.take(self.query, rank),
            kv.take(self.key, rank),
            kv.take(self.value, rank),
        )
        options = dict(self.options)
        for name in ("mask", "bias"):
            x = options.get(name)
            if x is not None and x.ndim > 1 and x.shape[-2] != 1:
                options[name] = layout.take(x, rank)
        how |= {"comm": comm, "layout": layout, "kv_layout": kv_layout}
        if self.documents is not None:
            how["documents"] = self.documents
        out, lse = fd.attention(query, key, value, return_lse=True, **how, **options)
        if not backward:
            return out, lse
        grads = fd.attention_backward(
            layout.take(self.grad_out, rank),
            query,
            key,
            value,
            out,
            lse,
            grad_lse=layout.take(self.grad_lse, rank, axis=-1),
            return_dsinks=options.get("sinks") is not None,
            **how,
            **options,
        )
        return out, lse, *grads


def joined(parts, layout, kv_layout=None):
    """Return whole arrays from what ranks have got."""
    kv = kv_layout or layout
    of = (layout, layout, layout, kv, kv)
    whole = [
        each.join([part[i] for part in parts], axis=-1 if i == 1 else -2)
        for i, each in enumerate(of[: len(parts[0])])
    ]
    if len(parts[0]) > len(of):
        whole.append(sum(part[-1].astype(np.float64) for part in parts).astype(parts[0][-1].dtype))
    return whole


NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def worst(got, expected):
    """Return the largest error of each array, relative to the largest of its numbers."""
    errors = {}
    for name, x, y in zip(NAMES, got, expected, strict=False):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        x, y = x.astype(np.float64), y.astype(np.float64)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        size = np.abs(y, where=np.isfinite(y), out=np.ones_like(y)).max(initial=1)
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0, np.abs(x - y))
        errors[name] = float(np.max(difference, initial=0) / size)
    return errors
