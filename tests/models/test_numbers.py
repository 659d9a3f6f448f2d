# SPDX-License-Identifier: Apache-2.0
"""A translator that has learned to say numbers is right, and looks where it must.

The example trains it, here with fewer numbers, and translates those that it has not seen.
"""

import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest

from fastattn import maps, models
from tests.support.translators import generate, of_transformers

EXAMPLE = Path(__file__).parents[2] / "examples" / "translate_numbers.py"
for package in ("tokenizers", "sentencepiece", "num2words", "matplotlib"):
    pytest.importorskip(package)
for package in ("torch", "transformers"):
    pytest.importorskip(package, exc_type=ImportError)
pytestmark = [
    pytest.mark.skipif(not EXAMPLE.exists(), reason="no examples beside the tests"),
    pytest.mark.timeout(1200),  # under a minute, where the CPU is free
]

TEXT = "двести тридцать один"
LOOKS = {"two": "двести", "thirty": "тридцать", "one": "один"}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("translate_numbers", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LARGEST, module.TRAINED, module.NEW = 999, 700, 200
    module.BATCH, module.WARM, module.SHOWN = 50, 60, TEXT
    return module


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    """Return the folder that the example writes, and what it prints."""
    folder, lines = tmp_path_factory.mktemp("numbers") / "ru-en", []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers recommends to normalise punctuation
        patch.setattr(example, "show", lines.append)
        patch.setattr(sys, "argv", [str(EXAMPLE), "--folder", str(folder), "--epochs", "20"])
        assert example.main() == 0
    return folder, "\n".join(lines)


@pytest.fixture(scope="module")
def model(trained):
    return models.load(trained[0])


def test_numbers_that_were_not_learned_are_exact(trained, example, model):
    folder, printed = trained
    greedy, beams = (float(x) for x in re.findall(r"beams: (\d+\.\d)% of 200 are exact", printed))
    assert beams >= greedy > 95
    texts, expected = zip(*example.pairs()[1], strict=True)
    found = model.translate(texts)
    assert sum(map(str.__eq__, found, expected)) >= 190
    assert not {x for x, _ in example.pairs()[0]} & set(texts)
    assert folder.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {x.name for x in folder.parent.iterdir()} == {"ru-en", "ru-en.png"}


@pytest.mark.parametrize("beams", [1, 4])
def test_texts_are_those_of_transformers(beams, trained, example, model):
    import transformers

    folder, _ = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    texts = [x for x, _ in example.pairs()[1]][:60]
    sources = [model.tokenize(x) for x in texts]
    assert sources == tokenizer(texts).input_ids
    found = model.translate(texts, beams=beams, n_best=beams)
    expected = generate(of_transformers(folder), sources, beams)
    for ours, theirs in zip(found, expected, strict=True):
        ids = [x for x, _ in theirs]
        assert [x.ids for x in ours] == ids
        assert [x.text for x in ours] == tokenizer.batch_decode(ids, skip_special_tokens=True)
        if beams > 1:
            assert [x.score for x in ours] == pytest.approx([x for _, x in theirs], abs=1e-4)


def test_each_word_is_made_of_the_one_that_it_means(model):
    last = model.config.decoder_layers - 1
    found = maps.show(model, TEXT, layers=last)
    assert "".join(found.queries) == model.translate([TEXT])[0].replace(" ", "")
    assert found.keys == (*TEXT.split(), "</s>")
    assert found.positions is None
    best = found.weights[0].max(axis=0)  # of its heads
    for word, meant in LOOKS.items():
        assert found.keys[best[found.queries.index(word)].argmax()] == meant


def test_a_training_that_is_interrupted_leaves_no_folder(example, tmp_path, monkeypatch):
    def interrupted(folder, epochs):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    folder = tmp_path / "ru-en"
    monkeypatch.setattr(example, "train", interrupted)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--folder", str(folder)])
    with pytest.raises(KeyboardInterrupt):
        example.main()
    assert not folder.exists()
