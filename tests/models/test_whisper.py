# SPDX-License-Identifier: Apache-2.0
"""Whisper hears and writes what transformers does, and what it is not is refused."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from fastattn import models
from fastattn.models import _speech_tokens
from fastattn.models._log_mel import log_mel
from fastattn.models.whisper import Config
from tests.support.speech import END, ID, LANGUAGES, RATE, SIZES, TIMES, write

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

SOUND = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) / 8  # a window


def of_transformers(folder):
    """Return the model of transformers, which computes in float32."""
    return transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    ).eval()


def test_the_spectrogram_is_that_of_transformers():
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    found = extractor(SOUND, sampling_rate=RATE, padding="do_not_pad")["input_features"][0]
    # At the end it has the reflection of the sound, and here is silence.
    assert_allclose(log_mel(SOUND, 80)[:-1], found.T[:-1], rtol=0, atol=1e-5)
    assert log_mel(SOUND[:159], 80).shape == (0, 80)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_states_and_logits_are_those_of_transformers(dtype, tmp_path):
    folder = write(tmp_path, dtype)
    model, theirs = models.load(folder)._model, of_transformers(folder)
    assert model.weights["model.decoder.layers.2.fc1.weight"].dtype.name == dtype
    sound = log_mel(SOUND, SIZES["num_mel_bins"])
    ids = np.random.default_rng(0).integers(0, TIMES, 30)
    with torch.inference_mode():
        heard = theirs.model.encoder(torch.tensor(sound.T.copy())[None])
        said = theirs(encoder_outputs=heard, decoder_input_ids=torch.tensor(ids)[None])
    expected, logits = heard[0][0].numpy(), said.logits[0].numpy()
    states = model.encode(sound)
    assert_allclose(states, expected, rtol=0, atol=1e-5 * abs(expected).max())
    context = model.context(states, np.array([0, len(states)]))
    for size in (30, 7):  # at once, and in parts
        found, context = [], context.anew()
        for part in np.split(ids, range(size, 30, size)):
            context.feed([len(part)])
            found.append(model.head(model(part, context)))
        assert_allclose(np.concatenate(found), logits, rtol=0, atol=1e-5 * abs(logits).max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("languages", [[], LANGUAGES], ids=["English", "any"])
def test_sentences_and_times_are_those_of_transformers(seed, languages, tmp_path, monkeypatch):
    if languages:
        monkeypatch.setattr(_speech_tokens, "MULTILINGUAL", SIZES["vocab_size"])
    model = models.load(write(tmp_path, seed=seed, languages=languages))
    theirs = of_transformers(tmp_path)
    sound = torch.tensor(log_mel(SOUND, SIZES["num_mel_bins"]).T.copy())[None]
    with torch.inference_mode():
        found = model.transcribe(SOUND)
        expected = theirs.generate(
            sound,
            **({"task": "transcribe"} if languages else {}),
            return_timestamps=True,
            return_segments=True,
            max_new_tokens=SIZES["max_target_positions"] - len(model._tokens.prompts["en"]),
        )["segments"][0]
        if languages:
            assert model.languages == tuple(sorted(languages))
            assert [ID[found.language]] == theirs.detect_language(sound).tolist()
    expected = [x for x in expected if min(x["tokens"]) < END]  # others have no words
    for ours, said in zip(found.segments, expected, strict=True):
        assert ours.ids == [x for x in said["tokens"].tolist() if x < END]
        if said["tokens"][-1] >= TIMES:
            # Of a window's only sentence it says when the window begins, not when it does.
            written = 0.02 * (int(said["tokens"][0]) - TIMES)
            begin, end = float(said["start"]), min(float(said["end"]), 1)
            assert min(abs(min(begin + x, 1) - ours.start) for x in (0, written)) < 1e-5
            assert abs(ours.end - end) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "tanh"}, "activation_function must be .*, got 'tanh'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"scale_embedding": True}, "scale_embedding must be False, got True"),
        ({"d_model": 25}, "d_model must be a multiple of encoder_attention_heads, 3, got 25"),
        ({"decoder_layers": 1001}, "decoder_layers must be at most 1000, got 1001"),
        ({"num_mel_bins": None}, "num_mel_bins must be there, and is not"),
        ({"suppress_tokens": [1, -1]}, "suppress_tokens must be tokens below .*, 315, got -1"),
        ({"suppress_tokens": [True]}, "suppress_tokens must be tokens .*, got True"),
        ({"alignment_heads": [[3, 0]]}, r"alignment_heads must be .* below 3 and 4, got \[3, 0\]"),
        ({"alignment_heads": [[0, 4]]}, r"alignment_heads must be .*, got \[0, 4\]"),
        ({"alignment_heads": [[0, 1.0]]}, r"alignment_heads must be .*, got \[0, 1.0\]"),
        ({"alignment_heads": [0]}, "alignment_heads must be .*, got 0"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Config.read(SIZES | changes)


def test_without_alignment_heads_those_of_the_later_layers_follow_the_sound():
    heads = Config.read(SIZES).aligned_heads
    assert heads == [(layer, head) for layer in (1, 2) for head in range(4)]
