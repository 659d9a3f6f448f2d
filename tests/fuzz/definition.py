# SPDX-License-Identifier: Apache-2.0
"""What attention and its gradients are, a second time, with how far rounding may carry them.

Written apart from `fastattn.reference`, which it is held against. Everything is expanded to
(*batch, q_heads, q_len, kv_len) and computed in one dtype. Inputs are finite, but for masks.

Beside each result stands its bound: what one relative rounding error of 1 in each intermediate
number would add up to, to first order. Times the machine epsilon, it is what a plain program may be
wrong by.
"""

import numpy as np

import fastattn

ROUGH_POWER = 3e-6  # the relative error of a power of 2 that is to be rounded to bfloat16
OWN_ERROR = 4  # roundings of a probability that do not depend on the size of its score


def wide(x, dtype):
    """Return x in the dtype; longdouble does not know bfloat16."""
    x = np.asarray(x)
    return x.astype(np.float32 if x.dtype.itemsize == 2 else x.dtype).astype(dtype)


def expanded(x, batch, heads, dtype):
    """Return an operand with every axis of the batch, and each head as often as it is read."""
    x = wide(x, dtype)
    x = x[None] if x.ndim == 2 else x
    x = np.repeat(x, heads // x.shape[-3] if x.shape[-3] else 1, axis=-3)
    return np.broadcast_to(x, (*batch, *x.shape[-3:]))


def turned(x):
    """Return the matrices of x transposed."""
    return x.swapaxes(-1, -2)


def folded(x, shape):
    """Return the sums of x over what was repeated to make it of an operand of that shape."""
    whole = (1,) * (3 - len(shape)) + tuple(shape)
    extra = x.ndim - len(whole)
    x = x.sum(axis=tuple(range(extra)))
    if whole[-3] != x.shape[-3]:
        heads = whole[-3]
        x = x.reshape(*x.shape[:-3], heads, x.shape[-3] // heads, *x.shape[-2:]).sum(axis=-3)
    axes = tuple(i for i, n in enumerate(whole) if n == 1 and x.shape[i] != 1)
    return x.sum(axis=axes, keepdims=True).reshape(shape)


def summed(x, shape):
    """Return the sums of x over the axes along which an array of that shape was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return x.sum(axis=axes, keepdims=True)


def of_dropout(options):
    """Return the options that decide which pairs are dropped."""
    names = ("dropout_p", "seed", "query_offset", "key_offset", "head_offset", "batch_offset")
    return {name: options[name] for name in names if name in options}


class Formula:
    """One call, computed step by step.

    With probs_eps, the probabilities are rounded to it; bound_of lets the bounds alone know of it.
    """

    def __init__(
        self, query, key, value, options, dtype, *, kept=None, probs_eps=0.0, bound_of=0.0
    ):
        self.dtype = dtype
        self.flat = max(np.ndim(x) for x in (query, key, value)) == 2
        self.shapes = [x.shape for x in (query, key, value)]
        self.dtypes = [x.dtype for x in (query, key, value)]
        heads = query.shape[-3] if query.ndim > 2 else 1
        batch = np.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
        q, k, v = (expanded(x, batch, heads, dtype) for x in (query, key, value))
        self.q, self.k, self.v, self.options = q, k, v, options
        q_len, kv_len = q.shape[-2], k.shape[-2]
        self.pairs = pairs = (*batch, heads, q_len, kv_len)
        self.eps = eps = np.finfo(np.float64 if query.dtype == np.float64 else np.float32).eps

        scale, cap = options.get("scale"), options.get("softcap")
        self.scale = dtype(1 / np.sqrt(dtype(q.shape[-1])) if scale is None else scale)
        kt = turned(k)
        scores = self.scale * (q @ kt)
        size = abs(self.scale) * (abs(q) @ abs(kt))
        self.slope, self.slope_bound = dtype(1), dtype(0)
        if cap is not None:
            tanh = np.tanh(scores / dtype(cap))
            self.slope = 1 - tanh * tanh
            self.slope_bound = 2 * abs(tanh) * (size / dtype(cap) * self.slope + abs(tanh))
            scores = dtype(cap) * tanh
            size = size * self.slope + abs(scores)

        seen = np.ones(pairs, bool)
        for array in (options.get("bias"), options.get("mask")):
            if array is None:
                continue
            array = np.broadcast_to(array, pairs)
            if array.dtype == bool:
                seen &= array
                continue
            added = wide(array, dtype)
            seen &= added != -np.inf
            added = np.where(added == -np.inf, 0, added)
            scores = scores + added
            size = size + abs(added) + abs(scores)
        offset = np.asarray(
            0 if options.get("query_offset") is None else options["query_offset"], np.int64
        ) - np.asarray(options.get("key_offset", 0), np.int64)
        ahead = np.arange(kv_len) - np.arange(q_len)[:, None] - offset[..., None, None, None]
        if options.get("alibi_slopes") is not None:
            slopes = wide(options["alibi_slopes"], dtype)[..., None, None]
            added = slopes * abs(ahead).astype(dtype)
            scores = scores - added
            size = size + abs(added) + abs(scores)
        left, right = options.get("window") or (None, None)
        if options.get("is_causal"):
            seen &= ahead <= 0
        if left is not None:
            seen &= ahead >= -left
        if right is not None:
            seen &= ahead <= right
        if options.get("kv_lengths") is not None:
            lengths = np.asarray(options["kv_lengths"])[..., None, None, None]
            seen &= np.arange(kv_len) < lengths
        self.seen, self.sees = seen, seen.any(axis=-1, keepdims=True)

        top = np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
        top = np.where(self.sees, top, 0)
        powers = np.where(seen, np.exp(np.where(seen, scores - top, 0)), 0)
        total = powers.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = top + np.log(total)
        self.softmax = powers / np.where(self.sees, total, 1)
        sinks = options.get("sinks")
        self.p_sink, self.share = np.zeros_like(lse), np.ones_like(lse)
        level = abs(top)
        if sinks is not None:
            sink = wide(sinks, dtype)[:, None, None]
            most = np.maximum(sink, top)
            of_sink, of_keys = np.exp(sink - most), total * np.exp(top - most)
            both = np.where(self.sees, of_sink + of_keys, 1)
            self.p_sink = np.where(self.sees, of_sink / both, 0)
            self.share = np.where(self.sees, of_keys / both, 0)
            level = level + np.where(sink == -np.inf, 0, abs(sink)) * self.p_sink
        self.probs = self.softmax * self.share
        self.factor = np.ones((), dtype)
        if options.get("dropout_p"):
            p = dtype(options["dropout_p"])
            self.factor = (self.kept() if kept is None else kept) / (1 - p if p < 1 else 1)
        weights = self.probs * self.factor
        if probs_eps:
            weights = rounded(weights, probs_eps)
        self.weights = weights

        level = level + (self.softmax * size).sum(axis=-1, keepdims=True)
        self.error = np.where(seen, size + level + OWN_ERROR + bound_of / (2 * eps), 0)
        self.lse = lse[..., 0]
        self.lse_bound = (level + np.where(self.sees, abs(lse), 0) + 1)[..., 0]
        if bound_of:
            self.lse_bound = self.lse_bound + ROUGH_POWER / eps
        self.out = weights @ v
        self.out_bound = (weights * (self.error + 1)) @ abs(v)

    def kept(self):
        """Return which pairs dropout keeps."""
        *batch, heads, q_len, kv_len = self.pairs
        query, key = (
            np.broadcast_to(np.float32(0), (*batch, heads, n, 1)) for n in (q_len, kv_len)
        )
        return fastattn.dropout_mask(query, key, **of_dropout(self.options))

    def gradients(self, grad_out, grad_lse=None, out=None, out_info=None, pairs_eps=0.0):
        """Return [(gradient, bound, size of what is rounded)] of query, key and value.

        Those of bias and sinks are then asked of `of_bias` and `of_sinks`. A program takes the row
        sums of P dP from out, which was rounded as out_info says; where it multiplies pairs, it
        rounds P and dS to pairs_eps. With out, this does too; without, only the bounds know.
        """
        dtype, eps = self.dtype, self.eps
        do = wide(grad_out, dtype)
        do = do[None] if do.ndim == 2 else do
        vt = turned(self.v)
        dp, dp_size = self.factor * (do @ vt), self.factor * (abs(do) @ abs(vt))
        if out is None:
            delta = (self.probs * dp).sum(axis=-1, keepdims=True)
        else:
            o = wide(out, dtype)
            delta = (do * (o[None] if o.ndim == 2 else o)).sum(axis=-1, keepdims=True)
        delta_bound = (self.probs * (self.error + 1) * dp_size).sum(axis=-1, keepdims=True)
        out_bound = abs(self.out)
        if out_info is not None:
            out_bound = out_bound * (1 + float(out_info.eps) / (2 * eps))
            out_bound = out_bound + float(out_info.smallest_subnormal) / (2 * eps)
        delta_bound = delta_bound + (abs(do) * out_bound).sum(axis=-1, keepdims=True)
        dlse = np.zeros((), dtype)
        if grad_lse is not None:
            dlse = wide(grad_lse, dtype)
            dlse = np.where(self.sees, (dlse[None] if self.flat else dlse)[..., None], 0)
        ds = self.probs * (dp - delta) + self.softmax * dlse
        ds_bound = self.probs * (self.error * (abs(dp) + abs(delta)) + dp_size + delta_bound)
        ds_bound = ds_bound + self.softmax * abs(dlse) * self.error + abs(ds)
        self.ds, self.ds_bound = np.where(self.seen, ds, 0), np.where(self.seen, ds_bound, 0)
        row_error = (self.softmax * self.error).sum(axis=-1, keepdims=True) + OWN_ERROR
        self.dsinks = -self.p_sink * delta
        self.dsinks_bound = self.p_sink * (row_error * abs(delta) + delta_bound)

        dz = self.ds * self.slope
        dz_bound = self.ds_bound * self.slope + abs(self.ds) * self.slope_bound + abs(dz)
        weights, weights_bound = self.weights, self.weights * (self.error + 1)
        dz_bound = dz_bound + abs(dz) * (pairs_eps / (2 * eps))
        weights_bound = weights_bound + weights * (pairs_eps / (2 * eps))
        if pairs_eps and out is not None:
            dz, weights = rounded(dz, pairs_eps), rounded(self.probs, pairs_eps) * self.factor
        results = []
        for x, bound, by, scale, shape, own in (
            (dz, dz_bound, self.k, self.scale, self.shapes[0], self.dtypes[0]),
            (turned(dz), turned(dz_bound), self.q, self.scale, self.shapes[1], self.dtypes[1]),
            (turned(weights), turned(weights_bound), do, 1, self.shapes[2], self.dtypes[2]),
        ):
            whole = (*self.pairs[:-3], *((1,) * (3 - len(shape)) + shape)[-3:])
            part = folded(scale * (x @ by), whole)
            half = np.dtype(own).name == "float16"
            least = np.finfo(np.float16).tiny if half else 0  # whose ulp is the least
            grad, size = folded(part, shape), folded(np.maximum(abs(part), least), shape)
            size = size if whole == shape else size + abs(grad)  # each part is rounded, then all
            results.append((grad, folded(abs(scale) * (bound @ abs(by)), shape), size))
        return results

    def of_bias(self, shape):
        """Return the gradient by a bias of that shape, and its bound, after `gradients`.

        What the keys of a row share needs no scores: dS sums up to what the sink gives, and of lse.
        """
        bound = summed(self.ds_bound, shape)
        if shape[-1:] in ((), (1,)):
            bound = bound + summed(self.dsinks_bound, shape)
        return summed(self.ds, shape), bound

    def of_sinks(self):
        """Return the gradient by sinks, and its bound, after `gradients`."""
        shape = (self.pairs[-3], 1, 1)
        return tuple(summed(x, shape)[:, 0, 0] for x in (self.dsinks, self.dsinks_bound))


def rounded(x, eps):
    """Return x rounded to a machine epsilon, whatever its exponent."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * (2 / eps)) * (eps / 2), exponent)
