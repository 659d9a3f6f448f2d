# SPDX-License-Identifier: Apache-2.0
"""`fastattn.attention_statistics`: what the probabilities say, and what changes no bit of it."""

import numpy as np

import fastattn
from fastattn import reference
from tests.fuzz import problem
from tests.fuzz.compare import ROUNDINGS, arithmetic, finfo, same
from tests.fuzz.definition import Formula
from tests.fuzz.problem import LAYOUTS, Problem, chance, choice, generator, laid_out

NAMES = reference.AttentionStatistics._fields
STARTS = ("one", "each", "some", "few")


def draw(rng):
    """Draw a problem, and what is asked of it."""
    spec = problem.draw(rng, dropout=False)
    spec["operands"][1] = {"layout": spec["operands"][1]["layout"], "ones": []}
    asked = {name: True for name in ("entropy", "column_sums", "maximum") if chance(rng, 0.5)}
    if chance(rng, 0.5):
        asked["top"] = choice(rng, (1, 2, 5, 8, 31, 300))
    if chance(rng, 0.5) or not asked:
        asked["blocks"] = [choice(rng, STARTS) for _ in range(2)]
    if "column_sums" in asked and chance(rng, 0.6):
        asked["row_weights"] = {"layout": choice(rng, LAYOUTS), "lacks": int(rng.integers(4))}
    spec["asked"] = asked
    return spec


def check(spec):
    """Raise if a statistic is not what it should be."""
    p = Problem(spec)
    query, key = p.operands[:2]
    asked = arguments(p)
    fastattn.set_num_threads(spec["threads"])
    found = fastattn.attention_statistics(query, key, **asked, **p.options)
    assert_right(found, query, key, asked, p.options)
    fastattn.set_num_threads(spec["threads"] % 5 + 1)
    plain = fastattn.attention_statistics(*p.plain[:2], **asked, **p.plain_options())
    assert_same("with other threads, laid out plainly", plain, found)
    seen = Formula(query, key, key[..., :1], p.options, np.float64).seen
    hidden = ~seen.any(axis=(*range(seen.ndim - 3), -3, -2))
    poisoned = p.plain[1].copy()
    poisoned[..., hidden, :] = np.nan
    again = fastattn.attention_statistics(query, poisoned, **asked, **p.options)
    assert_same("with hidden poison", again, found)


def arguments(p):
    """Return what is asked, as it is passed."""
    asked = dict(p.spec["asked"])
    rng = generator(p.spec["data"], "asked")
    if "blocks" in asked:
        asked["blocks"] = [
            starts_of(kind, length, rng)
            for kind, length in zip(asked["blocks"], p.pairs[-2:], strict=True)
        ]
    if "row_weights" in asked:
        given = asked["row_weights"]
        flat = max(x.ndim for x in p.operands[:2]) == 2
        shape = p.pairs[-2:-1] if flat else p.pairs[:-1]
        weights = rng.normal(size=shape[min(given["lacks"], len(shape)) :])
        asked["row_weights"] = laid_out(weights, given["layout"])
    return asked


def starts_of(kind, length, rng):
    """Return where blocks start."""
    share = {"one": 0, "each": 1, "some": 0.4, "few": 0.03}[kind]
    return np.flatnonzero((rng.random(max(length, 1)) < share) | (np.arange(max(length, 1)) == 0))


def assert_same(name, found, expected):
    """Assert that all that was asked has the same bits."""
    for each, x, y in zip(NAMES, found, expected, strict=True):
        assert (x is None) == (y is None), each
        if x is not None:
            same(f"{each} {name}", x, y)


def assert_right(found, query, key, asked, options):
    """Assert that statistics are what the definition says, but for rounding.

    Each may be wrong by what its formula makes of the errors of its probabilities, which are those
    of a plain program.
    """
    exact = [np.asarray(x).astype(np.float64) for x in (query, key)]
    truth = reference.attention_statistics(*exact, **asked, **options)
    formula = Formula(query, key, key[..., :1], options, np.float64)
    probs, errors = formula.probs, np.where(formula.seen, formula.probs * formula.error, 0)
    with np.errstate(divide="ignore"):
        surprise = np.where(probs > 0, abs(np.log(probs)) + 1, 0)
    probs, errors, surprise = (x[0] if formula.flat else x for x in (probs, errors, surprise))
    limits = finfo(arithmetic(query.dtype.newbyteorder("=")))

    def near(name, got, expected, error, size):
        allowed = ROUNDINGS * float(limits.eps) * (error + size) + float(limits.tiny)
        wrong = np.argwhere(~(abs(got - expected) <= allowed))
        for at in map(tuple, wrong[:1]):
            raise AssertionError(
                f"{name}{[int(i) for i in at]} is {got[at]:.9g}, by definition {expected[at]:.9g}"
            )

    for name, got, expected in zip(NAMES, found, truth, strict=True):
        assert (got is None) == (expected is None), f"{name} is {got}"
        if got is not None:
            assert got.shape == expected.shape, f"{name} has shape {got.shape}"
            dtype = np.int64 if name == "top_keys" else limits.dtype
            assert got.dtype == dtype, f"{name} has dtype {got.dtype}"
    if found.entropy is not None:
        assert (found.entropy >= 0).all(), "entropy is negative"
        error = (errors * surprise).sum(axis=-1)
        near("entropy", found.entropy, truth.entropy, error, truth.entropy + 1)
    if found.maximum is not None:
        error = errors.max(axis=-1, initial=0)
        near("maximum", found.maximum, truth.maximum, error, truth.maximum)
    if found.column_sums is not None:
        weights = asked.get("row_weights")
        weights = 1 if weights is None else abs(np.asarray(weights).astype(np.float64))
        counts = np.broadcast_to(weights, errors.shape[:-1])[..., None]
        error, size = ((counts * x).sum(axis=-2) for x in (errors, probs))
        near("column_sums", found.column_sums, truth.column_sums, error, size)
    if found.blocks is not None:
        error = errors
        for axis, starts in zip((-2, -1), asked["blocks"], strict=True):
            parts = np.split(error, np.asarray(starts, np.int64)[1:], axis=axis)
            error = np.stack([x.sum(axis=axis) for x in parts], axis=axis)
        near("blocks", found.blocks, truth.blocks, error, truth.blocks)
    if found.top_keys is not None and errors.shape[-1]:
        keys, weights = found.top_keys, found.top_weights
        gone = keys < 0
        assert (gone == (truth.top_keys < 0)).all(), "top_keys has too few keys, or too many"
        # Keys whose scores are nearly equal may change places; none comes twice.
        ordered = np.sort(keys, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        assert not twice.any(), "a key is among the strongest twice"
        assert (weights[..., :-1] >= weights[..., 1:]).all(), "top_weights do not descend"
        own, error = (
            np.where(gone, 0, np.take_along_axis(x, np.maximum(keys, 0), axis=-1))
            for x in (probs, errors)
        )
        near("top_weights of their keys", weights, own, error, own)
        other = np.take_along_axis(errors, np.maximum(truth.top_keys, 0), axis=-1)
        other = np.where(gone, 0, other)
        near("top_weights", weights, truth.top_weights, error + other, own)
