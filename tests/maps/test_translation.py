# SPDX-License-Identifier: Apache-2.0
"""A map of a translation: which words of the text each word of its translation is made of."""

import contextlib
import io

import numpy as np
import pytest
from numpy.testing import assert_allclose

from fastattn import maps, models
from tests.support.translators import PAD, logits, of_transformers, write

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

TEXT = "w5 w9 w30 w2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("marian"), generation={"max_length": 9}, end=-90)


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder)


def test_a_map_has_the_weights_of_transformers(folder, model):
    ((best,),) = model.translate([TEXT], n_best=1)
    found = maps.show(model, TEXT, layers=[2, 0], heads=[1, 3, 5])
    assert found.queries == tuple(best.text.split())
    assert found.keys == (*TEXT.split(), "</s>")
    assert (found.special, found.positions, found.is_causal) == ((4,), None, False)
    source = model.tokenize(TEXT)
    expected = logits(of_transformers(folder), source, [PAD, *best.ids[:-1]]).cross_attentions
    expected = [expected[layer][0, [1, 3, 5]].numpy() for layer in (2, 0)]
    assert_allclose(found.weights, expected, atol=1e-5)
    assert_allclose(found.sink, np.array(expected)[..., 4].mean(axis=-1), atol=1e-5)


def test_its_code_takes_a_head_away(model):
    text = "w1 w2 w3 w4"
    link = maps.show(model, text).links(count=1)[0]
    code = maps.show(model, text).code.format(layer=link.layer, head=link.head)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {"model": model, "text": text})
    assert said.getvalue() != f"{model.translate([text])}\n"


def test_what_has_no_map_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"^generate must be 0 with a Translator, got 3$"):
        maps.show(model, TEXT, generate=3)
    with pytest.raises(ValueError, match=r"^key_tokens must not be given with a model, which"):
        maps.show(model, TEXT, key_tokens=["a"])
    with pytest.raises(ValueError, match=r"^layers must be within 0\.\.2, those of the model"):
        maps.show(model, TEXT, layers=3)
    with pytest.raises(ValueError, match=r"^texts\[0\] must be at least 1 token, got ' '"):
        maps.show(model, " ")
    silent = models.load(write(tmp_path, end=1000))
    with pytest.raises(ValueError, match=r"^text must have a translation for a map, and"):
        maps.show(silent, TEXT)
