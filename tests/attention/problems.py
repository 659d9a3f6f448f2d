# SPDX-License-Identifier: Apache-2.0
"""What tests of results share: problems with every argument, layouts, and marks."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from fastattn import attention
from tests.support.correctness import assert_same_bits
from tests.support.problems import DTYPES, HALVES, covering_cases, make_problem

INF = np.inf
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
# bfloat16 may be multiplied in pairs, which no other dtype is.
every_arithmetic = pytest.mark.parametrize(
    "dtype", [*DTYPES, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)


def with_lse(*operands, **options):
    return attention(*operands, return_lse=True, **options)


def assert_chunks_have_the_bits(expected, operands, options, ends):
    """Assert that queries that are cut at these places have the bits that are expected."""
    for begin, end in itertools.pairwise((0, *ends)):
        rows = slice(begin, end)
        part = options | {
            "mask": options["mask"][..., rows, :],
            "bias": options["bias"][..., rows, :],
            "query_offset": options["query_offset"] + begin,
        }
        got = with_lse(operands[0][..., rows, :], *operands[1:], **part)
        assert_same_bits(got, (expected[0][..., rows, :], expected[1][..., rows]))


LEVELS = {
    "dtype": (*DTYPES, *HALVES, "float32 beside float16", "float32 beside bfloat16"),
    "q_len": (1, 2, 11, 12, 13, 23, 24, 25, 47, 48, 49, 97),
    "kv_len": (1, 2, 63, 127, 128, 129, 255, 257),
    "head_dim": (1, 7, 8, 17, 64, 80, 128, 256, 259),
    "value_head_dim": (1, 5, 8, 16, 31, 64, 130),
    "heads": ((1, 1), (2, 2), (3, 1), (4, 2), (8, 1)),
    "batch": (None, (), (2,), (2, 3), (2, 1, 2)),
    "layout": ("plain", "interleaved", "reversed", "fortran", "repeated"),
    "mask": (None, "padding", "pairs", "causal rows", "float", "float16", "bfloat16", "column"),
    "bias": (None, "heads", "float64", "row", "hiding"),
    "scale": (None, 0.3, -0.5, 0),
    "is_causal": (False, True),
    "query_offset": (None, "end", "negative", "beyond", "each"),
    "window": (None, (3, 2), (None, 0), (0, None), (50, 9)),
    "softcap": (None, 1.5, 30.0),
    "alibi_slopes": (None, "heads", "each"),
    "sinks": (None, "heads", "some"),
    "kv_lengths": (None, "one", "each"),
    "dropout_p": (0.0, 0.1, 0.6),
    "key_offset": (0, "shifted", "each"),
    "counters": ((0, 0), (3, 2**32 - 1)),
}
CASES = covering_cases(LEVELS)


def laid_out(x, layout):
    """Return an equal array with other strides; "repeated" repeats the first along axis -2."""
    if layout == "interleaved" and x.ndim > 2:
        return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    if layout == "fortran":
        return np.asfortranarray(x)
    return x


def arguments_of(case, rng):
    """Return the operands and options that a case stands for."""
    batch = case["batch"] or ()
    heads, kv_heads = case["heads"]
    dtype, *kv_dtype = (
        str(case["dtype"]).split(" beside ") if isinstance(case["dtype"], str) else [case["dtype"]]
    )
    q_len, kv_len = case["q_len"], case["kv_len"]
    operands = make_problem(
        q_len,
        kv_len,
        case["head_dim"],
        case["value_head_dim"],
        heads=heads,
        kv_heads=kv_heads,
        batch=batch,
        dtype=kv_dtype[0] if kv_dtype else dtype,
    )
    if kv_dtype:
        operands = (operands[0].astype(dtype), *operands[1:])
    if case["batch"] is None and heads == 1:
        operands = [x[0] for x in operands]
    elif case["layout"] == "repeated":
        operands = [operands[0], operands[1][..., :1, :], operands[2]]
        operands[1] = np.broadcast_to(operands[1], (*operands[2].shape[:-1], case["head_dim"]))
    operands = [laid_out(x, case["layout"]) for x in operands]

    pairs = (*batch, heads, q_len, kv_len)
    seen = rng.random(pairs) < 0.7
    added = np.where(seen, rng.normal(size=pairs), -INF)
    masks = {
        "padding": lambda: np.arange(kv_len) < rng.integers(0, kv_len + 1, (*batch, 1, 1, 1)),
        "pairs": lambda: seen[..., :1, :, :],
        "causal rows": lambda: np.tri(q_len, kv_len, kv_len // 2, dtype=bool),
        "float": lambda: added.astype(np.float32),
        "float16": lambda: laid_out(added.astype(np.float16), "fortran"),
        "bfloat16": lambda: np.broadcast_to(added[..., :1].astype(ml_dtypes.bfloat16), pairs),
        "column": lambda: seen[..., :1],
    }
    biases = {
        "heads": lambda: rng.normal(size=(heads, q_len, kv_len)).astype(dtype),
        "float64": lambda: rng.normal(size=pairs)[..., ::-1, ::-1],
        "row": lambda: rng.normal(size=kv_len).astype(np.float16),
        "hiding": lambda: added[..., :1, :, :].astype(np.float32),
    }
    positional = case["is_causal"] or case["window"] or case["alibi_slopes"]
    offsets = {
        None: kv_len - q_len if positional and q_len != kv_len else None,
        "end": kv_len - q_len,
        "negative": -(q_len // 2),
        "beyond": kv_len + 3,
        "each": rng.integers(-q_len, kv_len + 2, batch),
    }
    sinks = rng.normal(size=heads)
    per_argument = {
        "alibi_slopes": {"heads": rng.random(heads), "each": rng.random((*batch, heads))},
        "sinks": {"heads": sinks.astype(np.float32), "some": np.where(sinks > 0, -INF, sinks)},
        "kv_lengths": {
            "one": int(rng.integers(0, kv_len + 1)),
            "each": rng.integers(0, kv_len + 1, batch),
        },
    }
    options = {
        name: case[name] for name in ("scale", "is_causal", "window", "softcap", "dropout_p")
    }
    options["seed"] = int(rng.integers(0, 2**64, dtype=np.uint64))
    key_offsets = {0: 0, "shifted": 2**34 + 3, "each": rng.integers(-9, 9, batch)}
    options["query_offset"] = offsets[case["query_offset"]]
    options["key_offset"] = key_offsets[case["key_offset"]]
    if options["query_offset"] is not None:
        options["query_offset"] = options["query_offset"] + options["key_offset"]
    if case["dropout_p"]:
        options["head_offset"], options["batch_offset"] = case["counters"]
    options["mask"] = masks[case["mask"]]() if case["mask"] else None
    options["bias"] = biases[case["bias"]]() if case["bias"] else None
    for name, levels in per_argument.items():
        options[name] = levels[case[name]] if case[name] else None
    return operands, options


def misaligned(x):
    """Return an equal array that begins one byte after where its dtype is aligned."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    copy = np.ndarray(x.shape, x.dtype, raw, offset=1)
    copy[...] = x
    return copy


# Views of an array with two batch axes, whose strides there are negative, 0 or in another order.
BATCH_VIEWS = (
    lambda x: x[::-1, ::2],
    lambda x: np.broadcast_to(x[:1], x.shape),
    lambda x: x.swapaxes(0, 1)[1:, ::-1],
    lambda x: np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3),
)


def problem_with_everything(dtype):
    operands = make_problem(70, 300, 40, 24, heads=4, kv_heads=2, batch=(3,), dtype=dtype)
    rng = np.random.default_rng(4)
    options = {
        "mask": rng.random((3, 1, 70, 300)) < 0.8,
        "bias": rng.normal(size=(4, 70, 300)).astype(np.float32),
        "query_offset": np.array([230, 0, 90]),
        "window": (200, 20),
        "alibi_slopes": rng.random((3, 4)),
        "sinks": rng.normal(size=4),
        "kv_lengths": np.array([300, 129, 0]),
        "softcap": 20.0,
    }
    return operands, options
