# SPDX-License-Identifier: Apache-2.0
"""`fastattn.linear`: the product by its formula, whose bits depend on nothing beside."""

import numpy as np

import fastattn
from fastattn.nn import Quantised, linears
from tests.fuzz.compare import dtype_of, ml_dtypes
from tests.fuzz.problem import LAYOUTS, chance, choice, generator, laid_out, number, often

PLAIN = ("float32", "float16", *(("bfloat16",) if ml_dtypes else ()))
BLOCKS = {
    "Q8_0": np.dtype([("scale", "<f2"), ("quants", "i1", 32)]),
    "Q4_0": np.dtype([("scale", "<f2"), ("quants", "u1", 16)]),
    "Q4_1": np.dtype([("scale", "<f2"), ("min", "<f2"), ("quants", "u1", 16)]),
}
THREADS = (1, 2, 3, 8, 32, 96)


def draw(rng):
    """Draw a layer, its rows, and what is to change no bit."""
    return {
        "storage": choice(rng, (*PLAIN, *BLOCKS)),
        "rows": often(rng, (1, 2, 3, 4, 5, 8, 9), (17, 63, 65, 130), (0, 300)),
        "features": often(rng, (32, 64, 96, 768, 800), (1, 31, 33, 767, 1537, 2400), (0,)),
        "out": often(rng, (1, 3, 8, 25), (24, 49, 100, 260), (0,)),
        "bias": chance(rng, 0.5),
        "data": number(rng),
        "layout": choice(rng, LAYOUTS),
        "weight_layout": choice(rng, LAYOUTS),
        "threads": choice(rng, THREADS),
        "row_begin": int(rng.integers(300)),
        "row_count": int(rng.integers(1, 12)),
        "out_begin": int(rng.integers(260)),
    }


def weight_of(spec):
    """Return a weight as it is stored, and its numbers."""
    rng, out = generator(spec["data"], "weight"), spec["out"]
    if spec["storage"] in PLAIN:
        weight = rng.normal(size=(out, spec["features"])).astype(dtype_of(spec["storage"]))
        return laid_out(weight, spec["weight_layout"]), weight.astype(np.float32)
    blocks = np.zeros((out, spec["features"] // 32), BLOCKS[spec["storage"]])
    for field in blocks.dtype.names:
        if field == "quants":
            some = rng.integers(0, 256, blocks[field].shape).astype(np.uint8)
            blocks[field] = some.view(blocks[field].dtype)
        else:
            blocks[field] = rng.normal(size=blocks.shape) / 8
    # What lies beside blocks is others, and they are little-endian.
    numbers = Quantised(spec["storage"], blocks).dequantised()
    if spec["weight_layout"] in ("inside", "stepped"):
        blocks = np.repeat(blocks, 2, axis=0)[::2]
    elif spec["weight_layout"] != "swapped bytes":
        blocks = laid_out(blocks, spec["weight_layout"])
    return Quantised(spec["storage"], blocks), numbers


def same(what, found, expected):
    """Raise if any bit differs."""
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}"
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), f"{what}: other bits"


def check(spec):
    """Raise if a layer is not right, or has other bits than it should."""
    if spec["storage"] in BLOCKS:
        spec = {**spec, "features": -(-spec["features"] // 32) * 32}
    rows, features = spec["rows"], spec["features"]
    rng = generator(spec["data"], "x")
    x = rng.normal(size=(rows, features)).astype(np.float32)
    weight, numbers = weight_of(spec)
    bias = rng.normal(size=spec["out"]).astype(np.float32) if spec["bias"] else None
    fastattn.set_num_threads(spec["threads"])
    out = fastattn.linear(laid_out(x, spec["layout"]), weight, bias)

    added = 0.0 if bias is None else bias.astype(np.float64)
    wide, wide_numbers = x.astype(np.float64), numbers.T.astype(np.float64)
    exact = wide @ wide_numbers + added
    sizes = abs(wide) @ abs(wide_numbers) + abs(added)
    assert out.dtype == np.float32, f"out has dtype {out.dtype}"
    assert out.shape == exact.shape, f"out has shape {out.shape}"
    # A lane of the fewest, 4, sums a quarter of the products, with two roundings each.
    wrong = abs(out - exact) > 2.0**-23 * (features / 4 + 8) * sizes
    assert not wrong.any(), f"out: {np.argwhere(wrong)[0].tolist()} is beyond its rounding"

    fastattn.set_num_threads(1)
    same("one thread", fastattn.linear(x, weight, bias), out)
    same("the numbers of the weight", fastattn.linear(x, numbers, bias), out)
    begin = min(spec["row_begin"], rows)
    some = slice(begin, begin + spec["row_count"])
    same("some rows", fastattn.linear(x[some], weight, bias), out[some])
    first = min(spec["out_begin"], spec["out"])
    part = numbers[first:], None if bias is None else bias[first:]
    fastattn.set_num_threads(spec["threads"])
    both = linears(x, part, (weight, bias))
    same("some columns", both[0], out[:, first:])
    same("beside another layer", both[1], out)
