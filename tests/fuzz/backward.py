# SPDX-License-Identifier: Apache-2.0
"""`fastattn.attention_backward`: every gradient against the definition, and what changes no bit."""

import numpy as np

import fastattn
from tests.fuzz import problem
from tests.fuzz.attention import hidden_from_all
from tests.fuzz.compare import arithmetic, finfo, formulas, in_pairs, near, same
from tests.fuzz.problem import LAYOUTS, Problem, chance, choice, generator, laid_out, number

CHECKS = ("threads", "layout", "element", "hidden", "reference", "accumulate")


def draw(rng):
    """Draw a problem, and two of the promises to hold it against."""
    spec = problem.draw(rng)
    spec["grad_lse"] = chance(rng, 0.5)
    spec["wanted"] = chance(rng, 0.8)
    spec["grad_layout"] = choice(rng, LAYOUTS)
    spec["checks"] = sorted({choice(rng, CHECKS) for _ in range(2)})
    spec["more"] = number(rng)
    return spec


class Call:
    """A call of attention, and the arguments of its gradients."""

    def __init__(self, spec):
        self.p = p = Problem(spec)
        fastattn.set_num_threads(spec["threads"])
        self.out, self.lse = fastattn.attention(*p.operands, return_lse=True, **p.options)
        self.grad_out, self.grad_lse = grads_of(spec, self.out, self.lse)
        self.wanted = wanted(spec, p.options)

    def gradients(self, operands=None, options=None, **changes):
        """Return what attention_backward makes of the call, with something changed."""
        arrays = {"grad_out": self.grad_out, "out": self.out, "lse": self.lse} | changes
        query, key, value = self.p.operands if operands is None else operands
        options = self.p.options if options is None else options
        if self.grad_lse is not None:
            arrays.setdefault("grad_lse", self.grad_lse)
        grads = fastattn.attention_backward(
            query=query, key=key, value=value, **arrays, **self.wanted, **options
        )
        return native(grads)


def native(arrays):
    """Return arrays in the machine's byte order: a gradient may have that of what it is for."""
    return tuple(x.astype(x.dtype.newbyteorder("=")) if not x.dtype.isnative else x for x in arrays)


def grads_of(spec, out, lse):
    """Return random gradients of out and lse; None for the latter if it has none."""
    rng = generator(spec["data"], "grads")
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    if spec["grad_layout"] == "rows repeated" and out.shape[-2]:
        grad_out = np.broadcast_to(grad_out[..., :1, :], out.shape)
    grad_lse = rng.standard_normal(lse.shape).astype(lse.dtype) if spec["grad_lse"] else None
    return laid_out(grad_out, spec["grad_layout"]), grad_lse


def wanted(spec, options):
    """Return which gradients to ask for beside the usual ones."""
    return {
        "return_dbias": spec["wanted"] and options.get("bias") is not None,
        "return_dsinks": spec["wanted"] and options.get("sinks") is not None,
    }


def check(spec):
    """Raise if a gradient is not what it should be."""
    call = Call(spec)
    got = call.gradients()
    truth = right(got, call.p.operands, call.p.options, call, call.wanted)
    rng = np.random.default_rng(spec["more"])
    for name in spec["checks"]:
        globals()[f"check_{name}"](call, got, truth, rng)


def right(got, operands, options, call, asked, **more):
    """Assert that gradients are what the definition says; call has the arrays they are made of."""
    query, key, value = operands
    truth, plain = formulas(query, key, value, options, **more)
    out_info = finfo(query.dtype)
    in_both = in_pairs(query, key) and value.shape[-1] % 2 == 0
    pairs_eps = float(out_info.eps) if in_both else 0.0
    grads = (call.grad_out, call.grad_lse)
    exact = truth.gradients(*grads, out_info=out_info, pairs_eps=pairs_eps)
    with np.errstate(all="ignore"):
        rough = plain.gradients(*grads, out=call.out, pairs_eps=pairs_eps)
    names = ["dq", "dk", "dv"]
    dtypes = [x.dtype.newbyteorder("=") for x in operands]
    if asked["return_dbias"]:
        shape = np.shape(options["bias"])
        exact.append((*truth.of_bias(shape), None))
        rough.append(plain.of_bias(shape))
        names.append("dbias")
        dtypes.append(options["bias"].dtype.newbyteorder("="))
    if asked["return_dsinks"]:
        exact.append((*truth.of_sinks(), None))
        rough.append(plain.of_sinks())
        names.append("dsinks")
        dtypes.append(options["sinks"].dtype)
    assert len(got) == len(names), f"{len(got)} gradients, not {len(names)}"
    for name, dtype, grad, (wanted_, bound, size), (near_to, *_) in zip(
        names, dtypes, got, exact, rough, strict=True
    ):
        assert isinstance(grad, np.ndarray), f"{name} is a {type(grad).__name__}"
        assert grad.dtype == dtype, f"{name} has dtype {grad.dtype}, not {dtype}"
        near(name, grad, wanted_, bound, near_to, truth.eps, size)
    return truth


def check_threads(call, got, truth, rng):
    """Another number of threads changes no bit."""
    fastattn.set_num_threads(call.p.spec["threads"] % 5 + 1)
    same("with other threads", call.gradients(), got)


def check_layout(call, got, truth, rng):
    """Strides change no bit."""
    grad_out = np.array(call.grad_out, call.grad_out.dtype.newbyteorder("="), order="C")
    room = laid_out(call.out, choice(rng, ("inside", "heads inside", "columns outside")))
    again = call.gradients(
        call.p.plain,
        call.p.plain_options(),
        grad_out=grad_out,
        out=room,
        lse=laid_out(call.lse, "inside"),
    )
    same("laid out otherwise", again, got)


def check_element(call, got, truth, rng):
    """Compute an element of the batch that shares nothing alone: that changes no bit."""
    p = call.p
    shared = any(x.shape[:-3] != p.batch for x in p.operands)
    if not p.batch or 0 in p.batch or shared or p.options.get("dropout_p"):
        return
    index = tuple(int(rng.integers(n)) for n in p.batch)
    operands, options = p.element(index)
    changes = {"grad_out": call.grad_out[index], "out": call.out[index], "lse": call.lse[index]}
    if call.grad_lse is not None:
        changes["grad_lse"] = call.grad_lse[index]
    alone = call.gradients(operands, options, **changes)
    same(f"element {index} alone", tuple(alone[:3]), tuple(x[index] for x in got[:3]))


def check_accumulate(call, got, truth, rng):
    """Write gradients where `grads` says, as float32 too, and add to what they hold."""
    dtype = arithmetic(call.p.dtype)
    fresh = tuple(np.full(x.shape, np.nan, dtype) for x in call.p.operands)
    call.gradients(grads=fresh)
    dtypes = [x.dtype.newbyteorder("=") for x in call.p.operands]
    shared = any(x.shape[:-3] != call.p.batch for x in call.p.operands)
    if not shared:  # else what was rounded is summed
        rounded = tuple(x.astype(y) for x, y in zip(fresh, dtypes, strict=True))
        same("gradients rounded later", rounded, tuple(got[:3]))
    more = tuple(np.full(x.shape, 3, dtype) for x in fresh)
    fastattn.set_num_threads(call.p.spec["threads"] % 5 + 1)
    call.gradients(grads=more, accumulate=True)
    same("gradients added", more, tuple(x + dtype.type(3) for x in fresh))


def check_hidden(call, got, truth, rng):
    """NaN and Inf where no row looks, or in rows that see nothing, change no bit."""
    keys, queries = hidden_from_all(call.p, truth)
    query, key, value = (x.copy() for x in call.p.plain)
    grad_out = np.array(call.grad_out, call.grad_out.dtype.newbyteorder("="), order="C")
    query[queries] = choice(rng, (np.nan, np.inf))
    key[keys] = choice(rng, (np.nan, np.inf))
    if key.shape[:-1] == value.shape[:-1]:
        value[keys] = choice(rng, (np.nan, np.inf))
    sees = truth.sees[..., 0]
    grad_out[~(sees[0] if truth.flat else sees)] = choice(rng, (np.nan, np.inf))
    same("with hidden poison", call.gradients([query, key, value], grad_out=grad_out), got)


def check_reference(call, got, truth, rng):
    """Compare with the package's own definition."""
    if truth.seen.size > 30_000:
        return
    p = call.p
    exact = [x.astype(np.float64) for x in p.plain]
    options = dict(p.options)
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = options[name].astype(np.float64)
    grad_out = np.array(call.grad_out).astype(np.float64)
    own = fastattn.reference.attention_backward(
        grad_out, *exact, None, None, grad_lse=call.grad_lse, **call.wanted, **options
    )
    # It takes the share of a sink from 1, which costs digits of what is left: bounds without sinks.
    loose = type(truth)(*p.operands, options | {"sinks": None}, np.float64)
    bounds = [x[1] for x in loose.gradients(grad_out, call.grad_lse)]
    wanted_ = [x[:2] for x in truth.gradients(grad_out, call.grad_lse)]
    if call.wanted["return_dbias"]:
        wanted_.append(truth.of_bias(np.shape(options["bias"])))
        bounds.append(loose.of_bias(np.shape(options["bias"]))[1])
    if call.wanted["return_dsinks"]:
        wanted_.append(truth.of_sinks())
        bounds.append(loose.of_bias((truth.pairs[-3], 1, 1))[1][:, 0, 0])
    eps = np.finfo(np.float64).eps
    for i, (g, (w, bound), more) in enumerate(zip(own, wanted_, bounds, strict=True)):
        near(f"gradient {i} of the reference", g, w, bound + more, w, eps)
