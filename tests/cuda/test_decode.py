# SPDX-License-Identifier: Apache-2.0
"""The decode kernels on the emulator against the definition, and what they compile to."""
# ruff: noqa: E501 - the tables have a line per case

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="needs the extra `cuda`")

from fastattn.cuda._build import build
from fastattn.cuda.kernels import MOST_SIDE, decode
from tests.cuda import cases, sass
from tests.cuda import emulator as emulator
from tests.cuda.cases import DTYPES, problem, with_fault
from tests.support.correctness import assert_same_bits

NAN = float("nan")
BORDER = decode.SPLIT


@dataclasses.dataclass
class Result:
    out: np.ndarray
    lse: np.ndarray
    flags: np.ndarray
    partial_out: np.ndarray
    partial_lse: np.ndarray


def attend(
    query, key, value, *, is_causal=False, window=(None, None), query_offset=0, kv_lengths=None,
    softcap=None, scale=None, on_device=False, padded=False, module=decode,
):  # fmt: skip
    """Run both kernels as the call does, 4-D arrays alone.

    on_device: offsets are read by the kernel. padded: rows have NaN around them, and heads lie
    within positions.
    """
    dtype = query.dtype.name
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    group = heads // kv_heads
    left, right = (MOST_SIDE if side is None else side for side in window)
    right = 0 if is_causal else right
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scale_log2, cap_factor = scale / math.log(2), 0.0
    if softcap is not None:
        scale_log2, cap_factor = softcap / math.log(2), 2 * scale / softcap / math.log(2)

    memory = emulator.Memory()

    def placed(array):
        """Return a copy in the device's memory, its address and its strides."""
        copy, start = np.array(array, order="C"), 0
        address = None if padded else memory.place(copy)
        if padded:
            b, h, n, d = array.shape
            whole = np.full((b, n + 3, h + 1, d + 24), NAN, array.dtype)
            address = memory.place(whole)
            copy = whole.transpose(0, 2, 1, 3)[:, 1:, 2:-1, 16:-8]
            copy[...] = array
            start = copy.ctypes.data - whole.ctypes.data
        return copy, address + start, [x // 2 for x in copy.strides[:3]]

    (_, q, q_strides), (_, k, k_strides), (_, v, v_strides) = map(placed, (query, key, value))
    out, o, o_strides = placed(np.full_like(query, NAN))
    splits = module.splits_of(kv_len)
    sizes = module.workspace(batch, heads, q_len, kv_len, head_dim)
    flag_tiles = -(-q_len // module.FLAG_ROWS)
    result = Result(
        out,
        np.full((batch, heads, q_len), NAN, np.float32),
        np.full((batch, heads, flag_tiles), -7, np.int32),
        np.full((batch, heads, q_len, splits, head_dim), NAN, np.float32),
        np.full((batch, heads, q_len, splits), NAN, np.float32),
    )
    assert sizes == (result.partial_out.size, result.partial_lse.size)
    lse, flags, partial_out, partial_lse = map(
        memory.place, (result.lse, result.flags, result.partial_out, result.partial_lse)
    )
    length, offset, lengths, offsets = kv_len, query_offset, 0, 0
    if kv_lengths is not None:
        lengths = memory.place(np.asarray(kv_lengths, np.int64))
        length = -(10**6)  # where the array counts, the number must not
    if np.ndim(query_offset) or on_device:
        offsets = memory.place(np.broadcast_to(query_offset, batch).astype(np.int64))
        offset = -(10**6)

    tiles = module.row_tiles_for(q_len, group, head_dim)
    kernel = module.split(dtype, head_dim, tiles, softcap is not None)
    numbers = (q_len, kv_len, heads, group, left, right, length, offset)
    strides = (*q_strides, *k_strides, *v_strides)
    floats = (np.float32(scale_log2), np.float32(cap_factor))
    emulator.run(
        kernel,
        module.split_blocks(batch, kv_heads, q_len, kv_len, group, tiles),
        (q, k, v, partial_out, partial_lse, flags, lengths, offsets, *numbers, *strides, *floats),
        memory,
        lanes=32,
    )
    emulator.run(
        module.combine(dtype, head_dim),
        module.combine_blocks(batch, heads, q_len),
        (partial_out, partial_lse, o, lse, flags, q_len, heads, splits, *o_strides),
        memory,
        lanes=32,
    )
    return result


def assert_right(result, query, key, value, **options):
    """Assert that a result is right, and that no row of it is flagged."""
    cases.assert_right(result.out, result.lse, query, key, value, **options)
    assert (result.flags == 0).all()


# Every head_dim with each count of row tiles it has, and key counts about the border of a split.
SHAPES = [
    (64, 1, 1, 1),
    (64, 4, 4, 1000),
    (64, 7, 3, BORDER + 1),
    (64, 8, 8, BORDER - 1),
    (64, 1, 40, BORDER),
    (96, 1, 16, BORDER),
    (96, 8, 1, 1000),
    (96, 4, 5, BORDER - 1),
    (96, 7, 9, BORDER + 1),
    (128, 4, 1, BORDER - 1),
    (128, 8, 2, BORDER + 1),
    (128, 1, 2, 1000),
    (128, 7, 4, BORDER),
    (128, 4, 13, 1),
    (256, 8, 1, BORDER),
    (256, 1, 7, BORDER + 1),
    (256, 7, 3, BORDER - 1),
    (256, 4, 1, 1000),
]


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "group", "q_len", "kv_len"), SHAPES)
def test_it_is_attention(dtype, head_dim, group, q_len, kv_len):
    arrays = problem(q_len, kv_len, head_dim, dtype, group=group, seed=q_len)
    assert_right(attend(*arrays), *arrays)


OPTIONS = {
    "causal": {"is_causal": True, "query_offset": 296},
    "causal, across splits": {"is_causal": True, "query_offset": 254},
    "window": {"window": (100, 3), "query_offset": 250},
    "window, narrow": {"window": (0, 0), "query_offset": 297},
    "rows that see nothing": {"is_causal": True, "query_offset": -3},
    "all rows see nothing": {"window": (4, 4), "query_offset": 900},
    "softcap": {"softcap": 2.0},
    "softcap and causal": {"softcap": 30.0, "is_causal": True, "query_offset": 296},
    "scale": {"scale": 0.7},
    "lengths": {"kv_lengths": [257, 0, 300]},
    "offsets": {"is_causal": True, "query_offset": np.array([296, 100, -2])},
    "lengths, offsets, window": {
        "kv_lengths": [40, 300, 256],
        "query_offset": np.array([36, 298, 256]),
        "window": (80, 1),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    options = OPTIONS[name]
    batch = 3 if np.ndim(options.get("query_offset", options.get("kv_lengths", 0))) else 1
    batch = 3 if "kv_lengths" in options else batch
    arrays = problem(5, 300, 64, dtype, group=4, batch=batch)
    assert_right(attend(*arrays, **options), *arrays, **options)


@pytest.mark.parametrize("head_dim", decode.ROW_TILES)
def test_any_strides(head_dim):
    arrays = problem(3, 70, head_dim, group=2, kv_heads=3, batch=2)
    expected = attend(*arrays)
    assert_right(expected, *arrays)
    actual = attend(*arrays, padded=True)
    assert_same_bits(actual.out, expected.out)
    assert_same_bits(actual.lse, expected.lse)


@pytest.mark.promise("gpu-numbers-are-clamped")
def test_numbers_on_the_device_are_clamped():
    arrays = problem(1, 40, batch=3)
    actual = attend(
        *arrays, is_causal=True, query_offset=[2**40, 5, -(2**40)], kv_lengths=[10**12, 30, -7]
    )
    clamped = {"query_offset": np.array([2**29, 5, -(2**29)]), "kv_lengths": [40, 30, 0]}
    assert_right(actual, *arrays, is_causal=True, **clamped)


def test_a_number_on_the_device_means_the_same():
    arrays = problem(4, 300, group=2)
    options = {"is_causal": True, "query_offset": 250}
    assert_same_bits(attend(*arrays, on_device=True, **options).out, attend(*arrays, **options).out)


def test_no_keys():
    arrays = problem(2, 0, group=2)
    result = attend(*arrays)
    assert (result.out == 0).all()
    assert (result.lse == -np.inf).all()
    assert (result.flags == 0).all()


@pytest.mark.parametrize("more", [1, 12, 300])
@pytest.mark.parametrize("q_len", [1, 5])
def test_keys_that_are_hidden_change_no_bit(q_len, more):
    query, key, value = problem(q_len, 300, 128, group=3)
    options = {"is_causal": True, "query_offset": 300 - q_len}
    expected = attend(query, key, value, **options)
    assert_right(expected, query, key, value, **options)
    longer = [
        np.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)), constant_values=NAN) for x in (key, value)
    ]
    actual = attend(query, *longer, kv_lengths=[300], **options)
    assert_same_bits(actual.out, expected.out)
    assert_same_bits(actual.lse, expected.lse)
    assert (actual.flags == 0).all()


@pytest.mark.promise("gpu-bitwise")
def test_a_batch_element_alone_has_the_same_bits():
    query, key, value = problem(2, 300, 96, group=4, kv_heads=2, batch=3)
    lengths, offsets = np.array([300, 17, 260]), np.array([298, 15, 200])
    options = {"window": (150, 0)}
    together = attend(query, key, value, kv_lengths=lengths, query_offset=offsets, **options)
    for b in range(3):
        one = slice(b, b + 1)
        alone = attend(
            query[one],
            key[one, :, : lengths[b]],
            value[one, :, : lengths[b]],
            query_offset=int(offsets[b]),
            **options,
        )
        assert_same_bits(alone.out, together.out[one])
        assert_same_bits(alone.lse, together.lse[one])


def test_a_query_alone_has_the_same_bits():
    query, key, value = problem(4, 300, group=4)
    options = {"is_causal": True}
    together = attend(query, key, value, query_offset=254, **options)
    for i in range(4):
        alone = attend(query[:, :, i : i + 1], key, value, query_offset=254 + i, **options)
        assert_same_bits(alone.out, together.out[:, :, i : i + 1])


def test_what_no_row_sees_is_not_read():
    query, key, value = problem(1, 1000, group=4)
    key[:, :, :300] = value[:, :, :300] = NAN
    key[:, :, 701:] = value[:, :, 701:] = NAN
    options = {"window": (400, 0), "query_offset": 700}
    result = attend(query, key, value, **options)
    assert (result.flags == 0).all()
    assert np.isfinite(result.out.astype(np.float32)).all()
    assert (result.partial_lse[..., 3] == -np.inf).all()
    assert np.isnan(result.partial_out[..., 3, :]).all()  # as it was


def test_a_hidden_nan_stays_in_its_split_and_is_flagged():
    query, key, value = problem(2, 600)
    options = {"is_causal": True, "query_offset": 300}
    expected = attend(query, key, value, **options)
    value[:, :, 301] = NAN  # which the second query sees, the first does not
    result = attend(query, key, value, **options)
    assert_same_bits(result.partial_out[..., 0, :], expected.partial_out[..., 0, :])
    assert_same_bits(result.partial_lse, expected.partial_lse)
    assert np.isnan(result.out[0, 0, 1].astype(np.float32)).all()
    assert (result.flags == 1).all()


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_is_flagged(where):
    arrays = dict(zip(("query", "key", "value"), problem(40, 300, kv_heads=2), strict=True))
    arrays[where][0, 1, 20, 3] = NAN
    result = attend(**arrays, window=(2, 0), query_offset=0)
    rows = np.isfinite(result.out.astype(np.float32)).all(-1)
    assert rows[0, 0].all()
    if where == "value":  # a hidden value reaches all rows of its block
        assert not rows[0, 1].any()
        np.testing.assert_array_equal(result.flags, [[[0, 0, 0], [1, 1, 1]]])
    else:
        np.testing.assert_array_equal(
            np.flatnonzero(~rows[0, 1]), [20, 21, 22][: 1 + 2 * (where == "key")]
        )
        np.testing.assert_array_equal(result.flags, [[[0, 0, 0], [0, 1, 0]]])


def test_the_wider_row_tiles_are_right_too():
    # Of 3 row tiles, of which the last is part empty, and a head_dim that takes them by two.
    arrays = problem(6, 300, 128, group=7)
    assert_right(attend(*arrays), *arrays)


FAULTS = {
    "keys are not waited for": (
        "wait_oldest()\n            sync_warp()  # the keys",
        "sync_warp()  #",
    ),
    "values are not waited for": (
        "wait_oldest()\n            sync_warp()  # the values",
        "sync_warp()  #",
    ),
    "one copy too many may be away": ("wait_copies[2 * stages - 1]", "wait_copies[2 * stages]"),
    "wrong half of a matrix": ("((lane >> i32(3)) & i32(1)) << i32(4)", "(lane >> i32(4)) << i32(4)"),
    "the ring does not wrap": ("select(stage == ring + i32(ring_bytes), ring, stage)", "stage"),
    "refilled with the same keys": ("copy_key + i32(stages * WARPS * KEYS)", "copy_key"),
    "mask off by one": ("row_last[i] = end_key(query_number, offset", "row_last[i] = end_key(query_number + i32(1), offset"),
    "a split ends early": ("(own_split + i32(1)) * i32(SPLIT))", "own_split * i32(SPLIT) + i32(SPLIT - 1))"),
    "hidden values are copied": ("minimum(key + i32(i * copy_rows), end - i32(1))", "key + i32(i * copy_rows)"),
    "no rescale": ("            scale_sums(acc, rescale)\n", ""),
    "warps are added as they are": ("weight = ex2(tops[w] - level)", "weight = ex2(tops[w] - tops[w])"),
    "rows are heads first": ("own_head = row - query_number * group", "own_head = row - query_number"),
    "partial results unwritten are read": ("found != f32(LOWEST)", "own < splits"),
    "splits are weighted in base 2": ("(found - level) * f32(1 / LN2)", "(found - level)"),
    "a lane's columns are its neighbour's": ("at + i64(j * 128)", "at + i64(j * 64)"),
    "flags are not cleared": ("own < group * flag_tiles, flag", "own < i32(0), flag"),
}  # fmt: skip


def check(module):
    """Run what every fault must show in: several splits, rings that wrap, an edge, padding."""
    query, key, value = problem(3, 1100, 128, group=4)
    options = {"is_causal": True, "query_offset": 697, "kv_lengths": [699]}
    key[:, :, 700:] = value[:, :, 700:] = NAN
    result = attend(query, key, value, module=module, **options)
    key, value = np.nan_to_num(key), np.nan_to_num(value)
    assert_right(result, query, key, value, **options)


def test_without_a_fault():
    check(decode)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    old, new = FAULTS[name]
    module = with_fault(decode, old, new)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check(module)


def test_which_calls_fit():
    assert [decode.row_tiles_for(q, 4, 64) for q in (1, 4, 5, 8, 9, 16)] == [1, 1, 2, 2, 4, 4]
    assert [decode.row_tiles_for(16, 4, d) for d in (64, 96, 128, 256)] == [4, 2, 2, 1]
    assert [decode.splits_of(n) for n in (0, 1, 256, 257, 512)] == [1, 1, 1, 2, 2]
    assert decode.split_blocks(2, 8, 16, 1000, 4, 2) == 2 * 8 * 4 * 2
    assert decode.combine_blocks(2, 32, 3) == 192
    assert decode.workspace(2, 32, 3, 1000, 128) == (192 * 4 * 128, 192 * 4)
    with pytest.raises(ValueError, match="row_tiles must be"):
        decode.split("float16", 128, 4)


KERNELS = [(d, r) for d, most in decode.ROW_TILES.items() for r in (1, 2, 4) if r <= most]


@pytest.mark.parametrize(("head_dim", "row_tiles"), KERNELS)
def test_shared_memory_has_room_for_enough_blocks(head_dim, row_tiles):
    kernel = decode.split("float16", head_dim, row_tiles)
    whole = kernel.shared_bytes + 1024  # what a block takes beside its own
    assert whole <= 100 * 1024  # sm_89
    assert 2 * whole <= 164 * 1024  # sm_80
    assert kernel.blocks_per_sm * whole <= 228 * 1024  # sm_90
    in_flight = 2 * decode.WARPS * decode.ROW_TILES[head_dim] * decode.KEYS * 2 * head_dim
    assert in_flight >= 48 * 1024


def built(kernel, capability):
    binary = build(kernel, capability)
    if binary.registers is None:
        pytest.skip(f"no assembler: {binary.log}")
    return binary


@pytest.mark.promise("gpu-machine-code-is-tight")
@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "row_tiles", "softcapped"),
    [
        ((8, 0), "float16", 128, 1, False),
        ((8, 0), "bfloat16", 64, 4, True),
        ((8, 0), "float16", 256, 1, False),
        ((8, 9), "bfloat16", 96, 2, False),
        ((9, 0), "bfloat16", 128, 2, False),
        ((9, 0), "float16", 64, 4, False),
    ],
)
def test_the_machine_code(capability, dtype, head_dim, row_tiles, softcapped, tmp_path):
    kernel = decode.split(dtype, head_dim, row_tiles, softcapped)
    binary = built(kernel, capability)
    assert ".local" not in binary.ptx
    assert binary.spill_stores + binary.spill_loads <= 32
    assert binary.registers * kernel.threads * kernel.blocks_per_sm <= 65536
    found = sass.counts(sass.disassemble(binary.cubin, tmp_path))
    steps = head_dim // 16
    assert found["HMMA"] == found[f"HMMA.16816.F32{'.BF16' * (dtype == 'bfloat16')}"]
    assert found["HMMA"] == row_tiles * steps * 4
    assert found["LDSM"] == steps * (row_tiles + 2)  # queries, keys, values
    first_copies = 1 + 2 * decode.ROW_TILES[head_dim]  # queries, and the ring
    assert found["LDGSTS.E.BYPASS.128"] == found["LDGSTS"] == steps * (first_copies + 2)


def test_the_machine_code_of_combine():
    binary = built(decode.combine("float16", 256), (8, 0))
    assert ".local" not in binary.ptx
    assert binary.spill_stores + binary.spill_loads == 0
