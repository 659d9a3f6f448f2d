# SPDX-License-Identifier: Apache-2.0
"""`linear` is the product by its formula, whatever the weight is stored as and is beside it."""

import re
import signal
import time

import ml_dtypes
import numpy as np
import pytest

from fastattn import linear, nn
from fastattn.nn import Quantised
from tests.support.correctness import assert_same_bits

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BLOCKS = {
    "Q8_0": np.dtype([("scale", "<f2"), ("quants", "i1", 32)]),
    "Q4_0": np.dtype([("scale", "<f2"), ("quants", "u1", 16)]),
    "Q4_1": np.dtype([("scale", "<f2"), ("min", "<f2"), ("quants", "u1", 16)]),
}
STORAGES = (*DTYPES, *BLOCKS)
# Rows, in and out around the kernel's tiles: few rows and many, of one step and of two parts.
SHAPES = [
    *((1, 32, 1), (1, 64, 9), (2, 96, 7), (3, 320, 33), (4, 64, 50), (5, 64, 50), (7, 32, 3)),
    *((8, 1536, 25), (9, 768, 24), (17, 800, 31), (65, 3072, 70), (300, 128, 200)),
]
every_storage = pytest.mark.parametrize("storage", STORAGES)
rng = np.random.default_rng(0)


def weight_of(storage, rows, columns):
    """Return a random weight as it is stored, and its numbers."""
    if storage in DTYPES:
        weight = rng.standard_normal((rows, columns)).astype(DTYPES[storage])
        return weight, weight.astype(np.float32)
    blocks = np.zeros((rows, columns // 32), BLOCKS[storage])
    for field in blocks.dtype.names:
        numbers = blocks[field]
        if field == "quants":
            random = rng.integers(0, 256, numbers.shape).astype(np.uint8)
            blocks[field] = random.view(numbers.dtype)
        else:
            blocks[field] = rng.standard_normal(numbers.shape) / 8
    weight = Quantised(storage, blocks)
    return weight, weight.dequantised()


def given(rows, columns, out):
    """Return x and a bias."""
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    return x, rng.standard_normal(out).astype(np.float32)


def assert_right(out, x, numbers, bias=0.0):
    """Assert that each number of a product is within its rounding."""
    exact = x.astype(np.float64) @ numbers.T.astype(np.float64) + bias
    sizes = np.abs(x).astype(np.float64) @ np.abs(numbers).T.astype(np.float64) + np.abs(bias)
    assert out.dtype == np.float32
    assert out.shape == exact.shape
    # The lanes' sums have an eighth as many terms, or less; the generic kernel has 4 lanes.
    assert (np.abs(out - exact) <= 2**-23 * (x.shape[1] / 8 + 8) * sizes).all()


@every_storage
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(isa, storage, shape):
    rows, columns, out = shape
    x, bias = given(rows, columns, out)
    weight, numbers = weight_of(storage, out, columns)
    assert_right(linear(x, weight, bias), x, numbers, bias)
    assert_right(linear(x, weight), x, numbers)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_any_number_of_columns(isa, storage, rows):
    for columns in (0, *range(1, 70), 767, 769, 1537):
        x, bias = given(rows, columns, 5)
        weight, numbers = weight_of(storage, 5, columns)
        assert_right(linear(x, weight, bias), x, numbers, bias)


@pytest.mark.promise("linear-rows-are-alone")
@every_storage
@pytest.mark.parametrize("columns", [64, 1600])
def test_other_rows_threads_and_storage_change_no_bit(isa, threads, storage, columns):
    x, bias = given(130, columns, 100)
    weight, numbers = weight_of(storage, 100, columns)
    threads(1)
    out = linear(x, weight, bias)
    assert_same_bits(linear(x, numbers, bias), out)
    for count in (1, 2, 3):
        threads(count)
        assert_same_bits(linear(x, weight, bias), out)
        for rows in (slice(7, 8), slice(3, 6), slice(120, 125), slice(1, 90)):
            assert_same_bits(linear(x[rows], weight, bias), out[rows])
    some = Quantised(storage, weight.blocks[30:37]) if storage in BLOCKS else weight[30:37]
    assert_same_bits(linear(x, some, bias[30:37]), out[:, 30:37])


def test_arrays_of_any_layout(isa):
    x, bias = given(6, 40, 9)
    weight, _ = weight_of("float32", 9, 40)
    expected = linear(x, weight, bias)
    for same in (np.asfortranarray(x), np.repeat(x, 2, 0)[::2], x.astype(">f4")):
        assert_same_bits(linear(same, weight, bias), expected)
    unaligned = np.frombuffer(b"x" + weight.tobytes(), np.float32, offset=1).reshape(9, 40)
    repeated, backwards = np.repeat(weight, 3, 0)[::3], weight[::-1].copy()[::-1]
    for same in (np.asfortranarray(weight), unaligned, repeated, backwards):
        assert_same_bits(linear(x, same, bias), expected)
    assert_same_bits(linear(x, weight, np.repeat(bias, 2)[::2]), expected)


def test_special_numbers_stay_in_their_row_and_column(isa):
    for rows in (3, 9):
        x, _ = given(rows, 100, 7)
        weight, _ = weight_of("float32", 7, 100)
        x[0, 99], weight[2, 0] = np.nan, np.inf
        out = linear(x, weight)
        assert np.isnan(out[0]).all()
        assert not np.isfinite(out[:, 2]).any()
        assert np.isfinite(np.delete(out[1:], 2, axis=1)).all()


@pytest.mark.parametrize("shape", [(0, 8, 3), (4, 8, 0), (0, 0, 0)], ids=str)
def test_empty(shape):
    rows, columns, out = shape
    x, bias = given(*shape)
    assert linear(x, np.ones((out, columns), np.float32), bias).shape == (rows, out)
    assert_same_bits(
        linear(x[:, :0], np.ones((out, 0), np.float32), bias), bias + x[:, :0].sum(1)[:, None]
    )


@every_storage
@pytest.mark.parametrize("rows", [1, 4, 5, 70])
def test_without_features_the_bias_is_left(isa, storage, rows):
    x, bias = given(rows, 0, 30)
    weight, _ = weight_of(storage, 30, 0)
    assert_same_bits(linear(x, weight, bias), np.tile(bias, (rows, 1)))
    assert_same_bits(linear(x, weight), np.zeros((rows, 30), np.float32))


X, WEIGHT, BIAS = np.ones((2, 32), np.float32), np.ones((3, 32), np.float32), np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (X.astype(np.float64), WEIGHT),
            TypeError,
            "x must be an array of float32, not float64",
        ),
        (
            (X, WEIGHT.astype(np.int8)),
            TypeError,
            "weight must be an array of float32, float16 or bfloat16, not int8",
        ),
        (
            (X[0, 0], WEIGHT),
            ValueError,
            "x and weight must have shapes (..., in) and (out, in), "
            "got x.shape=(), weight.shape=(3, 32)",
        ),
        (
            (X, WEIGHT[:, 1:]),
            ValueError,
            "x and weight must have shapes (..., in) and (out, in), "
            "got x.shape=(2, 32), weight.shape=(3, 31)",
        ),
        (
            (X, WEIGHT, BIAS[1:]),
            ValueError,
            "bias must have shape (out,), got bias.shape=(2,), weight.shape=(3, 32)",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error) as raised:
        linear(*arguments)
    assert str(raised.value) == message


def test_weights_of_any_kind_of_array():
    x, bias = given(3, 32, 5)
    weight, _ = weight_of("float32", 5, 32)
    expected = linear(x, weight, bias)
    assert_same_bits(linear(x, weight.astype(">f4"), bias), expected)
    with pytest.raises(TypeError, match=r"weight must be an array of float32, .*, not float64"):
        linear(x, weight.tolist(), bias)


def test_rows_of_any_axes():
    x, bias = given(24, 64, 5)
    weight, _ = weight_of("Q8_0", 5, 64)
    expected = linear(x, weight, bias)
    for shape in ((24,), (4, 6), (2, 1, 12), (24, 1)):
        assert_same_bits(linear(x.reshape(*shape, 64), weight, bias), expected.reshape(*shape, 5))
    assert_same_bits(linear(x[3], weight, bias), expected[3])
    assert linear(np.zeros((2, 0, 64), np.float32), weight).shape == (2, 0, 5)
    assert linear(np.zeros((2, 3, 0), np.float32), np.zeros((4, 0), np.float32)).shape == (2, 3, 4)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_layers_of_the_same_x_at_once(isa, threads, rows):
    sizes = {"Q4_1": 100, "float32": 7, "Q8_0": 0, "bfloat16": 800}
    x, _ = given(rows, 1024, 1)
    layers = [(weight_of(kind, out, 1024)[0], given(1, 1, out)[1]) for kind, out in sizes.items()]
    layers[1] = layers[1][0], None
    expected = [linear(x, *layer) for layer in layers]
    for count in (1, 2, 3):
        threads(count)
        for found, one in zip(nn.linears(x, *layers), expected, strict=True):
            assert_same_bits(found, one)
    assert nn.linears(x) == []
    with pytest.raises(ValueError, match=r"^x must have shape \(total, in\), got \(1024,\)$"):
        nn.linears(x[0], *layers)
    rule = "a layer must be a pair of a weight and a bias or None"
    for wrong, got in ((layers[0][0], "Quantised"), (layers[0][:1], "a tuple of 1")):
        with pytest.raises(TypeError, match=f"^{rule}, got {got}$"):
            nn.linears(x, layers[0], wrong)


def test_float16_of_every_kind_as_scales():
    scales = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    scales = scales[np.isfinite(scales)]
    blocks = np.zeros((len(scales), 1), BLOCKS["Q8_0"])
    blocks["scale"][:, 0], blocks["quants"][:, 0, 0] = scales, 1
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 1
    np.testing.assert_array_equal(linear(x, Quantised("Q8_0", blocks))[0], scales.astype("f4"))


def test_tensors_give_tensors():
    torch = pytest.importorskip("torch")
    x, bias = given(6, 32, 5)
    weight, _ = weight_of("bfloat16", 5, 32)
    out = linear(torch.from_numpy(x), torch.from_numpy(weight.view(np.int16)).view(torch.bfloat16))
    assert isinstance(out, torch.Tensor)
    assert_same_bits(out.numpy(), linear(x, weight))
    assert_same_bits(
        linear(x, torch.from_numpy(weight.astype(np.float32)), bias), linear(x, weight, bias)
    )


@pytest.mark.promise("nothing-is-detached-silently", "more-than-numbers-is-refused")
def test_what_would_be_lost_is_refused():
    torch = pytest.importorskip("torch")
    x, bias = given(6, 32, 5)
    weight, _ = weight_of("float32", 5, 32)
    parameter = torch.nn.Parameter(torch.from_numpy(weight))
    masked = np.ma.masked_array(weight, weight > 0)
    for arguments, name in (
        ((x, parameter), "weight"),
        ((torch.from_numpy(x).requires_grad_(), weight), "x"),
        ((x, weight, torch.from_numpy(bias).requires_grad_()), "bias"),
    ):
        with pytest.raises(TypeError, match=f"^{name} requires grad, and this call has no"):
            linear(*arguments)
    with pytest.raises(TypeError, match=r"^weight must be an array of numbers and nothing beside"):
        linear(x, masked)
    with torch.no_grad():
        assert_same_bits(linear(x, parameter), linear(x, weight))


def test_blocks_of_bytes():
    weight, numbers = weight_of("Q4_1", 6, 96)
    data = weight.blocks.tobytes()
    same = Quantised.from_bytes("Q4_1", data, (6, 96))
    assert same.shape == (6, 96)
    assert_same_bits(same.dequantised(), numbers)
    for arguments, message in (
        (("Q4_1", data[:-1], (6, 96)), "data must have the 360 bytes of (6, 96) in Q4_1, got 359"),
        (("Q8_0", data, (6, 96)), "data must have the 612 bytes of (6, 96) in Q8_0, got 360"),
        (("Q4_1", data, (6, 95)), "shape must have rows of a multiple of 32 columns, got (6, 95)"),
        (("Q4_1", data, ()), "shape must have rows of a multiple of 32 columns, got ()"),
        (("Q5_0", data, (6, 96)), "kind must be Q8_0, Q4_0, Q4_1, got 'Q5_0'"),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
            Quantised.from_bytes(*arguments)
    with pytest.raises(TypeError, match=r"^blocks must be an array of \[.*\], not float32$"):
        Quantised("Q4_1", numbers)
    with pytest.raises(TypeError, match=r"^blocks must be an array of numbers and nothing beside,"):
        Quantised("Q4_1", weight.blocks.view(np.matrix))


@pytest.mark.parametrize(
    ("data", "shape", "error", "message"),
    [
        (bytes(34), 32, TypeError, "shape must be a tuple of int, got 32"),
        (bytes(34), (1, 32.0), TypeError, "shape must be a tuple of int, got (1, 32.0)"),
        (None, (1, 32), TypeError, "data must have a buffer, not NoneType"),
        (
            np.zeros(68, np.uint8)[::2],
            (1, 32),
            ValueError,
            "data must be contiguous, got strides (2,)",
        ),
    ],
)
def test_bytes_that_are_no_blocks(data, shape, error, message):
    with pytest.raises(error, match=rf"^{re.escape(message)}$"):
        Quantised.from_bytes("Q8_0", data, shape)


def test_blocks_of_a_mapped_file(tmp_path):
    x, bias = given(6, 96, 5)
    weight, _ = weight_of("Q4_0", 5, 96)
    weight.blocks.tofile(tmp_path / "blocks")
    mapped = np.memmap(tmp_path / "blocks", BLOCKS["Q4_0"], "r").reshape(5, 3)
    assert_same_bits(linear(x, Quantised("Q4_0", mapped), bias), linear(x, weight, bias))


@pytest.mark.parametrize(
    ("kind", "field", "number"),
    [("Q8_0", "scale", np.nan), ("Q4_0", "scale", np.inf), ("Q4_1", "min", -np.inf)],
)
def test_scales_that_are_not_finite(kind, field, number):
    blocks = weight_of(kind, 5, 96)[0].blocks
    blocks[field][3, 1] = number
    message = f"every {field} of a block must be finite, got {number} in block [3, 1]"
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        Quantised(kind, blocks)


def test_a_signal_ends_a_long_product():
    x, weight = np.ones((40_000, 1024), np.float32), np.ones((2048, 1024), np.float32)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            [linear(x, weight) for _ in range(100)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 5
