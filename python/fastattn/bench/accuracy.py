# SPDX-License-Identifier: Apache-2.0
"""How far a result is from the truth: the definition in float64, for a sample of the rows.

Called by measure.py for the truth and by worker.py for a library's rows. The whole of a large case
would take the definition minutes; the rows of a head are alike, so a sample shows the error.
"""

import numpy as np

from fastattn import reference
from fastattn.bench.cases import Array, Case, make_inputs, score_options, seen_by_position

ROWS = 64


def sampled(case: Case) -> tuple[Array, Array, Array]:
    """
    Return the indices of the batch elements, heads and rows: the first and last, and 64 rows.

    The rows are spread evenly over the queries; of padded ones, over those that both elements have.
    """
    batches, heads = (np.unique([0, n - 1]) for n in (case.batch, case.q_heads))
    q_len = min(case.lengths[0], case.lengths[-1]) if case.ragged_queries else case.q_len
    rows = np.unique(np.linspace(0, q_len - 1, ROWS).astype(int))
    return batches, heads, rows


def expected(case: Case) -> Array:
    """Compute the sampled rows in float64."""
    batches, heads, rows = sampled(case)
    inputs = make_inputs(case)
    kv_heads = np.ix_(batches, heads // case.groups)
    query = inputs.query[np.ix_(batches, heads, rows)]
    key, value = (x[kv_heads] for x in (inputs.key, inputs.value))
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    shape = (case.batch, case.q_heads, case.q_len, case.kv_len)
    mask, bias = (
        None if x is None else np.broadcast_to(x, shape)[np.ix_(batches, heads, rows)]
        for x in (inputs.mask, inputs.bias)
    )
    seen = seen_by_position(case, rows)
    mask = seen if mask is None else seen & mask
    if inputs.grad_out is not None:  # dq alone: a row of it needs no other row
        grad_out = inputs.grad_out[np.ix_(batches, heads, rows)].astype(np.float64)
        grads = reference.attention_backward(
            grad_out, query, key, value, None, None, mask=mask, bias=bias
        )
        return grads[0]
    more = score_options(case)
    if case.alibi:
        distance = np.abs(np.arange(case.kv_len) - (rows + case.query_offset)[:, None])
        bias = -more.pop("alibi_slopes")[heads, None, None] * distance
    if case.sinks:
        more["sinks"] = more["sinks"][heads]
    return np.asarray(reference.attention(query, key, value, mask=mask, bias=bias, **more))


def max_error(rows: Array, truth: Array) -> float:
    """Return the largest difference; NaN if there is one."""
    return float(np.abs(rows - truth).max())
