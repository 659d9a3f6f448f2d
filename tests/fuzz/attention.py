# SPDX-License-Identifier: Apache-2.0
"""`fastattn.attention`: every argument with every other, and what changes no bit."""

import itertools

import numpy as np

import fastattn
from tests.fuzz import problem
from tests.fuzz.compare import arithmetic, formulas, near, same
from tests.fuzz.definition import folded, summed
from tests.fuzz.problem import Problem, choice, number

MORE_THAN_FEW = 16  # queries of a chunk: fewer may take another form
CHECKS = (
    *("threads", "layout", "out", "chunks", "element", "hidden", "poison", "padding", "others"),
    *("wide", "accumulate"),
)


def draw(rng):
    """Draw a problem, and three of the promises to hold it against."""
    spec = problem.draw(rng)
    spec["checks"] = sorted({choice(rng, CHECKS) for _ in range(3)})
    spec["more"] = number(rng)
    return spec


def check(spec):
    """Raise if a result is not what it should be."""
    p = Problem(spec)
    fastattn.set_num_threads(spec["threads"])
    result = fastattn.attention(*p.operands, return_lse=True, **p.options)
    assert result[0].dtype == p.dtype, f"out has dtype {result[0].dtype}"
    assert result[1].dtype == arithmetic(p.dtype), f"lse has dtype {result[1].dtype}"
    truth = right(result, p.operands, p.options)
    rng = np.random.default_rng(spec["more"])
    for name in spec["checks"]:
        globals()[f"check_{name.replace(' ', '_')}"](p, result, truth, rng)


def right(result, operands, options, **more):
    """Assert that (out, lse) is what the definition says, which is returned."""
    truth, plain = formulas(*operands, options, **more)
    shape = truth.out.shape[1:] if truth.flat else truth.out.shape
    assert result[0].shape == shape, f"out has shape {result[0].shape}, not {shape}"
    for name, got, i in (("out", result[0], 0), ("lse", result[1], 1)):
        wanted, bound, rough = (
            (truth.out, truth.out_bound, plain.out)
            if i == 0
            else (truth.lse, truth.lse_bound, plain.lse)
        )
        near(name, got[None] if truth.flat else got, wanted, bound, rough, truth.eps)
    return truth


def again(p, operands=None, options=None, **more):
    """Return (out, lse) of the call with something changed."""
    operands = p.operands if operands is None else operands
    options = p.options if options is None else options
    return fastattn.attention(*operands, return_lse=True, **options, **more)


def check_threads(p, result, truth, rng):
    """Another number of threads changes no bit."""
    fastattn.set_num_threads(p.spec["threads"] % 5 + 1)
    same("with other threads", again(p), result)


def check_layout(p, result, truth, rng):
    """Strides change no bit."""
    same("laid out plainly", again(p, p.plain, p.plain_options()), result)


def check_out(p, result, truth, rng):
    """Write a result where out says, and nowhere else."""
    if not result[0].size:  # it has no strides to speak of
        same("an empty out", again(p, out=np.empty_like(result[0])), result)
    into, whole, usual = room_for(result[0], rng)
    got = fastattn.attention(*p.operands, out=into, **p.options)
    assert got is into, "out is not returned"
    same("into out", np.array(into), result[0])
    into[...] = 7
    same("around out", whole, usual)


def check_wide(p, result, truth, rng):
    """Write a result of half precision as float32: rounded, it has the same bits."""
    dtype = arithmetic(p.dtype)
    into, whole, usual = room_for(np.empty(result[0].shape, dtype), rng)
    sums, all_sums, usual_sums = room_for(result[1], rng)
    fastattn.attention(*p.operands, out=into, lse=sums, **p.options)
    same("rounded later", (into.astype(p.dtype), np.array(sums)), result)
    into[...], sums[...] = 7, 7
    same("around float32 results", (whole, all_sums), (usual, usual_sums))


def check_accumulate(p, result, truth, rng):
    """Attend to some keys and then to the others, with nothing and everything between."""
    options = {name: x for name, x in p.options.items() if name != "sinks"}
    dtype, kv_len = arithmetic(p.dtype), p.pairs[-1]
    out, lse = np.full(result[0].shape, np.nan, dtype), np.full(result[1].shape, -np.inf, dtype)
    cuts = sorted(int(rng.integers(0, kv_len + 1)) for _ in range(2))
    query, key, value = p.operands
    for begin, end in itertools.pairwise((0, *cuts, kv_len)):
        own = options | {"key_offset": options.get("key_offset", 0) + begin}
        own.setdefault("query_offset", 0)
        for name in ("mask", "bias"):
            if name in own and own[name].shape[-1:] not in ((), (1,)):
                own[name] = own[name][..., begin:end]
        if "kv_lengths" in own:
            own["kv_lengths"] = np.clip(np.asarray(own["kv_lengths"]) - begin, 0, end - begin)
        parts = key[..., begin:end, :], value[..., begin:end, :]
        fastattn.attention(query, *parts, out=out, lse=lse, accumulate=True, **own)
    truth, plain = formulas(*p.operands, options)
    if truth.sees.size == 0:
        return
    for name, got, wanted, bound, rough in (
        ("out", out, truth.out, truth.out_bound, plain.out),
        ("lse", lse, truth.lse, truth.lse_bound, plain.lse),
    ):
        got = got[None] if truth.flat else got
        near(f"accumulated {name}", got, wanted, 4 * bound, rough, truth.eps)


def room_for(x, rng):
    """Return an array for a result in the middle of a larger one, that one, and its copy."""
    whole = np.full([n + 3 for n in x.shape], 7, x.dtype)
    if rng.random() < 0.3 and x.ndim > 2:
        whole = np.ascontiguousarray(whole.swapaxes(-2, -3)).swapaxes(-2, -3)
    if rng.random() < 0.3:
        whole = whole[..., ::-1, :]
    return whole[tuple(slice(1, -2) for _ in x.shape)], whole, whole.copy()


def check_chunks(p, result, truth, rng):
    """So does a cut between queries, where both parts take the form of the whole."""
    q_len = p.pairs[-2]
    if q_len <= 2 * MORE_THAN_FEW + 1:
        return
    cut = int(rng.integers(MORE_THAN_FEW + 1, q_len - MORE_THAN_FEW))
    for rows in (slice(0, cut), slice(cut, q_len)):
        part = again(p, *p.rows(rows))
        same(f"queries {rows}", part, (result[0][..., rows, :], result[1][..., rows]))


def check_element(p, result, truth, rng):
    """Compute an element of the batch alone: that changes no bit."""
    if 0 in p.batch or not p.batch or p.options.get("dropout_p"):
        return
    index = tuple(int(rng.integers(n)) for n in p.batch)
    same(f"element {index} alone", again(p, *p.element(index)), tuple(x[index] for x in result))


def hidden_from_all(p, truth):
    """Return which keys no row sees, and which queries see none, in the shapes of key and query."""
    query, key, _ = p.operands
    keys = collected(truth.seen.any(axis=-2)[..., None], key, p)
    return ~keys[..., 0], ~collected(truth.sees, query, p)[..., 0]


def collected(x, operand, p):
    """Return for each row of an operand whether any of what was made of it is true."""
    return folded(x.astype(int), (*operand.shape[:-1], 1)) > 0


def check_hidden(p, result, truth, rng):
    """NaN and Inf where no row looks change no bit, nor do they in queries that see nothing."""
    keys, queries = hidden_from_all(p, truth)
    query, key, value = (x.copy() for x in p.plain)
    query[queries] = choice(rng, (np.nan, np.inf))
    key[keys] = choice(rng, (np.nan, np.inf, -np.inf))
    if key.shape[:-1] == value.shape[:-1]:
        value[keys] = choice(rng, (np.nan, np.inf, -np.inf))
    options = p.plain_options()
    for name in ("mask", "bias"):
        if name in options and options[name].dtype != bool:
            unread = summed(truth.seen.astype(int), options[name].shape) == 0
            hides = options[name] == -np.inf  # one of the things that say what is not seen
            options[name][unread & ~hides] = choice(rng, (np.nan, np.inf, 1.0))
    same("with hidden poison", again(p, [query, key, value], options), result)


def check_poison(p, result, truth, rng):
    """NaN in a key, or value, reaches the rows that see it, and leaves the bits of the others."""
    kv_len = p.pairs[-1]
    if not kv_len or 0 in p.pairs or not p.spec["value_dim"]:
        return
    which = int(rng.integers(1, 3))
    at = rng.integers(0, kv_len, int(rng.integers(1, 4)))
    operands = [x.copy() for x in p.plain]
    operands[which][..., at, :] = np.nan
    seen = truth.seen
    if which == 2:
        seen = seen & (np.broadcast_to(truth.factor, seen.shape) > 0)
    reached = seen[..., at].any(axis=-1)
    got = again(p, operands)
    reached = reached[0] if truth.flat else reached
    if which == 2:
        same("lse with poison in values", got[1], result[1])
        assert np.isnan(got[0][reached].astype(np.float32)).all(), "a seen NaN is not in out"
    else:
        assert np.isnan(got[1][reached]).all(), "a seen NaN is not in lse"
        if not p.options.get("dropout_p"):
            assert np.isnan(got[0][reached].astype(np.float32)).all(), "a seen NaN is not in out"
    for g, x in zip(got, result, strict=True):
        same("rows that do not see the poison", g[~reached], x[~reached])


def check_padding(p, result, truth, rng):
    """Keys behind kv_lengths change no bit, be they there or not."""
    kv_len = p.pairs[-1]
    padding = choice(rng, (1, 3, 127, 128, 500))
    operands = [p.operands[0]]
    for x in p.operands[1:]:
        fill = np.full((*x.shape[:-2], padding, x.shape[-1]), np.nan, x.dtype)
        operands.append(np.concatenate([x, fill], axis=-2))
    options = dict(p.options)
    options.setdefault("kv_lengths", kv_len)
    options.setdefault("query_offset", 0)
    for name in ("mask", "bias"):
        if name in options and options[name].shape[-1:] not in ((), (1,)):
            widths = [(0, 0)] * (options[name].ndim - 1) + [(0, padding)]
            options[name] = np.pad(options[name], widths)
        elif name in options and options[name].shape[-1:] == (1,) and kv_len != 1:
            continue
    same(f"with {padding} keys of padding", again(p, operands, options), result)


def check_others(p, result, truth, rng):
    """Compare with the calls beside it: without lse, the report, the weights, the reference."""
    same("without lse", fastattn.attention(*p.operands, **p.options), result[0])
    report = fastattn.explain(*p.operands, **p.options)
    assert report["kernel"] in ("tiled", "decode"), f"explain says {report['kernel']!r}"
    if not {*p.options} - {"mask", "scale"}:
        torch_like = fastattn.scaled_dot_product_attention(
            *p.operands, p.options.get("mask"), scale=p.options.get("scale"), enable_gqa=True
        )
        same("scaled_dot_product_attention", torch_like, result[0])
    if truth.seen.size > 30_000:
        return
    dropout = ("dropout_p", "seed", "head_offset", "batch_offset")
    weights = {name: x for name, x in p.options.items() if name not in dropout}
    largest = np.broadcast_shapes(*(x.shape[:-3] for x in p.operands[:2]))
    if largest == p.batch and p.dtype == np.float64:
        probs = fastattn.attention_weights(*p.operands[:2], **weights)
        error = abs(probs - (truth.probs[0] if probs.ndim == 2 else truth.probs))
        assert error.max(initial=0) < 1e-12 * max(1, abs(truth.lse_bound).max(initial=0))
    exact = [x.astype(np.float64) for x in p.plain]
    out, lse = fastattn.reference.attention(*exact, return_lse=True, **p.options)
    eps = np.finfo(np.float64).eps
    for name, got, wanted, bound in (
        ("out of the reference", out, truth.out, truth.out_bound),
        ("lse of the reference", lse, truth.lse, truth.lse_bound),
    ):
        near(name, got[None] if truth.flat else got, wanted, bound, wanted, eps)
