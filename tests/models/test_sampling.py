# SPDX-License-Identifier: Apache-2.0
"""The next token is drawn from those that the filters leave, as often as it is probable."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.models._sampling import Sampling

DRAWS = 10_000
LOGITS = np.float32([1.5, -np.inf, 3.0, 0.0, 3.0, 2.0, -4.0, 1.0])
OPTIONS = [
    dict(temperature=1.0),
    dict(temperature=0.3),
    dict(temperature=7.0),
    dict(temperature=1.0, top_k=3),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=1.0, min_p=0.2),
    dict(temperature=1.3, top_k=5, top_p=0.9, min_p=0.15),
]


def probabilities(logits, temperature, top_k=None, top_p=None, min_p=None):
    """Return the probability of each id: the definition, by sorting all of them."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-logits, kind="stable")[:top_k]
    if top_p is not None:
        shares = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: np.searchsorted(shares, top_p) + 1]
    if min_p is not None:
        order = order[weights[order] >= min_p]
    out = np.zeros(len(logits))
    out[order] = weights[order] / weights[order].sum()
    return out


def draws(logits, count=DRAWS, seed=0, **options):
    sampling, generator = Sampling(**options), np.random.default_rng(seed)
    return np.array([sampling.choose(logits, generator) for _ in range(count)])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies_are_the_probabilities(options):
    expected = probabilities(LOGITS, **options) * DRAWS
    found = np.bincount(draws(LOGITS, **options), minlength=len(LOGITS))
    possible = expected > 0
    assert not found[~possible].any()
    # The mean is the number of possible ids less one; this is far behind it.
    chi_square = np.sum((found - expected)[possible] ** 2 / expected[possible])
    assert chi_square < possible.sum() + 6 * possible.sum() ** 0.5


def test_frequencies_in_a_large_vocabulary():
    logits = np.random.default_rng(1).normal(size=3001).astype(np.float32)
    for options in (dict(temperature=0.7), dict(temperature=0.7, top_p=0.95, min_p=0.01)):
        expected = probabilities(logits, **options)
        found = np.bincount(draws(logits, **options), minlength=len(logits))
        groups = np.argsort(-expected) % 30
        for group in range(30):
            share = expected[groups == group].sum()
            spread = (DRAWS * share * (1 - share)) ** 0.5
            assert abs(found[groups == group].sum() - DRAWS * share) < 5 * spread


class Ends:
    """A generator whose numbers are the least, or the largest, that there are."""

    def __init__(self, number):
        self.random = lambda: number


def possible(logits, **options):
    """Return the ids that may be drawn."""
    sampling = Sampling(**options)
    ids, weights = sampling._left(logits, logits.max())
    ids = np.arange(len(logits)) if ids is None else ids
    return ids[weights > 0].tolist()


@given(
    logits=st.lists(st.sampled_from([-np.inf, *np.arange(-6, 6, 0.5)]), min_size=1, max_size=40),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 50),
    min_p=st.none() | st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    top_p=st.none() | st.sampled_from([0.013, 0.31, 0.77, 0.9917, 1.0]),
)
def test_filters_leave_exactly_these(logits, **options):
    logits = np.float32(logits)
    if np.isneginf(logits.max()):
        logits[0] = 0
    # Half numbers between the logits have exact weights, so no rounding decides about min_p.
    expected = np.flatnonzero(probabilities(logits, **options)).tolist()
    assert possible(logits, **options) == expected
    sampling = Sampling(**options)
    assert sampling.choose(logits, Ends(0.0)) == expected[0]
    assert sampling.choose(logits, Ends(1 - 2**-53)) == expected[-1]


@pytest.mark.parametrize("size", [127, 1024, 5000])
def test_top_p_of_many(size):
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32)
    for top_p in (0.001, 0.5, 0.9, 0.999):
        expected = np.flatnonzero(probabilities(logits, 1.0, top_p=top_p)).tolist()
        assert possible(logits, temperature=1.0, top_p=top_p) == expected
    flat = np.zeros(size, np.float32)
    assert possible(flat, temperature=1.0, top_p=0.5) == list(range(-(-size // 2)))


def test_filters_of_transformers(torch):
    processors = pytest.importorskip("transformers.generation.logits_process", exc_type=ImportError)
    logits = np.random.default_rng(3).normal(size=2000).astype(np.float32) * 3
    options = dict(temperature=0.8, top_k=300, top_p=0.93, min_p=0.004)
    scores = torch.tensor(logits)[None]
    for name, kind in [
        ("temperature", processors.TemperatureLogitsWarper),
        ("top_k", processors.TopKLogitsWarper),
        ("top_p", processors.TopPLogitsWarper),
        ("min_p", processors.MinPLogitsWarper),
    ]:
        scores = kind(options[name])(None, scores)
    expected = torch.isfinite(scores[0]).nonzero()[:, 0].tolist()
    assert 10 < len(expected) < 300
    assert possible(logits, **options) == expected


def test_greedy():
    logits = np.float32([1, 3, 2, 3])
    assert {Sampling().choose(logits, None)} == {1}
    assert {Sampling(top_k=2, top_p=0.1, min_p=1.0).choose(logits, None)} == {1}
    assert set(draws(logits, 50, temperature=1.0, top_k=1)) == {1}


def test_seeds():
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    first, again, other = (draws(logits, 50, seed, temperature=2.0) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()
    a, b, c = Sampling(seed=[5, 6, 5]).generators(3)
    assert a.random() == c.random() != b.random()
    a, b = Sampling().generators(2)
    assert a.random() != b.random()


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6, 1e300])
def test_temperatures_at_the_ends(temperature):
    found = set(draws(LOGITS, 400, temperature=temperature))
    assert found == ({2, 4} if temperature < 1 else {0, 2, 3, 4, 5, 6, 7})


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(wrong, temperature):
    logits = np.zeros(9, np.float32)
    logits[4] = wrong
    with pytest.raises(ValueError, match=f"largest logit must be finite, got {wrong}$"):
        Sampling(temperature=temperature).choose(logits, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"must be finite, got -inf$"):
        Sampling(temperature=temperature).choose(np.full(3, -np.inf, np.float32), None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(temperature=-0.1), ValueError, "temperature must be >= 0, got -0.1"),
        (dict(temperature=np.nan), ValueError, "temperature must be finite, got temperature=nan"),
        (dict(temperature="1"), TypeError, "temperature must be a number, not str"),
        (dict(top_k=0), ValueError, "top_k must be >= 1, got 0"),
        (dict(top_k=2.0), TypeError, "top_k must be an int, not float"),
        (dict(top_p=0), ValueError, "top_p must be above 0 and at most 1, got 0"),
        (dict(top_p=1.01), ValueError, "top_p must be above 0 and at most 1, got 1.01"),
        (dict(min_p=-1), ValueError, "min_p must be from 0 to 1, got -1"),
        (dict(min_p=2), ValueError, "min_p must be from 0 to 1, got 2"),
        (dict(min_p=True), TypeError, "min_p must be a number, not bool"),
        (dict(max_new_tokens=-1), ValueError, "max_new_tokens must be >= 0, got -1"),
        (dict(max_new_tokens=1.0), TypeError, "max_new_tokens must be an int, not float"),
        (dict(stop=[""]), ValueError, "stop must be strings of at least one character, got ''"),
        (dict(stop=[1]), TypeError, "stop must be a str, got int"),
        (dict(stop=1), TypeError, "stop must be a str or a sequence of them, not int"),
        (dict(stop_ids=["a"]), TypeError, "each of stop_ids must be an int, not str"),
        (dict(stop_ids=2), TypeError, "stop_ids must be a collection of int, not int"),
    ],
)  # fmt: skip
def test_wrong_options(options, error, message):
    with pytest.raises(error) as refused:
        Sampling(**options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed must be >= 0, got -1"),
        (1.5, TypeError, "seed must be an int, not float"),
        ("12", TypeError, "seed must be an int, not str"),
        ([1], ValueError, "seed must be one int, or one for each of 2 prompts, got 1 of them"),
        ([1, -2], ValueError, "seed must be >= 0, got -2"),
        ([1, None], TypeError, "seed must be an int, not NoneType"),
    ],
)
def test_wrong_seeds(seed, error, message):
    with pytest.raises(error) as refused:
        Sampling(seed=seed).generators(2)
    assert str(refused.value) == message


def test_choosing_is_fast():
    """Measured alone, 2 us of 49152 logits to 0.5 ms of 151936 with every filter."""
    logits = np.random.default_rng(0).normal(size=151_936).astype(np.float32) * 3
    for options in (dict(), dict(temperature=1.0, top_k=50, top_p=0.9, min_p=0.05)):
        sampling, generator, times = Sampling(**options), np.random.default_rng(0), []
        for _ in range(20):
            begin = time.perf_counter()
            sampling.choose(logits, generator)
            times.append(time.perf_counter() - begin)
        assert min(times) < 0.01
