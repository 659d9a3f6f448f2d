# SPDX-License-Identifier: Apache-2.0
"""When are gradients right? Held against the definition, and the plain formula step by step."""

import ml_dtypes
import numpy as np

from fastattn import attention, attention_backward, reference
from tests.support.correctness import EXTRA_ULPS, of_dropout, without_dropout


def grads_of(operands, options, seed=1, backward=attention_backward, **more):
    """Return the gradients for random grad_out and grad_lse, through the call itself."""
    out, lse = attention(*operands, return_lse=True, **options)
    rng = np.random.default_rng(seed)
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    grad_lse = rng.standard_normal(lse.shape).astype(lse.dtype)
    wanted = {
        "return_dbias": options.get("bias") is not None,
        "return_dsinks": options.get("sinks") is not None,
    }
    return backward(grad_out, *operands, out, lse, grad_lse=grad_lse, **wanted, **options, **more)


class Formula:
    """The steps of the plain formula in one dtype, for the problem of `grads_of`."""

    def __init__(self, operands, options, seed, dtype):
        dtype = np.dtype(dtype)
        out, lse = attention(*operands, return_lse=True, **options)
        rng = np.random.default_rng(seed)
        self.grad_out = rng.standard_normal(out.shape).astype(out.dtype).astype(dtype)
        self.grad_lse = rng.standard_normal(lse.shape).astype(lse.dtype).astype(dtype)[..., None]
        self.shapes = [x.shape for x in operands]
        self.query, key, value = (x.astype(dtype) for x in operands)
        if self.query.ndim > 2:
            heads = self.query.shape[-3]
            key, value = (x.repeat(heads // x.shape[-3], axis=-3) for x in (key, value))
        self.key, self.value = key, value
        scale = options.get("scale")
        self.scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        self.kept = np.ones((), dtype)
        if options.get("dropout_p"):
            kept = reference.dropout_mask(self.query, key, **of_dropout(options))
            self.kept = kept / (1 - dtype.type(options["dropout_p"]))
        weights, rest = reference.attention_weights, without_dropout(options)
        self.probs = self.pure = weights(self.query, key, compute_dtype=dtype, **rest)
        if options.get("sinks") is not None:
            self.pure = weights(self.query, key, compute_dtype=dtype, **(rest | {"sinks": None}))
        self.delta = (self.grad_out * out.astype(dtype)).sum(-1, keepdims=True)
        self.bias, self.sinks = options.get("bias"), options.get("sinks")
        scores = self.scale * (self.query @ key.swapaxes(-1, -2))
        self.slope, cap = 1.0, options.get("softcap")
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
            self.slope = 1 - (scores / cap) ** 2
        self.largest_score = np.abs(scores).max(initial=1)

    def sums(self, probs, dscores, scale, grad_out, query, key):
        full = (
            scale * dscores @ key,
            scale * dscores.swapaxes(-1, -2) @ query,
            probs.swapaxes(-1, -2) @ grad_out,
        )
        return [
            reference._summed_over_group(x, shape)
            for x, shape in zip(full, self.shapes, strict=True)
        ]

    def gradients(self, dtype):
        """Return all of them; on their way to dq, dk and dv, P and dS are rounded to that dtype."""
        dprobs = self.kept * (self.grad_out @ self.value.swapaxes(-1, -2))
        dscores = self.probs * (dprobs - self.delta) + self.pure * self.grad_lse
        probs, rounded = (
            x.astype(dtype).astype(x.dtype) for x in (self.probs, dscores * self.slope)
        )
        sums = self.sums(
            probs * self.kept, rounded, self.scale, self.grad_out, self.query, self.key
        )
        return sums + self.added(dscores, -self.delta)

    def magnitudes(self):
        """Return the largest sum of the sizes of what is added up, for each gradient."""
        dprobs = self.kept * (abs(self.grad_out) @ abs(self.value).swapaxes(-1, -2))
        dscores = self.probs * (dprobs + abs(self.delta)) + self.pure * abs(self.grad_lse)
        sizes = [abs(x) for x in (self.grad_out, self.query, self.key)]
        probs = self.probs * self.kept
        sums = self.sums(probs, dscores * self.slope, abs(self.scale), *sizes)
        return [np.max(x, initial=0) for x in sums + self.added(dscores, abs(self.delta))]

    def added(self, dscores, delta):
        """Return what becomes of bias and sinks, if they are there."""
        added = []
        if self.bias is not None:
            added.append(reference._summed_to(dscores, np.shape(self.bias)))
        if self.sinks is not None:
            of_sink = (1 - self.probs.sum(-1, keepdims=True)) * delta
            added.append(reference._summed_to(of_sink, (len(self.sinks), 1, 1))[:, 0, 0])
        return added


def gradient_errors(got, operands, options, seed=1, rounded_to=None, own_dtypes=True):
    """Return each gradient's largest error, and the most that FlashAttention's rule allows.

    That is twice the error of the plain formula, which rounds P and dS to that dtype, plus
    rounding. As in `assert_within_gate`, its error counts as no less than what rounding a score and
    its lse once causes. It too starts from the out of the call. own_dtypes: gradients must have the
    dtypes of their operands.
    """
    query = operands[0]
    wide = np.longdouble if query.dtype == np.float64 else np.float64
    arithmetic = np.promote_types(query.dtype, np.float32)
    truth = grads_of(operands, options, seed, reference.attention_backward, compute_dtype=wide)
    plain = Formula(operands, options, seed, arithmetic).gradients(rounded_to or arithmetic)
    exactly = Formula(operands, options, seed, wide)
    lse = attention(*operands, return_lse=True, **options)[1]
    score = np.abs(lse[np.isfinite(lse)]).max(initial=exactly.largest_score)
    eps, pairs = np.finfo(arithmetic).eps, []
    for grad, rough, exact, magnitude in zip(got, plain, truth, exactly.magnitudes(), strict=True):
        assert grad.shape == exact.shape
        assert grad.dtype == exact.dtype or not own_dtypes
        ulp = EXTRA_ULPS * eps + ml_dtypes.finfo(exact.dtype).eps
        grad, rough, exact = (x.astype(wide) for x in (grad, rough, exact))
        assert np.isfinite(grad).all()
        error, rough_error = (np.abs(x - exact).max(initial=0) for x in (grad, rough))
        rounding = ulp * np.abs(exact).max(initial=0)
        pairs.append((error, 2 * max(rough_error, score * eps * magnitude) + rounding))
    return pairs
