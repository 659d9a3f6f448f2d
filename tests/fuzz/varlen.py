# SPDX-License-Identifier: Apache-2.0
"""`fastattn.varlen_attention` and its gradients: a sequence is what it is alone."""

import types

import numpy as np

import fastattn
from tests.fuzz import attention, backward, problem
from tests.fuzz.compare import arithmetic, dtype_of, same
from tests.fuzz.definition import of_dropout
from tests.fuzz.problem import chance, choice, generator, laid_out, number, numbers_of, often

Q_LENS = (0, 1, 1, 2, 3, 5, 15, 16, 17, 24, 25, 40)
KV_LENS = (0, 1, 2, 7, 16, 17, 31, 64, 100, 127, 128, 129)
LAYOUTS = (*("plain",) * 5, "heads inside", "rows reversed", "columns outside", "inside", "stepped")


def draw(rng):
    """Draw sequences, what is between them and what surrounds them."""
    spec = problem.draw(rng, batches=((),), lengths=False)
    count = often(rng, (1, 2, 3, 4), (0, 6), (9,))
    spec["sequences"] = [
        [
            often(rng, Q_LENS, (48, 49, 97), (129, 257)),
            often(rng, KV_LENS, (255, 257, 300), (1025, 2049)),
        ]
        for _ in range(count)
    ]
    if chance(rng, 0.2):
        spec["sequences"] = [[kv, kv] for _, kv in spec["sequences"]]
    while count and sum(q * k for q, k in spec["sequences"]) * spec["group"] > 100_000:
        spec["sequences"][int(rng.integers(count))] = [choice(rng, Q_LENS), choice(rng, KV_LENS)]
    if spec["head_dim"] + spec["value_dim"] > 300 and chance(rng, 0.8):
        spec["head_dim"], spec["value_dim"] = choice(rng, (8, 64)), choice(rng, (8, 64))
    spec["gaps"] = [choice(rng, (0, 0, 1, 5)) for _ in range(4)]
    spec["layouts"] = [choice(rng, LAYOUTS) for _ in range(3)]
    spec["gradients"] = chance(rng, 0.4)
    spec["grad_lse"], spec["wanted"] = chance(rng, 0.5), chance(rng, 0.8)
    spec["grad_layout"] = choice(rng, ("plain", "inside", "rows reversed"))
    spec["more"] = number(rng)
    return spec


class Packed:
    """The arrays of a spec."""

    def __init__(self, spec):
        self.spec = spec
        lens = np.array(spec["sequences"], int).reshape(-1, 2)
        self.starts = [np.cumsum([spec["gaps"][i], *lens[:, i]]) for i in range(2)]
        totals = [int(s[-1]) + spec["gaps"][i + 2] for i, s in enumerate(self.starts)]
        self.heads = spec["kv_heads"] * spec["group"]
        self.dtype = dtype_of(spec["dtype"])
        kv_dtype = dtype_of(spec.get("kv_dtype", spec["dtype"]))
        self.operands = [
            laid_out(numbers_of(spec, name, shape, dtype), layout)
            for name, shape, dtype, layout in zip(
                ("query", "key", "value"),
                (
                    (totals[0], self.heads, spec["head_dim"]),
                    (totals[1], spec["kv_heads"], spec["head_dim"]),
                    (totals[1], spec["kv_heads"], spec["value_dim"]),
                ),
                (self.dtype, kv_dtype, kv_dtype),
                spec["layouts"],
                strict=True,
            )
        ]
        self.lens = lens
        self.pairs = (self.heads, totals[0], int(lens[:, 1].max(initial=0)))
        self.options = self.arguments()

    def arguments(self):
        """Return the options of the call."""
        spec, (q_lens, kv_lens) = self.spec, self.lens.T
        given = dict(spec["options"])
        pairs = {name: given.pop(name) for name in ("mask", "bias") if name in given}
        once = spec | {"options": given}
        least = min(40, *kv_lens) if len(kv_lens) else 0
        options = problem.arguments(once, q_lens.shape, self.heads, 40, least)
        if given.get("query_offset") == "end" or (
            options.get("query_offset") is not None and "query_offset" not in given
        ):
            options["query_offset"] = kv_lens - q_lens + options.get("key_offset", 0)
        positional = {"is_causal", "window", "alibi_slopes"} & {*options}
        if positional and "query_offset" not in options:
            options["query_offset"] = kv_lens - q_lens + options.get("key_offset", 0)
        for name, how in pairs.items():
            options[name] = problem.pair_array(generator(spec["data"], name), how, self.pairs)
        return options

    def rows(self, b):
        """Return which queries, and which keys, sequence b has."""
        return tuple(slice(int(s[b]), int(s[b + 1])) for s in self.starts)

    def alone(self, b):
        """Return the operands and options of sequence b, heads first."""
        rows, keys = self.rows(b)
        options = dict(self.options)
        for name in ("mask", "bias"):
            if name in options:
                whole = np.broadcast_to(options[name], self.pairs)
                options[name] = whole[:, rows, : keys.stop - keys.start]
        for name in ("query_offset", "key_offset", "kv_lengths"):
            if name in options:
                options[name] = int(np.broadcast_to(options[name], len(self.lens))[b])
        if "alibi_slopes" in options and options["alibi_slopes"].ndim > 1:
            options["alibi_slopes"] = options["alibi_slopes"][b]
        query, key, value = self.operands
        return [x.swapaxes(0, 1) for x in (query[rows], key[keys], value[keys])], options


def check(spec):
    """Raise if a sequence is not what it is alone, or not what the definition says."""
    p = Packed(spec)
    rng = np.random.default_rng(spec["more"])
    fastattn.set_num_threads(spec["threads"])
    out, lse = fastattn.varlen_attention(*p.operands, *p.starts, return_lse=True, **p.options)
    assert out.dtype == p.dtype, f"out has dtype {out.dtype}"
    assert lse.dtype == arithmetic(p.dtype), f"lse has dtype {lse.dtype}"
    assert out.shape == (p.pairs[1], p.heads, spec["value_dim"]), f"out has shape {out.shape}"
    assert lse.shape == p.pairs[:2], f"lse has shape {lse.shape}"
    for rows in (slice(p.starts[0][0]), slice(p.starts[0][-1], None)):
        assert not out[rows].astype(bool).any(), "rows of no sequence are not 0"
        assert (lse[:, rows] == -np.inf).all(), "lse of rows of no sequence is not -inf"
    for b in range(len(p.lens)):
        operands, options = p.alone(b)
        rows, _ = p.rows(b)
        mine = (out[rows].swapaxes(0, 1), lse[:, rows])
        kept = kept_in(operands, options, b)
        if b < 2:
            attention.right(mine, operands, options, kept=kept)
        if kept is None:
            same(f"sequence {b}", mine, fastattn.attention(*operands, return_lse=True, **options))
    again = [np.array(x, x.dtype.newbyteorder("="), order="C") for x in p.operands]
    fastattn.set_num_threads(spec["threads"] % 5 + 1)
    into, whole, usual = attention.room_for(out, rng)
    starts = [s.astype(choice(rng, (np.int32, np.uint64, np.int64))) for s in p.starts]
    got = fastattn.varlen_attention(*again, *starts, return_lse=True, out=into, **p.options)
    same("otherwise laid out, with other threads, into out", (np.array(into), got[1]), (out, lse))
    into[...] = 7
    same("around out", whole, usual)
    if spec["gradients"]:
        check_gradients(p, out, lse)


def kept_in(operands, options, b):
    """Return which pairs dropout keeps in sequence b, if there is any."""
    if not options.get("dropout_p"):
        return None
    query, key = (x.astype(np.float32) for x in operands[:2])
    return fastattn.dropout_mask(query, key, batch_index=b, **of_dropout(options))


def check_gradients(p, out, lse):
    """Raise if the gradients of a sequence are not what they are alone."""
    spec = p.spec
    grad_out, grad_lse = backward.grads_of(spec, out, lse)
    asked = backward.wanted(spec, p.options)

    def gradients():
        grads = fastattn.attention_backward(
            grad_out,
            *p.operands,
            out,
            lse,
            grad_lse=grad_lse,
            cu_seqlens_q=p.starts[0],
            cu_seqlens_kv=p.starts[1],
            **asked,
            **p.options,
        )
        return backward.native(grads)

    got = gradients()
    fastattn.set_num_threads(spec["threads"])
    same("gradients with other threads", gradients(), got)
    dq, dk, dv = got[:3]
    for x, starts in ((dq, p.starts[0]), (dk, p.starts[1]), (dv, p.starts[1])):
        for rows in (slice(starts[0]), slice(starts[-1], None)):
            assert not x[rows].astype(bool).any(), "gradients of no sequence are not 0"
    whole_bias = asked["return_dbias"] and np.shape(p.options["bias"]) == p.pairs
    for b in range(len(p.lens)):
        operands, options = p.alone(b)
        rows, keys = p.rows(b)
        mine = tuple(x[r].swapaxes(0, 1) for x, r in ((dq, rows), (dk, keys), (dv, keys)))
        if whole_bias:
            mine += (got[3][:, rows, : keys.stop - keys.start],)
        kept = kept_in(operands, options, b)
        call = types.SimpleNamespace(
            grad_out=grad_out[rows].swapaxes(0, 1),
            grad_lse=None if grad_lse is None else grad_lse[:, rows],
            out=out[rows].swapaxes(0, 1),
        )
        also = {"return_dbias": bool(whole_bias), "return_dsinks": False}
        if b < 2:
            backward.right(mine, operands, options, call, also, kept=kept)
        if kept is None:
            alone = fastattn.attention_backward(
                call.grad_out,
                *operands,
                call.out,
                lse[:, rows],
                grad_lse=call.grad_lse,
                return_dbias=also["return_dbias"],
                **options,
            )
            same(f"gradients of sequence {b}", mine, backward.native(alone))
