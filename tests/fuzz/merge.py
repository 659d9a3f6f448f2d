# SPDX-License-Identifier: Apache-2.0
"""`fastattn.merge`: attention over parts of the keys becomes attention over all of them."""

import itertools

import numpy as np

import fastattn
from tests.fuzz import problem
from tests.fuzz.compare import formulas, near
from tests.fuzz.problem import INF, LAYOUTS, Problem, choice, generator, laid_out


def draw(rng):
    """Draw a problem, and where its keys are cut."""
    spec = problem.draw(rng)
    spec["cuts"] = sorted(int(rng.integers(0, spec["kv_len"] + 1)) for _ in range(rng.integers(4)))
    spec["part_layout"] = choice(rng, LAYOUTS)
    return spec


def check(spec):
    """Raise if the parts do not make the whole."""
    p = Problem(spec)
    fastattn.set_num_threads(spec["threads"])
    kv_len = p.pairs[-1]
    cuts = [0, *(min(cut, kv_len) for cut in spec["cuts"]), kv_len]
    options = {name: x for name, x in p.options.items() if name != "sinks"}
    parts = []
    for begin, end in itertools.pairwise(cuts):
        query, key, value = p.operands
        own = dict(options)
        for name in ("mask", "bias"):
            if name in own and own[name].shape[-1:] not in ((), (1,)):
                own[name] = own[name][..., begin:end]
        own.setdefault("query_offset", 0)
        own["key_offset"] = own.get("key_offset", 0) + begin
        if "kv_lengths" in own:
            own["kv_lengths"] = np.clip(np.asarray(own["kv_lengths"]) - begin, 0, end - begin)
        part = fastattn.attention(
            query, key[..., begin:end, :], value[..., begin:end, :], return_lse=True, **own
        )
        parts.append(tuple(laid_out(x, spec["part_layout"]) for x in part))
    order = generator(spec["data"], "order").permutation(len(parts))
    out, lse = fastattn.merge(*[parts[i] for i in order], sinks=p.options.get("sinks"))
    assert out.dtype == p.dtype, f"out has dtype {out.dtype}"
    truth, plain = formulas(*p.operands, p.options)
    # Each part is right to its own bound, and rounded on the way where its dtype is.
    count = len(parts) + 1
    if truth.sees.size == 0:
        return
    rounding = count * abs(np.where(truth.seen, truth.weights, 0)) @ abs(truth.v)
    for name, got, wanted, bound, rough, size in (
        ("out", out, truth.out, truth.out_bound, plain.out, rounding),
        ("lse", lse, truth.lse, truth.lse_bound, plain.lse, None),
    ):
        got = got[None] if truth.flat else got
        near(f"merged {name}", got, wanted, count * bound, rough, truth.eps, size)
    assert (out[(lse == -INF)] == 0).all(), "a row that sees nothing is not 0"
