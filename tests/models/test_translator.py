# SPDX-License-Identifier: Apache-2.0
"""A translator writes what transformers writes, each text as it does alone; heads are seen."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models
from fastattn.models import Translation, Translator
from tests.support.translators import (
    END,
    PAD,
    WORDS,
    generate,
    logits,
    of_transformers,
    texts,
    write,
)

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

TEXTS = texts(12)
SEARCHES = [
    dict(beams=1),
    dict(beams=1, length_penalty=2.0, early_stopping="never"),
    dict(beams=4),
    dict(beams=4, early_stopping=True),
    dict(beams=3, length_penalty=2.0, early_stopping="never"),
    dict(beams=5, length_penalty=-1.0),
    dict(beams=2, length_penalty=0.0, early_stopping="never"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("marian"), end=12, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return of_transformers(folder)


def rewritten(folder, place, **changes):
    """Return a copy of a folder whose generation_config.json says these, too; None: says not."""
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    path = place / "generation_config.json"
    stated = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: x for name, x in stated.items() if x is not None}))
    return place


def check(found, expected):
    """Check texts against the ids and scores of transformers."""
    for ours, theirs in zip(found, expected, strict=True):
        for x, (ids, score) in zip(ours, theirs, strict=True):
            assert x.ids == ids
            if len(theirs) > 1:
                assert x.score == pytest.approx(score, rel=1e-5, abs=1e-5)


# What is written.


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_the_best_texts_are_those_of_transformers(search, folder, theirs, tmp_path):
    stops = {"early_stopping": search.get("early_stopping", False)}
    model = models.load(rewritten(folder, tmp_path, **stops))
    options = {name: x for name, x in search.items() if name not in ("beams", "early_stopping")}
    beams = search["beams"]
    found = model.translate(TEXTS, beams=beams, n_best=beams, **options)
    sources = [model.tokenize(x) for x in TEXTS]
    check(found, generate(theirs, sources, beams, **options, **stops))
    lengths = [len(x.ids) for each in found for x in each]
    if options.get("length_penalty", 1) <= 1:  # Then some end by themselves, when others do not.
        assert min(lengths) < 10
        assert len(set(lengths)) > 3
    if beams > 1:
        for each in found:
            scores = [x.score for x in each]
            assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    "stated",
    [
        dict(max_length=8, num_beams=3),  # where no text ends before, and the end is forced
        dict(max_length=8, num_beams=3, forced_eos_token_id=None),
        dict(max_new_tokens=5, num_beams=3),  # which beats max_length
        dict(forced_bos_token_id=5, renormalize_logits=True, num_beams=2, length_penalty=0.5),
        dict(suppress_tokens=[3, 4, 5, 6], bad_words_ids=[[PAD], [7]], num_beams=2),
    ],
    ids=str,
)
def test_the_checkpoint_says_how(stated, tmp_path):
    said = {name: x for name, x in stated.items() if x is not None}
    folder = write(tmp_path, generation=said, end=12, tie_word_embeddings=False)
    if None in stated.values():
        folder = rewritten(folder, tmp_path, **stated)
    model, beams = models.load(folder), stated["num_beams"]
    found = model.translate(TEXTS, n_best=beams)
    theirs = of_transformers(folder)
    check(found, generate(theirs, [model.tokenize(x) for x in TEXTS], beams))
    assert [x[0].text for x in found] == model.translate(TEXTS)


def test_each_text_is_translated_as_it_is_alone(model):
    together = model.translate(texts(100), beams=3, n_best=3)
    for text, found in zip(texts(100), together, strict=True):
        assert model.translate([text], beams=3, n_best=3) == [found]  # to the bit of the scores


def test_more_beams_than_tokens_find_all_there_are(model):
    found = model.translate(TEXTS[:2], beams=100, n_best=100, max_new_tokens=1)
    for each in found:
        assert len(each) == 1  # The end is forced at the last token.
        assert each[0].ids == []
    found = model.translate(TEXTS[:2], beams=100, n_best=100, max_new_tokens=2)
    for each in found:
        assert sorted(x.ids for x in each) == [[], *([i] for i in range(2, WORDS))]


def test_a_text_is_made_of_its_tokens(model):
    (best,) = model.translate(TEXTS[:1], n_best=1)[0]
    assert isinstance(best, Translation)
    assert best.text == model.detokenize(best.ids) == " ".join(f"w{i}" for i in best.ids)
    assert model.detokenize([5, END, PAD, 6]) == "w5 w6"
    assert model.translate(iter(TEXTS[:1])) == [best.text]
    assert model.translate([]) == []
    assert model.translate([], n_best=1) == []


def test_a_limit_shortens_texts(model):
    found = model.translate(TEXTS, n_best=1, max_new_tokens=4)
    assert max(len(x.ids) for (x,) in found) == 3  # and the end
    assert max(len(x.ids) for (x,) in model.translate(TEXTS, n_best=1, max_new_tokens=10**9)) <= 63


def test_what_is_said_of_tokens_adds_up_to_the_score(model):
    for text, (best,) in zip(TEXTS, model.translate(TEXTS, n_best=1), strict=True):
        rows = model.logits(model.tokenize(text), best.ids)
        written = [*best.ids, END]
        if len(written) < 39:
            shares = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
            total = shares[np.arange(len(written)), written].sum()
            assert best.score == pytest.approx(total / len(written), abs=1e-5)


# What is seen.


def test_heads_look_where_those_of_transformers_look(model, theirs):
    source, target = model.tokenize(TEXTS[0]), [5, 9, 30, 2]
    expected = logits(theirs, source, [PAD, *target])
    for of, weights in (
        ("cross", expected.cross_attentions),
        ("decoder", expected.decoder_attentions),
        ("encoder", expected.encoder_attentions),
    ):
        with model.capture(of=of) as captured:
            found = model.logits(source, target)
        assert captured.ids == (source if of == "encoder" else [PAD, *target])
        assert_allclose(captured.weights, [x[0].numpy() for x in weights], atol=1e-5)
        assert_array_equal(found, model.logits(source, target))


def test_heads_are_seen_while_a_text_is_written(model):
    source = model.tokenize(TEXTS[0])
    with model.capture(layers=[2], heads=[5, 1], what=("weights", "top", "entropy")) as captured:
        (best,) = model.translate(TEXTS[:1], beams=1, n_best=1)[0]
    with model.capture(layers=[2], heads=[5, 1], what=("weights", "top", "entropy")) as again:
        model.logits(source, best.ids)
    assert captured.ids == [PAD, *best.ids]
    assert captured.weights.shape == (1, 2, len(best.ids) + 1, len(source))
    for name in ("weights", "top_weights", "entropy"):
        assert_allclose(getattr(captured, name), getattr(again, name), atol=1e-5)


def test_rows_of_a_capture_are_tokens_that_are_written(model):
    source, target = model.tokenize(TEXTS[0]), [5, 9, 30, 2]
    with model.capture(what=("weights", "hidden", "key")) as every:
        model.logits(source, target)
    with model.capture(rows=[1, 3], what=("weights", "column_sums", "hidden")) as some:
        model.logits(source, target)
    assert_array_equal(some.rows, [1, 3])
    assert_allclose(some.weights, every.weights[:, :, [1, 3]], atol=1e-6)
    assert_allclose(some.column_sums, some.weights.sum(axis=2), atol=1e-6)
    assert_array_equal(some.hidden, every.hidden[:, [1, 3]])
    assert every.key.shape == (3, 6, len(source), 8)
    assert [x["is_causal"] for x in every.options] == [False] * 3


@pytest.mark.parametrize("of", ["cross", "decoder", "encoder"])
def test_without_its_heads_a_part_adds_nothing_of_what_is_seen(of, model):
    source, target = model.tokenize(TEXTS[0]), [5, 9, 30, 2]
    part = model._model.parts[of].config
    heads = [(x, y) for x in range(part.num_hidden_layers) for y in range(part.num_attention_heads)]
    before = model.logits(source, target)
    with model.ablate(heads, of=of):
        without = model.logits(source, target)
        other = model.logits(model.tokenize(TEXTS[1]), target)
    assert not np.array_equal(before, without)
    assert np.array_equal(without, other) == (of == "cross")  # Then nothing is known of the source.
    assert_array_equal(model.logits(source, target), before)


def test_a_capture_sees_one_text(model):
    with model.capture(), pytest.raises(ValueError, match="must see one text, got 3 at once"):
        model.translate(TEXTS[:1], beams=3)
    with model.capture(), pytest.raises(ValueError, match="must see one text, got 2 at once"):
        model.translate(TEXTS[:2], beams=1)
    for look in (model.capture, lambda of: model.ablate([(0, 0)], of=of)):
        with pytest.raises(ValueError, match="of must be one of encoder, decoder, cross, got 'x'"):
            look(of="x")
    with pytest.raises(ValueError, match=r"heads must be within 0\.\.3"):
        model.capture(of="encoder", heads=[4])
    assert len(model.translate(TEXTS[:2], beams=3)) == 2


# What goes wrong.


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("w2", TypeError, r"texts must be a sequence of str, got a str: give \[text\]"),
        (5, TypeError, "texts must be a sequence of str, got int"),
        (["w2", 5], TypeError, r"texts\[1\] must be a str, got int"),
        (["w2", "\ud800"], ValueError, r"texts\[1\] must be Unicode, got '\\ud800'"),
        (["w2", ""], ValueError, r"texts\[1\] must be at least 1 token, got '', which is none"),
        ([" \n"], ValueError, r"texts\[0\] must be at least 1 token, got ' \\n', which is none"),
        (
            ["w2 " * 64],
            ValueError,
            r"texts\[0\] must be at most 64 tokens, the model's context, got 65",
        ),
    ],
    ids=repr,
)
def test_texts_that_cannot_be_translated_are_refused(given, error, message, model):
    with pytest.raises(error, match=rf"^{message}$"):
        model.translate(given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(beams=0), ValueError, "beams must be from 1 to 1000, got 0"),
        (dict(beams=1001), ValueError, "beams must be from 1 to 1000, got 1001"),
        (dict(beams=2.0), TypeError, "beams must be an int, not float"),
        (dict(beams=2, n_best=3), ValueError, "n_best must be from 1 to beams, 2, got 3"),
        (dict(n_best=0), ValueError, "n_best must be from 1 to beams, 1, got 0"),
        (dict(n_best=True), TypeError, "n_best must be an int, not bool"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be >= 1, got 0"),
        (dict(length_penalty=31), ValueError, "length_penalty must be from -30 to 30, got 31"),
        (
            dict(length_penalty=float("nan")),
            ValueError,
            "length_penalty must be finite, got length_penalty=nan",
        ),
        (dict(length_penalty="1"), TypeError, "length_penalty must be a .*, not str"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, error, message, model):
    with pytest.raises(error, match=rf"^{message}$"):
        model.translate(TEXTS, **options)


@pytest.mark.parametrize(
    ("ids", "written", "message"),
    [
        ([], [5], "ids must be at least 1 token, got 0"),
        ([5] * 65, [5], "ids must be at most 64 tokens, the model's context, got 65"),
        ([60], [5], r"ids must be within 0\.\.59, the vocabulary, got 60"),
        ([5], [-1], r"written must be within 0\.\.59, the vocabulary, got -1"),
        ([5], [[5]], r"written must have one axis, got written.shape=\(1, 1\)"),
        ([5], [5] * 64, "written must be at most 64 tokens, the model's context, got 65"),
    ],
)
def test_tokens_that_are_none_are_refused(ids, written, message, model):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        model.logits(ids, written)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (dict(num_beams=0), "num_beams must be an integer from 1 to .*, got 0"),
        (dict(num_beams=1001), "num_beams must be from 1 to 1000, got 1001"),
        (dict(max_new_tokens=0), "max_new_tokens must be an integer from 1 to .*, got 0"),
        (dict(early_stopping="soon"), "early_stopping must be 'never', got 'soon'"),
        (dict(length_penalty=1e9), "length_penalty must be a number from -30 to 30, got .*"),
        (dict(do_sample=True), "do_sample must be False, got True"),
        (dict(no_repeat_ngram_size=3), "no_repeat_ngram_size must be 0, got 3"),
        (dict(min_length=3), "min_length must be 0, got 3"),
        (dict(min_new_tokens=3), "min_new_tokens must be 0, got 3"),
        (dict(repetition_penalty=1.2), "repetition_penalty must be 1, got 1.2"),
        (dict(encoder_repetition_penalty=2), "encoder_repetition_penalty must be 1, got 2"),
        (dict(encoder_no_repeat_ngram_size=2), "encoder_no_repeat_ngram_size must be 0, got 2"),
        (dict(sequence_bias=[[[5], 9.0]]), r"sequence_bias must be None, got \[.*\]"),
        (
            dict(exponential_decay_length_penalty=[3, 1.5]),
            r"exponential_decay_length_penalty must be None, got \[3, 1.5\]",
        ),
        (dict(bad_words_ids=[[1, 2]]), r"bad_words_ids must be lists of one token, got \[1, 2\]"),
        (dict(bad_words_ids=[1]), "bad_words_ids must be lists of one token, got 1"),
        (dict(suppress_tokens=["x"]), "a token that is not to be written must be an .*, got 'x'"),
        (dict(suppress_tokens=[60]), "tokens must be below 60, the vocabulary, got 60"),
        (dict(decoder_start_token_id=60), "tokens must be below 60, the vocabulary, got 60"),
        (dict(eos_token_id=[0, 77]), "tokens must be below 60, the vocabulary, got 77"),
    ],
    ids=str,
)
def test_a_search_that_is_not_done_is_refused(stated, message, folder, tmp_path):
    place = rewritten(folder, tmp_path, **stated)
    with pytest.raises(ValueError, match=rf"^{place}/generation_config.json: {message}$"):
        models.load(place)


def test_config_says_how_only_where_no_other_file_does(folder, tmp_path):
    place = rewritten(folder, tmp_path, decoder_start_token_id=None)
    path = place / "config.json"
    changes = {"num_beams": 3, "suppress_tokens": [5], "max_new_tokens": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert models.load(place).translate(TEXTS) == models.load(folder).translate(TEXTS)
    (place / "generation_config.json").unlink()
    found = models.load(place).translate(TEXTS, n_best=3)
    assert max(len(x.ids) for each in found for x in each) == 3  # and the end
    path.write_text(path.read_text().replace('"num_beams": 3', '"num_beams": 2000'))
    with pytest.raises(ValueError, match=rf"^{path}: num_beams must be from 1 to 1000, got 2000$"):
        models.load(place)


def test_a_translation_must_have_an_end(folder, tmp_path):
    place = rewritten(folder, tmp_path, eos_token_id=None)
    config = json.loads((place / "config.json").read_text()) | {"eos_token_id": None}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"eos_token_id must be there, and is not$"):
        models.load(place)


def test_weights_that_are_not_finite_are_an_error(folder, tmp_path):
    model = models.load(folder)
    weights = dict(model._model.weights)
    weights["lm_head.bias"] = np.full(WORDS, np.nan, np.float32)
    model._model.weights = weights
    with pytest.raises(ValueError, match="the model's largest logit must be finite, got nan"):
        model.translate(TEXTS[:1])


def test_a_translator_is_what_load_returns(folder, model):
    assert isinstance(model, Translator)
    assert (model.stop_ids, model.max_position_embeddings) == (frozenset([END]), 64)
    assert model.config.decoder_layers == 3
