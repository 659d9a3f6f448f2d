# SPDX-License-Identifier: Apache-2.0
"""scaled_dot_product_attention is torch's function: its results, its defaults, its errors."""

import inspect

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn

torch = pytest.importorskip("torch", exc_type=ImportError)
attention_modes = pytest.importorskip("torch.nn.attention", exc_type=ImportError)


def both(*arrays, **options):
    """Return fastattn's result and torch's."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]
    ours = fastattn.scaled_dot_product_attention(*arrays, **options)
    if isinstance(options.get("attn_mask"), np.ndarray):
        options["attn_mask"] = torch.from_numpy(options["attn_mask"])
    return ours, torch.nn.functional.scaled_dot_product_attention(*tensors, **options).numpy()


def assert_equal_meaning(*arrays, **options):
    ours, theirs = both(*arrays, **options)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    eps = np.finfo(ours.dtype).eps
    assert_allclose(ours, theirs, rtol=32 * eps, atol=32 * eps)


def random(*shapes, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# (query, key, value): shapes, without enable_gqa.
SHAPES = [
    ((5, 4), (7, 4), (7, 3)),
    ((2, 5, 4), (2, 7, 4), (2, 7, 3)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((6, 2, 3, 5, 4), (6, 2, 3, 7, 4), (6, 2, 3, 7, 3)),
    ((2, 3, 5, 4), (1, 3, 7, 4), (2, 1, 7, 3)),
    ((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((1, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3)),
    ((2, 3, 5, 4), (3, 7, 4), (3, 7, 3)),
    ((5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((2, 3, 5, 4), (7, 4), (7, 3)),
    ((6, 1, 3, 5, 4), (2, 1, 7, 4), (1, 3, 7, 3)),
    ((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 3)),
    ((2, 3, 1, 4), (2, 3, 200, 4), (2, 3, 200, 3)),
    ((2, 3, 200, 4), (2, 3, 1, 4), (2, 3, 1, 3)),
    ((2, 3, 150, 64), (2, 3, 150, 64), (2, 3, 150, 64)),
]
GROUPED = [
    ((2, 6, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((2, 6, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3)),
    ((2, 6, 5, 4), (2, 6, 7, 4), (2, 6, 7, 3)),
    ((2, 6, 5, 4), (1, 3, 7, 4), (2, 3, 7, 3)),
    ((6, 5, 4), (2, 7, 4), (2, 7, 3)),
]


@pytest.mark.promise("sdpa-is-torchs")
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": -0.2}], ids=str
)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes(shapes, options, dtype):
    assert_equal_meaning(*random(*shapes, dtype=dtype), **options)


@pytest.mark.promise("sdpa-is-torchs")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", GROUPED, ids=str)
def test_enable_gqa(shapes, is_causal):
    assert_equal_meaning(*random(*shapes), enable_gqa=True, is_causal=is_causal)


@pytest.mark.promise("sdpa-is-torchs")
@pytest.mark.parametrize("kind", [bool, np.float64])
@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 3, 5, 1), (1, 1)]
)
def test_masks(shape, kind):
    rng = np.random.default_rng(1)
    mask = rng.random(shape) < 0.6 if kind is bool else rng.normal(size=shape)
    operands = random((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3))
    assert_equal_meaning(*operands, attn_mask=mask)
    if kind is not bool:
        assert_equal_meaning(*operands, attn_mask=np.where(rng.random(shape) < 0.5, mask, -np.inf))


@pytest.mark.promise("empty-rows-are-zero-everywhere")
@pytest.mark.parametrize("mask", [np.zeros((5, 7), bool), np.full((5, 7), -np.inf)], ids=str)
def test_a_row_that_sees_nothing_is_zero(mask):
    mask[1:] = True if mask.dtype == bool else 0
    operands = random((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3))
    assert_equal_meaning(*operands, attn_mask=mask)
    assert_array_equal(
        fastattn.scaled_dot_product_attention(*operands, attn_mask=mask)[:, :, 0],
        np.zeros((2, 3, 3)),
    )


@pytest.mark.promise("sdpa-is-torchs")
def test_empty():
    assert_equal_meaning(*random((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 3)))
    assert_equal_meaning(*random((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 3)))
    ours, _ = both(*random((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 3)))
    assert_array_equal(ours, np.zeros((2, 3, 5, 3)))


@pytest.mark.promise("sdpa-is-torchs")
def test_signature():
    """Torch's names, order and defaults."""
    parameters = inspect.signature(fastattn.scaled_dot_product_attention).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert list(parameters)[:3] == ["query", "key", "value"]
    assert list(parameters)[3:] == list(defaults)
    assert defaults == {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    documented = torch.nn.functional.scaled_dot_product_attention.__doc__.split(" -> ")[0]
    assert [
        word.split("=")[0].strip() for word in documented.split("(")[1][:-1].split(",")
    ] == list(parameters)


SQUARE = ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4))


@pytest.mark.promise("sdpa-is-torchs")
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (SQUARE, {"attn_mask": np.ones((5, 5), bool), "is_causal": True}),
        (SQUARE, {"attn_mask": np.ones((5, 4), bool)}),
        (SQUARE, {"attn_mask": np.ones((4, 5, 5), bool)}),
        (SQUARE, {"attn_mask": np.ones((5, 5), np.int64)}),
        (SQUARE, {"dropout_p": 1.5}),
        (((2, 6, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)), {}),
        (((2, 3, 5, 4), (2, 6, 5, 4), (2, 6, 5, 4)), {"enable_gqa": True}),
        (((2, 5, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)), {"enable_gqa": True}),
        (((2, 3, 5, 4), (3, 3, 5, 4), (3, 3, 5, 4)), {}),
        (((2, 3, 5, 4), (2, 3, 5, 3), (2, 3, 5, 4)), {}),
        (((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 5, 4)), {}),
        (((4,), (5, 4), (5, 4)), {}),
    ],
    ids=str,
)
def test_errors(shapes, options):
    operands = random(*shapes)
    tensors = {
        k: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for k, x in options.items()
    }
    # Torch's definition: its fast kernels let some mistakes pass.
    with (
        attention_modes.sdpa_kernel(attention_modes.SDPBackend.MATH),
        pytest.raises((RuntimeError, ValueError)),
    ):
        torch.nn.functional.scaled_dot_product_attention(
            *map(torch.from_numpy, operands), **tensors
        )
    with pytest.raises((TypeError, ValueError)):
        fastattn.scaled_dot_product_attention(*operands, **options)


@pytest.mark.promise("sdpa-is-torchs", "dropout-scales-what-stays")
def test_dropout():
    """As many pairs are dropped, what is kept grows as much, and each call drops others."""
    query, key, _ = random((2, 3, 200, 4), (2, 3, 200, 4), (2, 3, 200, 4))
    value = np.broadcast_to(np.eye(200), (2, 3, 200, 200))
    ours, theirs = both(query, key, value, dropout_p=0.3)
    exact = fastattn.scaled_dot_product_attention(query, key, value)
    for got in (ours, theirs):
        kept = got != 0
        assert_allclose(got[kept], exact[kept] / 0.7, rtol=1e-12)
        assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / kept.size)
    again = fastattn.scaled_dot_product_attention(query, key, value, dropout_p=0.3)
    assert abs(((again != 0) & (ours != 0)).mean() - 0.7**2) < 0.01
    assert_array_equal(
        fastattn.scaled_dot_product_attention(query, key, value, dropout_p=1.0),
        np.zeros(ours.shape),
    )
