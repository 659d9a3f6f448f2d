# SPDX-License-Identifier: Apache-2.0
"""Random problems: a spec, which is plain JSON and can be made smaller, and the arrays of it."""

import functools
import math
import zlib

import numpy as np

from tests.fuzz.compare import dtype_of, ml_dtypes

INF = np.inf
HALVES = ("float16", "bfloat16") if ml_dtypes else ("float16",)
FLOATS = (*HALVES, "float32", "float64")
# Around the edges of lanes, tiles of queries and of keys, forms and groups of sums.
Q_LENS = (0, 1, 1, 1, 2, 3, 5, 11, 12, 13, 15, 16, 17, 17, 23, 24, 25, 31, 33, 34, 40, 47, 48, 49)
LONG_Q_LENS = (63, 64, 65, 95, 96, 97, 127, 128, 129, 193, 257)
LONGEST_Q_LENS = (511, 513, 1023, 1024, 1025)
KV_LENS = (0, 1, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 130)
LONG_KV_LENS = (191, 255, 256, 257, 300, 383, 385, 511, 513)
LONGEST_KV_LENS = (1023, 1024, 1025, 2047, 2049, 8191, 8192, 8193, 8321)
HEAD_DIMS = (1, 2, 3, 4, 7, 8, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40)
LARGE_HEAD_DIMS = (59, 63, 64, 64, 65, 80, 96, 112, 128)
LARGEST_HEAD_DIMS = (127, 129, 160, 192, 255, 256, 257, 576)
HEADS = ((1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3), (1, 4), (2, 4), (1, 8), (1, 17))
BATCHES = ((), (), (1,), (2,), (2,), (3,), (2, 2), (1, 3), (2, 1))
LAYOUTS = (
    *("plain",) * 5,
    *("heads inside", "rows reversed", "reversed", "columns outside", "inside", "stepped"),
    *("unaligned", "swapped bytes", "read-only", "rows repeated", "heads repeated"),
)
MASK_LAYOUTS = (
    *("plain",) * 3,
    *("reversed", "columns outside", "inside", "stepped", "unaligned", "swapped bytes"),
)
PAIRS = ((40_000, 93), (400_000, 6.5), (3_000_000, 0.5))  # the most pairs of a case, and how often
WORK = 40  # multiplications of a definition, for each pair that a case may have
OPTIONS = (
    *("mask", "bias", "scale", "is_causal", "query_offset", "window", "softcap", "alibi_slopes"),
    *("sinks", "kv_lengths", "dropout_p", "key_offset"),
)


def choice(rng, options):
    """Return one of them, as it is."""
    return options[int(rng.integers(len(options)))]


def often(rng, usual, sometimes, seldom):
    """Return one of the first most times, and of the last rarely."""
    return choice(rng, choice(rng, (*(usual,) * 14, *(sometimes,) * 5, seldom)))


def chance(rng, p):
    """Return True so often."""
    return bool(rng.random() < p)


def number(rng):
    """Return an integer that seeds something."""
    return int(rng.integers(2**32))


def draw(rng, *, dropout=True, dtypes=FLOATS, batches=BATCHES, lengths=True):
    """Draw the spec of a problem."""
    dtype = choice(rng, (*dtypes, "float32") if "float32" in dtypes else dtypes)
    spec = {
        "dtype": dtype,
        "data": number(rng),
        "mean": choice(rng, (0.0, 0.0, 1.0)),
        "spread": choice(rng, (1.0, 1.0, 1.0, 0.1, 3.0)),
        "head_dim": often(rng, HEAD_DIMS, LARGE_HEAD_DIMS, LARGEST_HEAD_DIMS),
        "value_dim": often(rng, HEAD_DIMS, LARGE_HEAD_DIMS, LARGEST_HEAD_DIMS),
        "batch": list(choice(rng, batches)),
        "threads": int(rng.integers(1, 6)),
    }
    spec["kv_heads"], spec["group"] = choice(rng, HEADS)
    if chance(rng, 0.5):
        spec["value_dim"] = spec["head_dim"]
    if dtype == "float32" and chance(rng, 0.3):
        spec["kv_dtype"] = choice(rng, HALVES)
    if chance(rng, 0.01):
        spec["batch" if spec["batch"] else "kv_heads"] = [0] if spec["batch"] else 0
    if lengths:
        spec["q_len"] = often(rng, Q_LENS, LONG_Q_LENS, LONGEST_Q_LENS)
        spec["kv_len"] = often(rng, KV_LENS, LONG_KV_LENS, LONGEST_KV_LENS)
        if chance(rng, 0.15):
            spec["kv_len"] = spec["q_len"]
        fit(rng, spec)
        spec["operands"] = [draw_operand(rng, spec) for _ in range(3)]
    spec["options"] = draw_options(rng, spec, dropout)
    return spec


def fit(rng, spec):
    """Make a problem so small that a case takes some milliseconds, most times."""
    weights = [weight for _, weight in PAIRS]
    most = PAIRS[int(rng.choice(len(PAIRS), p=np.divide(weights, sum(weights))))][0]
    while True:
        rows = math.prod(spec["batch"]) * spec["kv_heads"] * spec["group"]
        pairs = rows * spec["q_len"] * spec["kv_len"]
        dims = spec["head_dim"] + spec["value_dim"]
        if pairs <= most and pairs * dims <= WORK * most:
            return
        if rows > 4:
            spec["batch"], spec["kv_heads"], spec["group"] = [], 1, choice(rng, (1, 2))
        elif dims > 300:
            spec["head_dim"], spec["value_dim"] = choice(rng, HEAD_DIMS), choice(rng, HEAD_DIMS)
        elif spec["q_len"] > spec["kv_len"] or chance(rng, 0.3):
            spec["q_len"] = choice(rng, Q_LENS)
        else:
            spec["kv_len"] = choice(rng, KV_LENS)


def draw_operand(rng, spec):
    """Draw how an operand lies in memory, and which axes of the batch it lacks."""
    ndim = len(spec["batch"])
    ones = [i for i in range(ndim) if chance(rng, 0.2)]
    operand = {"layout": choice(rng, LAYOUTS), "ones": ones}
    if chance(rng, 0.2):
        operand["lacks"] = int(rng.integers(0, ndim + 2))
    return operand


def draw_options(rng, spec, dropout=True):
    """Draw which options there are, and what each says; `arguments` makes them of it."""
    share = choice(rng, (0.0, 0.15, 0.15, 0.3, 0.5, 1.0))
    chosen = {name for name in OPTIONS if chance(rng, share)}
    options = {}
    for name in ("mask", "bias"):
        if name in chosen:
            options[name] = draw_pairs(rng, spec, name)
    if "scale" in chosen:
        options["scale"] = choice(rng, (0.3, 1.0, -0.5, 0, 0.05))
    if "is_causal" in chosen:
        options["is_causal"] = True
    if "query_offset" in chosen:
        options["query_offset"] = choice(
            rng, ("each", "end", int(rng.integers(-20, 150)), 0, -3, 2**40)
        )
    if "window" in chosen:
        options["window"] = [choice(rng, (None, 0, 1, 5, 40, 130, 2**62)) for _ in range(2)]
    if "softcap" in chosen:
        options["softcap"] = choice(rng, (0.5, 3.0, 30.0))
    if "alibi_slopes" in chosen:
        options["alibi_slopes"] = {"dtype": choice(rng, FLOATS), "each": chance(rng, 0.5)}
        if options.get("query_offset") == 2**40:
            options["query_offset"] = "end"
    if "sinks" in chosen:
        options["sinks"] = {"dtype": choice(rng, FLOATS), "none": choice(rng, (0.0, 0.3))}
    if "kv_lengths" in chosen:
        options["kv_lengths"] = choice(rng, ("each", "each", "one"))
    if "dropout_p" in chosen and dropout:
        options["dropout_p"] = choice(rng, (0.1, 0.1, 0.5, 0.9, 0.0, 1.0))
        options["seed"] = int(rng.integers(2**64, dtype=np.uint64))
        if chance(rng, 0.3):
            options["head_offset"], options["batch_offset"] = (number(rng) for _ in range(2))
    if "key_offset" in chosen:
        options["key_offset"] = choice(rng, ("each", int(rng.integers(-150, 150)), 4, 2**40 + 1))
    return options


def draw_pairs(rng, spec, name):
    """Draw a mask or bias."""
    kinds = (*("bool",) * len(FLOATS), *FLOATS) if name == "mask" else FLOATS
    ones = sorted({int(rng.integers(-3 - len(spec["batch"]), 0)) for _ in range(rng.integers(4))})
    return {
        "dtype": choice(rng, kinds),
        "seen": choice(rng, (0.0, 0.1, 0.6, 0.6, 0.9, 1.0)) if name == "mask" else 1.0,
        "pattern": choice(rng, ("random", "random", "blocks", "padding", "rows")),
        "ones": ones,
        "lacks": choice(rng, (0, 0, 1, 2, 3)),
        "layout": choice(rng, MASK_LAYOUTS),
    }


def generator(data, name):
    """Return the generator of one array: of the same numbers, whatever else the spec has."""
    return np.random.default_rng([data, zlib.crc32(name.encode())])


def laid_out(x, layout):
    """Return an equal array that lies otherwise in memory, beside NaN where there is room."""
    native = x.dtype
    if not x.ndim:
        return x
    if layout == "heads inside" and x.ndim > 2:
        return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
    if layout == "rows reversed" and x.ndim > 1:
        return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
    if layout == "reversed":
        return np.flip(np.flip(x).copy())
    if layout == "columns outside" and x.ndim > 1:
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "inside":
        room = poison(np.empty([n + 3 for n in x.shape], native))
        part = room[tuple(slice(1, -2) for _ in x.shape)]
        part[...] = x
        return part
    if layout == "stepped" and x.ndim > 1:
        room = poison(np.empty([n * 2 for n in x.shape[:-1]] + [x.shape[-1]], native))
        part = room[tuple(slice(None, None, 2) for _ in x.shape[:-1])]
        part[...] = x
        return part
    if layout == "unaligned":
        room = np.empty(x.nbytes + 1, np.uint8)
        part = room[1:].view(native).reshape(x.shape) if x.size else x
        part[...] = x
        return part
    if layout == "swapped bytes" and native.name != "bfloat16":
        return x.astype(native.newbyteorder("S"))
    if layout == "read-only":
        x.flags.writeable = False
    return x


def poison(x):
    """Fill an array with what is in no result: NaN, or any bytes."""
    x[...] = True if x.dtype == bool else 77 if x.dtype.kind in "iu" else np.nan
    return x


class Problem:
    """The arrays of a spec."""

    def __init__(self, spec):
        self.spec = spec
        self.dtype = dtype_of(spec["dtype"])
        kv_dtype = dtype_of(spec.get("kv_dtype", spec["dtype"]))
        self.heads = spec["kv_heads"] * spec["group"]
        batch = tuple(spec["batch"])
        q_len, kv_len = spec["q_len"], spec["kv_len"]
        shapes = (
            (self.heads, q_len, spec["head_dim"]),
            (spec["kv_heads"], kv_len, spec["head_dim"]),
            (spec["kv_heads"], kv_len, spec["value_dim"]),
        )
        self.operands = []
        for name, shape, how, dtype in zip(
            ("query", "key", "value"),
            shapes,
            spec["operands"],
            (self.dtype, kv_dtype, kv_dtype),
            strict=True,
        ):
            axes = [1 if i in how["ones"] else n for i, n in enumerate(batch)]
            lacks = min(how.get("lacks", 0), len(axes))
            if how.get("lacks", 0) > len(axes) and shape[0] == 1:
                shape = shape[1:]  # one head needs no axis
            x = numbers_of(spec, name, (*axes[lacks:], *shape), dtype)
            if how["layout"] == "rows repeated" and x.shape[-2]:
                x = np.broadcast_to(x[..., :1, :], x.shape)
            elif how["layout"] == "heads repeated" and x.ndim > 2 and x.shape[-3]:
                x = np.broadcast_to(x[..., :1, :, :], x.shape)
            self.operands.append(laid_out(x, how["layout"]))
        self.batch = np.broadcast_shapes(*(x.shape[:-3] for x in self.operands))
        self.pairs = (*self.batch, self.heads, q_len, kv_len)
        self.options = arguments(spec, self.batch, self.heads, q_len, kv_len)

    @functools.cached_property
    def plain(self):
        """The operands as they lie in memory if nobody does anything about it."""
        return [np.array(x, x.dtype.newbyteorder("="), order="C") for x in self.operands]

    def plain_options(self):
        """Return the options with their arrays likewise."""
        return {
            name: np.array(x, x.dtype.newbyteorder("="), order="C")
            if isinstance(x, np.ndarray)
            else x
            for name, x in self.options.items()
        }

    def rows(self, rows):
        """Return the operands and options of some of the queries, which stand where they stood."""
        options = dict(self.options)
        for name in ("mask", "bias"):
            if name in options and options[name].ndim > 1 and options[name].shape[-2] != 1:
                options[name] = options[name][..., rows, :]
        offset = options.get("query_offset")
        options["query_offset"] = (0 if offset is None else offset) + rows.start
        query, key, value = self.operands
        return [query[..., rows, :], key, value], options

    def element(self, index):
        """Return the operands and options of one element of the batch."""
        options = dict(self.options)
        for name in ("mask", "bias"):
            if name in options:
                options[name] = np.broadcast_to(options[name], self.pairs)[index]
        for name in ("query_offset", "key_offset", "kv_lengths"):
            if name in options:
                options[name] = int(np.broadcast_to(options[name], self.batch)[index])
        if "alibi_slopes" in options and options["alibi_slopes"].ndim > 1:
            options["alibi_slopes"] = options["alibi_slopes"][index]
        operands = [x[None] if x.ndim == 2 else x for x in self.operands]
        return [np.broadcast_to(x, (*self.batch, *x.shape[-3:]))[index] for x in operands], options


def numbers_of(spec, name, shape, dtype):
    """Return the numbers of an operand."""
    rng = generator(spec["data"], name)
    spread = 1.0 if name == "value" else spec["spread"]
    wide = np.float64 if dtype == np.float64 else np.float32
    x = rng.standard_normal(shape, wide) * wide(spread)
    if name == "value":
        x += wide(spec["mean"])
    return x.astype(dtype)


def arguments(spec, batch, heads, q_len, kv_len):
    """Return the options as they are passed."""
    options = {}
    pairs = (*batch, heads, q_len, kv_len)
    for name, given in spec["options"].items():
        rng = generator(spec["data"], name)
        if name in ("mask", "bias"):
            options[name] = pair_array(rng, given, pairs)
        elif name == "query_offset":
            options[name] = given
            if given == "each":
                options[name] = rng.integers(-q_len - 1, kv_len + 3, batch)
            elif given == "end":
                options[name] = kv_len - q_len
        elif name == "key_offset":
            options[name] = rng.integers(-99, 99, batch) if given == "each" else given
        elif name == "window":
            options[name] = tuple(given)
        elif name == "alibi_slopes":
            shape = (*batch, heads) if given["each"] else (heads,)
            options[name] = (rng.random(shape) ** 3).astype(dtype_of(given["dtype"]))
        elif name == "sinks":
            sinks = rng.normal(size=heads)
            sinks[rng.random(heads) < given["none"]] = -INF
            options[name] = sinks.astype(dtype_of(given["dtype"]))
        elif name == "kv_lengths":
            shape = batch if given == "each" else ()
            options[name] = rng.integers(0, kv_len + 1, shape)
            if given == "one":
                options[name] = int(options[name])
        else:
            options[name] = given
    positional = {"is_causal", "window", "alibi_slopes"} & {*options}
    moves = "key_offset" in options
    if positional and options.get("query_offset") is None and (q_len != kv_len or moves):
        options["query_offset"] = kv_len - q_len
    if moves and "query_offset" in options:  # positions, which both count from the same place
        options["query_offset"] = options["query_offset"] + options["key_offset"]
    return options


def pair_array(rng, given, pairs):
    """Return a mask or bias that broadcasts to the pairs."""
    shape = [1 if i - len(pairs) in given["ones"] else n for i, n in enumerate(pairs)]
    shape = shape[min(given["lacks"], len(shape)) :]
    seen = rng.random(shape) < given["seen"]
    columns = np.arange(shape[-1]) if shape else np.zeros((), int)
    if given["pattern"] == "blocks":
        seen = np.broadcast_to(columns // 130 % 2 == 0, shape)
    elif given["pattern"] == "padding":
        seen = np.broadcast_to(columns < given["seen"] * (columns.size + 1), shape)
    elif given["pattern"] == "rows" and len(shape) > 1:
        seen = np.broadcast_to(rng.random((shape[-2], 1)) < given["seen"], shape)
    if given["dtype"] == "bool":
        return laid_out(np.array(seen), given["layout"])
    added = np.where(seen, rng.standard_normal(shape), -INF)
    return laid_out(np.asarray(added.astype(dtype_of(given["dtype"]))), given["layout"])
