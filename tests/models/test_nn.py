# SPDX-License-Identifier: Apache-2.0
"""Layers are what their formulas say, on every variant, whatever rows and threads are beside."""

import math

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fastattn import nn
from fastattn._quantised import BLOCKS, Quantised
from tests.support.correctness import assert_same_bits

SIZES = (1, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 576, 1000)
TOLERANCE = 1e-6  # of the number, or of the largest one
EPS = 1e-5

normal_share = np.vectorize(lambda x: 0.5 * math.erfc(-x * 0.5**0.5), otypes=[float])


# The formulas, in float64.


def gelu(x):
    return x * normal_share(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPS) * weight + bias


def rms_norm(x, weight):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPS) * weight


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# name: the layer, its formula, and what it takes beside x: arrays like x, or of x's columns.
LAYERS = {
    "gelu": (nn.gelu, gelu, ""),
    "gelu_tanh": (lambda x: nn.gelu(x, approximate="tanh"), gelu_tanh, ""),
    "swiglu": (nn.swiglu, lambda x, up: silu(x) * up, "x"),
    "geglu": (nn.geglu, lambda x, up: gelu_tanh(x) * up, "x"),
    "layer_norm": (lambda *given: nn.layer_norm(*given, EPS), layer_norm, "cc"),
    "rms_norm": (lambda *given: nn.rms_norm(*given, EPS), rms_norm, "c"),
    "softmax": (nn.softmax, softmax, ""),
    "log_softmax": (nn.log_softmax, log_softmax, ""),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
rng = np.random.default_rng(0)


def given_to(name, shape, spread=3.0):
    """Return x and what the layer takes beside it."""
    kinds = "x" + LAYERS[name][2]
    shapes = [shape if kind == "x" else shape[-1:] for kind in kinds]
    arrays = [rng.standard_normal(x).astype(np.float32) for x in shapes]
    arrays[0] *= np.float32(spread)
    return arrays


def assert_right(name, given):
    """Assert that the layer gives what its formula does."""
    layer, formula, _ = LAYERS[name]
    with np.errstate(all="ignore"):
        expected = formula(*(x.astype(np.float64) for x in given))
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    out = layer(*given)
    assert out.dtype == np.float32
    assert_allclose(out, expected, rtol=TOLERANCE, atol=TOLERANCE * largest)


@every_layer
@pytest.mark.parametrize("size", SIZES)
def test_formulas(isa, name, size):
    assert_right(name, given_to(name, (5, size)))


@every_layer
def test_large_numbers(isa, name):
    assert_right(name, given_to(name, (5, 100), spread=40))


@pytest.mark.parametrize("layer", [nn.gelu, LAYERS["gelu_tanh"][0]])
def test_gelu_to_its_last_digits(isa, layer):
    x = np.linspace(-12, 12, 20001, dtype=np.float32)
    exact = (gelu if layer is nn.gelu else gelu_tanh)(x.astype(np.float64))
    assert_allclose(layer(x), exact, rtol=1e-6, atol=1e-6)


def test_gelu_keeps_its_digits_far_below_zero(isa):
    x = np.linspace(-12, -1, 20001, dtype=np.float32)
    assert_allclose(nn.gelu(x), gelu(x.astype(np.float64)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_layer_norm_far_from_zero(isa, size):
    x, weight, bias = given_to("layer_norm", (5, size))
    assert_right("layer_norm", (x + np.float32(1e4), weight, bias))
    same = np.full((1, size), 1e6 + 0.0625, np.float32)  # no variance
    assert_allclose(nn.layer_norm(same, weight, bias, EPS)[0], bias, rtol=0, atol=1e-5)


@every_layer
def test_torch_says_the_same(torch, isa, name):
    of_torch = torch.nn.functional
    layer = {
        "gelu": of_torch.gelu,
        "gelu_tanh": lambda x: of_torch.gelu(x, approximate="tanh"),
        "swiglu": lambda x, up: of_torch.silu(x) * up,
        "geglu": lambda x, up: of_torch.gelu(x, approximate="tanh") * up,
        "layer_norm": lambda x, *given: of_torch.layer_norm(x, x.shape[-1:], *given, EPS),
        "rms_norm": lambda x, weight: of_torch.rms_norm(x, x.shape[-1:], weight, EPS),
        "softmax": lambda x: of_torch.softmax(x, -1),
        "log_softmax": lambda x: of_torch.log_softmax(x, -1),
    }[name]
    given = given_to(name, (7, 577))
    expected = layer(*map(torch.from_numpy, given)).numpy()
    atol = 2e-6 * np.abs(expected).max()  # both round
    assert_allclose(LAYERS[name][0](*given), expected, rtol=2e-6, atol=atol)


@every_layer
@pytest.mark.parametrize("size", [7, 33, 576])
def test_other_rows_change_no_bit(isa, name, size):
    layer, _, kinds = LAYERS[name]
    x, *beside = given_to(name, (9, size))
    together = layer(x, *beside)
    for i in range(9):
        row = [y[i] if kind == "x" else y for kind, y in zip(kinds, beside, strict=True)]
        assert_same_bits(layer(x[i], *row), together[i])


@every_layer
def test_threads_change_no_bit(isa, threads, name):
    given = given_to(name, (700, 577))
    threads(1)
    alone = LAYERS[name][0](*given)
    for count in (2, 3):
        threads(count)
        assert_same_bits(LAYERS[name][0](*given), alone)


@every_layer
def test_arrays_of_any_layout(name):
    layer, _, kinds = LAYERS[name]
    x, *beside = given_to(name, (6, 40))
    before, expected = x.copy(), layer(x, *beside)
    backwards = np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    for same in (backwards, np.asfortranarray(x), np.repeat(x, 2, 0)[::2], x.astype(">f4")):
        assert_same_bits(layer(same, *beside), expected)
    assert_same_bits(x, before)
    stacked = [
        y.reshape(2, 3, 40) if kind == "x" else y for kind, y in zip(kinds, beside, strict=True)
    ]
    assert_same_bits(layer(x.reshape(2, 3, 40), *stacked), expected.reshape(2, 3, 40))


@every_layer
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty(name, shape):
    assert LAYERS[name][0](*given_to(name, shape)).shape == shape


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu", "geglu"])
def test_special_numbers(isa, name):
    special = [np.nan, np.inf, -np.inf, 0, -0.0, 1e30, -1e30, 3e38, 100, -100, 1e-40, -1e-40, 15]
    x = np.array(special * 3, np.float32)  # in the last, shorter vector, too
    beside = [np.ones_like(x)] * len(LAYERS[name][2])
    assert_right(name, [x, *beside])


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "log_softmax"])
@pytest.mark.parametrize("size", [3, 17, 100])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_special_numbers_stay_in_their_row(isa, name, size, number):
    x, *beside = given_to(name, (4, size))
    x[0, 0] = x[1, -1] = x[2] = number
    assert_right(name, [x, *beside])
    assert np.isfinite(LAYERS[name][0](x, *beside)[3]).all()


def test_softmax_of_nothing(isa):
    x = np.full((2, 40), -np.inf, np.float32)
    x[1, 5] = -7
    for layer, one, none in ((nn.softmax, 1, 0), (nn.log_softmax, 0, -np.inf)):
        out = layer(x)
        assert np.isnan(out[0]).all()
        assert_array_equal(out[1], np.where(np.arange(40) == 5, one, none))


@pytest.mark.parametrize("half", [0, 1, 7, 8, 16, 17, 32])
@pytest.mark.parametrize("rest", [0, 3])
def test_rotary(isa, threads, half, rest):
    x = rng.standard_normal((700, 9, 2 * half + rest)).astype(np.float32)
    cos, sin = rng.standard_normal((2, 700, half)).astype(np.float32)
    a, b, c, s = (y.astype(np.float64) for y in (x[..., :half], x[..., half : 2 * half], cos, sin))
    c, s = c[:, None], s[:, None]
    expected = np.concatenate((a * c - b * s, b * c + a * s), -1)
    out = nn.rotary(x, cos, sin)
    atol = TOLERANCE * np.abs(expected).max(initial=0)
    assert_allclose(out[..., : 2 * half], expected, rtol=TOLERANCE, atol=atol)
    assert_same_bits(out[..., 2 * half :], x[..., 2 * half :])
    assert_same_bits(nn.rotary(x[3:4], cos[3:4], sin[3:4]), out[3:4])
    threads(1)
    assert_same_bits(nn.rotary(x, cos, sin), out)


def test_rotary_turns_by_the_angle_between_positions():
    frequencies = (1e4 ** -(np.arange(32) / 32)).astype(np.float32)
    x, y = rng.standard_normal((2, 1, 1, 64)).astype(np.float32)
    dots = []
    for i, j in ((0, 5), (100, 105), (2000, 2005)):
        q, k = (
            nn.rotary(z, *nn.rotary_tables(np.array([at]), frequencies))
            for z, at in ((x, i), (y, j))
        )
        dots.append(np.vdot(q, k))
    assert_allclose(dots, dots[0], rtol=0, atol=1e-3)
    cos, sin = nn.rotary_tables(np.arange(4000), frequencies)
    angles = np.outer(np.arange(4000, dtype=np.float32), frequencies).astype(np.float64)
    assert cos.dtype == sin.dtype == np.float32
    assert_allclose((cos, sin), (np.cos(angles), np.sin(angles)), rtol=0, atol=1e-6)


def test_embedding():
    table = rng.standard_normal((7, 32)).astype(np.float32)
    ids = np.array([6, 0, 6])
    blocks = np.zeros((7, 1), BLOCKS["Q8_0"])
    blocks["scale"], blocks["quants"] = 0.5, rng.integers(-127, 128, (7, 1, 32))
    quantised = Quantised("Q8_0", blocks)
    for weight, expected in (
        (table, table),
        (table.astype(np.float16), table.astype(np.float16)),
        (table.astype(ml_dtypes.bfloat16), table.astype(ml_dtypes.bfloat16)),
        (quantised, quantised.dequantised()),
    ):
        out = nn.embedding(ids, weight)
        assert_same_bits(out, expected[ids].astype(np.float32))
    bits = table.astype(ml_dtypes.bfloat16).view("V2")  # what tensors are without ml_dtypes
    assert_same_bits(nn.embedding(ids, bits), nn.embedding(ids, bits.view(ml_dtypes.bfloat16)))
    assert nn.embedding(ids[:0], table).shape == (0, 32)
    assert nn.embedding(ids, Quantised("Q8_0", blocks[:, :0])).shape == (3, 0)


def test_feed_forward():
    x, up, gate, down, up_bias, down_bias = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((4, 24), (40, 24), (40, 24), (24, 40), 40, 24)
    )
    wide = x.astype(np.float64)
    found = nn.feed_forward(x, up, down, up_bias, down_bias)
    assert_allclose(found, gelu(wide @ up.T + up_bias) @ down.T + down_bias, rtol=0, atol=1e-4)
    found = nn.feed_forward(x, up, down, activation=np.square)
    assert_allclose(found, np.square(wide @ up.T) @ down.T, rtol=1e-5, atol=1e-2)
    for given, formula in (({}, silu), ({"activation": nn.geglu}, gelu_tanh)):
        found = nn.gated_feed_forward(x, gate, up, down, **given)
        expected = formula(wide @ gate.T) * (wide @ up.T) @ down.T
        assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


X = np.zeros((2, 6), np.float32)
HEADS, TABLE = np.zeros((2, 3, 6), np.float32), np.zeros((2, 3), np.float32)
WRONG = [
    (nn.gelu, (X.astype(float),), TypeError, "x must be an array of float32, not float64"),
    (nn.gelu, ("a",), TypeError, "x must be an array of float32, not str"),
    (nn.gelu, (X, "tan"), ValueError, "approximate must be 'none' or 'tanh', got 'tan'"),
    (nn.swiglu, (X, X > 0), TypeError, "up must be an array of float32, not bool"),
    (nn.swiglu, (X, X[:1]), ValueError,
     "up must have the shape of gate, got up.shape=(1, 6), gate.shape=(2, 6)"),
    (nn.geglu, (X, X[:, :5]), ValueError,
     "up must have the shape of gate, got up.shape=(2, 5), gate.shape=(2, 6)"),
    (nn.layer_norm, (X, X[0], X[0, :5], 0.1), ValueError,
     "bias must have shape (dim,) for an x of shape (..., dim), "
     "got bias.shape=(5,), x.shape=(2, 6)"),
    (nn.layer_norm, (X, X, X[0], 0.1), ValueError,
     "weight must have shape (dim,) for an x of shape (..., dim), "
     "got weight.shape=(2, 6), x.shape=(2, 6)"),
    (nn.layer_norm, (X, X[0], X[0], "a"), TypeError, "eps must be a number, not str"),
    (nn.rms_norm, (X[0, 0], X[0, 0], 0.1), ValueError,
     "weight must have shape (dim,) for an x of shape (..., dim), "
     "got weight.shape=(), x.shape=()"),
    (nn.rms_norm, (X, X[0], np.nan), ValueError, "eps must be finite, got eps=nan"),
    (nn.softmax, (np.float32(3),), ValueError, "x must have an axis, got x.shape=()"),
    (nn.log_softmax, (X[0, 0],), ValueError, "x must have an axis, got x.shape=()"),
    (nn.rotary, (X, TABLE, TABLE), ValueError,
     "x must have shape (total, heads, head_dim), got x.shape=(2, 6)"),
    (nn.rotary, (HEADS, TABLE, TABLE[:1]), ValueError,
     "sin must have the shape of cos, got sin.shape=(1, 3), cos.shape=(2, 3)"),
    (nn.rotary, (HEADS, TABLE[:1], TABLE[:1]), ValueError,
     "cos must have shape (total, rotary_dim / 2), with rotary_dim <= head_dim, "
     "got cos.shape=(1, 3), x.shape=(2, 3, 6)"),
    (nn.rotary, (HEADS, X, X), ValueError,
     "cos must have shape (total, rotary_dim / 2), with rotary_dim <= head_dim, "
     "got cos.shape=(2, 6), x.shape=(2, 3, 6)"),
    (nn.rotary_tables, (X[0], X[0]), TypeError,
     "positions must be an array of integers, not float32"),
    (nn.embedding, (X[0], X), TypeError, "ids must be an array of integers, not float32"),
    (nn.embedding, (np.array([0, 2]), X), ValueError, "ids must be within 0..1, got 2"),
    (nn.embedding, (np.array([0, -1]), X), ValueError, "ids must be within 0..1, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "given", "error", "message"), WRONG)
def test_errors(layer, given, error, message):
    with pytest.raises(error) as caught:
        layer(*given)
    assert str(caught.value) == message
