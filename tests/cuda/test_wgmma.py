# SPDX-License-Identifier: Apache-2.0
"""The forward kernel for Hopper: run on the CPU by the emulator, and compiled for sm_90a.

Results are held against float64. Faults planted in the kernel's source must all be found, so that
the tests are known to see such things as a missing wait.
"""
# ruff: noqa: E501 - the tables have a line per case

import functools
import math
import re
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda")

from fastattn import reference
from fastattn.cuda import _build
from fastattn.cuda.kernels import MOST_SIDE, wgmma
from tests.cuda import emulator, sass
from tests.cuda.cases import with_fault
from tests.cuda.emulator_sm90 import Deadlock, Fault, TensorMap, Timing, run
from tests.support.correctness import assert_same_bits
from tests.support.problems import make_problem

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LOG2E = 1 / math.log(2)
UNTOUCHED = 7  # in flags before the kernel runs
HURRIED = Timing(early_products=True)
RANDOM = Timing(seed=0)


@dataclass
class Call:
    """One call: arrays (batch, heads, rows, head_dim), and which keys a row sees."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    left: int = MOST_SIDE
    right: int = MOST_SIDE
    offset: int = 0
    length: int | None = None
    offsets: list[int] | None = None  # in the device's memory
    lengths: list[int] | None = None
    softcap: float | None = None
    rows_first: bool = (
        False  # the result's heads beside each other, as in (batch, rows, heads, ...)
    )
    flagged: bool = True
    not_finite: tuple[tuple[int, int, int], ...] = ()  # (batch element, head, query tile)
    out: np.ndarray = field(init=False)
    lse: np.ndarray = field(init=False)
    flags: np.ndarray = field(init=False)

    @property
    def dtype(self):
        return self.query.dtype.name

    @property
    def inputs(self):
        return self.query, self.key, self.value

    def run(self, module=wgmma, blocks=3, section=None, timing=None):
        """Let the emulator run the kernel."""
        batch, heads, q_len, head_dim = self.query.shape
        kv_heads, kv_len = self.key.shape[1:3]
        kernel = module.forward(self.dtype, head_dim, self.softcap is not None)
        tile = module.TILES[head_dim]
        memory = emulator.Memory()
        shape = (batch, q_len, heads, head_dim) if self.rows_first else self.query.shape
        stored = np.full(shape, np.nan, self.query.dtype)
        self.out = stored.transpose(0, 2, 1, 3) if self.rows_first else stored
        self.lse = np.full((batch, heads, q_len), np.nan, np.float32)
        self.flags = np.full((batch, heads, -(-q_len // tile.queries)), UNTOUCHED, np.int32)
        plan = module.plan(batch, heads, heads // kv_heads, q_len, kv_len, head_dim, blocks)
        scale = 1 / math.sqrt(head_dim)
        factors = (scale * LOG2E, 0)
        if self.softcap is not None:
            factors = (self.softcap * LOG2E, 2 * LOG2E * scale / self.softcap)
        own = self.lengths, self.offsets
        arguments = (
            TensorMap(self.query, tile.queries),
            TensorMap(self.key, tile.keys),
            TensorMap(self.value, tile.keys),
            *map(memory.place, (stored, self.lse)), memory.place(self.flags) if self.flagged else 0,
            *(0 if x is None else memory.place(np.array(x, np.int64)) for x in own),
            q_len, kv_len, heads, heads // kv_heads, self.left, self.right,
            kv_len if self.length is None else self.length, self.offset,
            *(stride // 2 for stride in self.out.strides[:3]), plan.pairs, section or plan.section,
            *map(np.float32, factors),
        )  # fmt: skip
        assert len(arguments) == len(kernel.signature)
        run(kernel, blocks, arguments, memory, timing)
        return self

    def options(self):
        """Return the same as arguments of the reference."""
        batch, kv_len = self.key.shape[0], self.key.shape[2]
        sides = (None if side == MOST_SIDE else side for side in (self.left, self.right))
        lengths = self.lengths or [kv_len if self.length is None else self.length] * batch
        return {
            "window": tuple(sides),
            "query_offset": np.array(self.offsets or [self.offset] * batch),
            "kv_lengths": np.clip(lengths, 0, kv_len),
            "softcap": self.softcap,
        }

    @functools.cached_property
    def expected(self):
        """Return out and lse in float64, and how far off the plain formula is.

        That is the formula in the same precision, its probabilities rounded too.
        """
        wide = [np.where(np.isfinite(x), x, 0).astype(np.float64) for x in self.inputs]
        truth, lse = reference.attention(*wide, **self.options(), return_lse=True)
        query, key, value = (x.astype(np.float32) for x in wide)
        probs = reference.attention_weights(
            query, key, compute_dtype=np.float32, **self.options()
        ).astype(self.query.dtype)
        value = value.repeat(probs.shape[1] // value.shape[1], axis=1)
        plain = (probs.astype(np.float32) @ value).astype(self.query.dtype)
        return truth, lse, np.abs(plain.astype(np.float64) - truth).max()

    def errors(self):
        """Return the errors of out and lse in units of what is allowed.

        Allowed is FlashAttention's rule: twice the error of the plain formula, and one rounding of
        the largest result. Tiles that must be flagged may hold anything.
        """
        truth, lse, plain_error = self.expected
        size = wgmma.TILES[self.query.shape[-1]].queries
        counts = ~np.repeat(self.expected_flags == 1, size, axis=2)[:, :, : lse.shape[2]]
        seen = counts & np.isfinite(lse)
        if not np.array_equal(self.lse[counts & ~seen], lse[counts & ~seen]):
            return np.inf, np.inf
        rounding = float(ml_dtypes.finfo(self.query.dtype).eps) * np.abs(truth).max()
        off = np.abs(self.out.astype(np.float64) - truth)[counts].max()
        lse_off = np.abs(self.lse[seen] - lse[seen]).max(initial=0)
        return off / max(2 * plain_error + rounding, 1e-30), lse_off / 4e-6

    @property
    def expected_flags(self):
        """Return 1 for the query tiles that are said to be not finite, else 0."""
        flags = np.zeros_like(self.flags)
        for place in self.not_finite:
            flags[place] = 1
        return flags if self.flagged else np.full_like(flags, UNTOUCHED)

    def is_right(self):
        """Tell whether out, lse and flags are right."""
        # NaN is not.
        return bool(np.max(self.errors()) <= 1) and np.array_equal(self.flags, self.expected_flags)

    def assert_right(self):
        """Assert that out, lse and flags are right."""
        np.testing.assert_array_equal(self.flags, self.expected_flags)
        assert np.max(self.errors()) <= 1


def call(q_len, kv_len, head_dim=128, heads=1, kv_heads=None, batch=1, dtype="float16", **options):
    """Return a call with random arrays."""
    arrays = make_problem(
        q_len, kv_len, head_dim, heads=heads, kv_heads=kv_heads, batch=(batch,), dtype=DTYPES[dtype]
    )
    return Call(*arrays, **options)


# ---- results


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize("timing", [Timing(), HURRIED, RANDOM], ids=["late", "hurried", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", wgmma.TILES)
def test_plain(dtype, head_dim, timing):
    call(200, 300, head_dim, heads=2, dtype=dtype).run(timing=timing).assert_right()


@pytest.mark.promise("gpu-means-the-same")
@pytest.mark.parametrize(
    "options",
    [
        dict(right=0),
        dict(right=0, offset=160),
        dict(right=0, offset=-70),
        dict(right=0, offset=-1000),
        dict(left=0, right=0),
        dict(left=100, right=20, offset=100),
        dict(left=40),
        dict(left=128, offset=500),
        dict(left=10, offset=-150),
        dict(right=130, offset=3),
        dict(left=17, right=0, offset=2**29),
        dict(length=0),
        dict(length=129),
        dict(length=256, right=0, offset=160),
        dict(length=10, left=30),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "head_dim"), [("float16", 128), ("bfloat16", 64)])
def test_which_keys_a_row_sees(dtype, head_dim, options):
    call(200, 360, head_dim, dtype=dtype, **options).run(blocks=1).assert_right()


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (129, 1), (1, 129), (64, 128), (193, 257)])
@pytest.mark.parametrize("head_dim", wgmma.TILES)
def test_any_number_of_rows(q_len, kv_len, head_dim):
    call(q_len, kv_len, head_dim).run().assert_right()


@pytest.mark.parametrize("rows_first", [False, True])
def test_each_batch_element_has_its_own_numbers_of_the_device(rows_first):
    each = call(
        140,
        150,
        heads=2,
        batch=4,
        right=0,
        lengths=[150, 10**12, -5, 70],
        offsets=[10, -(10**12), 0, -30],
        rows_first=rows_first,
    )
    each.run()
    each.offsets = [10, -(2**29), 0, -30]  # what it comes to
    each.assert_right()


@pytest.mark.parametrize("head_dim", wgmma.TILES)
def test_query_heads_share_heads_of_keys(head_dim):
    call(70, 140, head_dim, heads=6, kv_heads=2, batch=2).run(blocks=5).assert_right()


def test_arrays_of_any_strides():
    each = call(140, 150, heads=3, batch=2, rows_first=True)
    rows_first = lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)  # noqa: E731
    each.query, each.key, each.value = map(rows_first, each.inputs)
    each.run().assert_right()


@pytest.mark.parametrize("head_dim", wgmma.TILES)
@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_softcap(head_dim, softcap):
    each = call(130, 200, head_dim, dtype="bfloat16", softcap=softcap, right=0, offset=60)
    each.run().assert_right()


@pytest.mark.promise("gpu-bitwise")
@pytest.mark.parametrize("section", [1, 2, 3, 5])
def test_order_and_number_of_blocks_change_nothing(section):
    each = call(260, 200, 64, heads=5, right=0).run(blocks=1, section=section)
    each.assert_right()
    expected = each.out, each.lse
    for blocks in (4, 11):  # of 10 tiles
        each.run(blocks=blocks, section=section).assert_right()
        assert_same_bits((each.out, each.lse), expected)


def test_flags_are_optional():
    call(100, 100, flagged=False).run().assert_right()


def not_finite(hidden):
    """Return a call with rows that are not finite, of 2 heads with 3 query tiles each.

    NaN is in a value that the last tile's rows touch, and see or not, and in a query of another
    tile's first warpgroup.
    """
    each = call(300, 300, heads=2, right=0, not_finite=((0, 0, 1), (0, 1, 2)))
    each.value[0, 1, 260:, 3] = np.nan
    each.query[0, 0, 130] = np.nan
    each.length = 260 if hidden else None
    return each


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "seen"])
def test_flags_say_where_a_row_is_not_finite(hidden):
    each = not_finite(hidden).run(timing=RANDOM)
    each.assert_right()
    assert np.isnan(each.out[0, 1, 260:, 3]).all()
    assert np.isfinite(each.out[0, 1, :, 4:]).all()


def test_plan():
    # 4 query heads to each head of keys, whose keys and values are 4 MiB
    assert wgmma.plan(2, 32, 4, 8192, 8192, 128, 132) == (132, 64, 32)
    assert wgmma.plan(1, 1, 1, 200, 0, 128, 132) == (2, 1, 1)
    assert wgmma.plan(1, 3, 1, 200, 2**24, 64, 132) == (6, 3, 1)


# ---- machine code

HGMMAS = {64: (24, 12), 128: (32, 16)}  # in the kernel, and in the loop over key tiles
LOADS = {64: 3, 128: 6}  # of 64 columns of queries, keys and values
EXPONENTIALS = 64 + 2  # of a tile's scores and of two maxima, per thread
LOOP_LIMIT = {64: 440, 128: 490}  # instructions, beside those of the mask


@functools.cache
def built(dtype, head_dim, softcapped):
    binary = _build.build(wgmma.forward(dtype, head_dim, softcapped), _build.HOPPER)
    if binary.registers is None:
        pytest.skip(binary.log)
    return binary


VARIANTS = [
    *(("float16", head_dim, False) for head_dim in wgmma.TILES),
    *(("bfloat16", head_dim, True) for head_dim in wgmma.TILES),
]


@pytest.mark.promise("gpu-machine-code-is-tight")
@pytest.mark.parametrize(("dtype", "head_dim", "softcapped"), VARIANTS)
def test_everything_is_in_registers(dtype, head_dim, softcapped):
    binary = built(dtype, head_dim, softcapped)
    tile = wgmma.TILES[head_dim]
    groups = tile.queries // 64
    assert ".local" not in binary.ptx
    assert (binary.spill_stores, binary.spill_loads, binary.stack_bytes) == (0, 0, 0)
    assert "wgmma.mma_async" not in binary.log  # a warning that the products are serialised
    # What the warpgroups take from here on is what the block was started with.
    assert binary.registers == 2**16 // binary.threads // 8 * 8
    taken = groups * tile.more_registers + tile.fewer_registers
    assert taken <= (groups + 1) * binary.registers
    assert binary.shared_bytes <= 227 * 1024


@pytest.mark.parametrize(("dtype", "head_dim", "softcapped"), VARIANTS)
def test_instructions(dtype, head_dim, softcapped, tmp_path):
    instructions = sass.disassemble(built(dtype, head_dim, softcapped).cubin, tmp_path)
    counts = sass.counts(instructions)
    everywhere, in_loop = HGMMAS[head_dim]
    assert counts["HGMMA"] == everywhere
    assert counts["UTMALDG.4D"] == counts["UTMALDG"] == LOADS[head_dim]
    assert counts["USETMAXREG"] == 2
    assert counts["SYNCS"] >= 8 + 6 + 5  # initialised, arrived at, waited for
    assert counts["LDL"] == counts["STL"] == counts["CALL"] == 0
    loop = loop_without_mask(instructions, in_loop)
    # QK of a tile is in flight with PV of the one before: three waits would serialise them.
    assert sum("DEPBAR" in line for line in loop) == 2
    if not softcapped:
        assert sum("MUFU" in line for line in loop) == EXPONENTIALS
        assert len(loop) <= LOOP_LIMIT[head_dim]


def loop_without_mask(instructions, products):
    """Return the instructions of the smallest loop with so many HGMMA.

    Those that its longest forward branch passes by are not counted: the mask's.
    """
    lines, labels = [], {}
    for line in instructions.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(lines)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            lines.append(line)
    jumps = [
        (at, labels[match[1]])
        for at, line in enumerate(lines)
        if (match := re.search(r"BRA.*?(\.L_x_\d+)", line)) and match[1] in labels
    ]
    loops = [
        (at - target, target, at)
        for at, target in jumps
        if target <= at and sum("HGMMA" in line for line in lines[target : at + 1]) == products
    ]
    _, begin, end = min(loops)
    _, mask, after = max((to - at, at, to) for at, to in jumps if begin <= at < to <= end)
    return lines[begin : mask + 1] + lines[after : end + 1]


# ---- faults: (what is planted, text, its replacement)

IN_LOOP = "\n" + " " * 20  # where statements of the loop over key tiles begin
RELEASE_Q = "release(shared, q_empty, i32(0), own_thread)"
RELEASE_K = "release(shared, k_empty, stage, own_thread)"
RELEASE_V = "release(shared, v_empty, v_stage, own_thread)"
WAIT_S, WAIT_SUMS = "wait_scores_only(s, 0)", "wait_sums(acc, 0, p, 0)"
FAULTS = {
    "no wait for values": ("mbarrier_wait(shared + i32(v_full) + (v_stage << i32(3)), v_parity)", "pass"),
    "no wait for the last values": ("mbarrier_wait(shared + i32(v_full) + (stage << i32(3)), parity_of(turn))", "pass"),
    "no wait for keys": ("mbarrier_wait(shared + i32(k_full) + (stage << i32(3)), parity_of(turn))", "pass"),
    "no wait for queries": ("mbarrier_wait(shared + i32(q_full), q_parity)", "pass"),
    "queries' parity stays": ("if sees:\n                q_parity ^= i32(1)", "if sees:\n                pass"),
    "wrong parity": ("i32(turn >> i32(STAGE_BITS)) & i32(1)", "i32(turn >> i32(STAGE_BITS)) & i32(0)"),
    "turns are not carried over": ("stage, own_thread)\n                turn = i32(turn + i32(1))", "stage, own_thread)"),
    "loads do not wait for their place": ("mbarrier_wait(shared + i32(empty) + (stage << i32(3)), parity_of(turn) ^ i32(1))", "pass"),
    "values released before they were multiplied": (WAIT_SUMS + IN_LOOP + RELEASE_V, RELEASE_V + IN_LOOP + WAIT_SUMS),
    "keys released before they were multiplied": (WAIT_S + IN_LOOP + RELEASE_K, RELEASE_K + IN_LOOP + WAIT_S),
    "queries released before they were multiplied": (
        "mbarrier_wait(shared + i32(q_full), q_parity)\n",
        "mbarrier_wait(shared + i32(q_full), q_parity)\n                " + RELEASE_Q + "\n",
    ),
    "values never released": (RELEASE_V, "pass"),
    "queries never released": (RELEASE_Q, "pass"),
    "too few bytes announced": ("mbarrier_expect(barrier, k_bytes)", "mbarrier_expect(barrier, 64)"),
    "values' boxes not where the descriptor says": ("descriptor(leading=k_box)", "descriptor()"),
    "steps in the swizzled rows": ("k // 4 * k_box + k % 4 * 32", "k // 4 * k_box + k % 4 * 64"),
    "boxes of keys in the wrong order": ("i32(at + p * k_box)", "i32(at + (1 - p) * k_box)"),
    "swizzle not aligned": (" + i32(1023)) & i32(-1024)", ")"),
    "rows of the first warpgroup": ("multiplier_row * i32(128)", "multiplier_row * i32(0)"),
    "first key off by one": ("= first_key(row, own.offset, call.left)", "= first_key(row, own.offset, call.left) + i32(1)"),
    "last key off by one": ("= end_key(row, own.offset, call.right, own.length)", "= end_key(row, own.offset, call.right, own.length) + i32(1)"),
    "mask moved": ("start + own_column)", "start + own_column + i32(1))"),
    "no mask at the first edge": ("if start < all_from or", "if"),
    "no mask at the last edge": ("or start + i32(k_tile) > all_to", ""),
    "mask of the wrong rows": ("first_key(first_row + i32(63),", "first_key(first_row,"),
    "one key tile too few": ("i32(end // i32(k_tile)) - i32(1)", "i32(end // i32(k_tile)) - i32(2)"),
    "sums not scaled": ("scale_sums(acc, rows.rescale)" + IN_LOOP, ""),
    "softmax before the wait": (WAIT_S, "pass"),
    "sums before the wait": (WAIT_SUMS + IN_LOOP + RELEASE_V, RELEASE_V),
    "probabilities overwritten": (
        WAIT_SUMS + IN_LOOP + RELEASE_V,
        "to_pairs(s, 0, p)" + IN_LOOP + WAIT_SUMS + IN_LOOP + RELEASE_V,
    ),
    "no turn given": ("named_arrive(next_order, 256)" + IN_LOOP, ""),
    "no first turn": ("named_arrive(next_order, 256)  # the first warpgroup begins", "pass"),
    "last turn not taken": ("named_sync(order, 256)  # the last", "pass  # the last"),
    "stores of other threads": ("i64((lane & i32(3)) << i32(4))", "i64((lane & i32(1)) << i32(4))"),
    "words not exchanged": ("exchange_int32(select(high, xy_right, zw_right), 2)", "xy_right"),
    "stores beyond the rows": ("store_16_if(row < call.q_len,", "store_16_if(row < call.q_len + i32(1),"),
    "flags counted in one word": ("+ (q_parity << i32(2))", ""),
    "flags kept": ("add_shared_int32(word, -count)", "pass"),
    "flags of one warpgroup": ("if (count & i32(255)) == i32(multipliers):", "if True:"),
}  # fmt: skip
SCHEDULES = (Timing(), HURRIED, *(Timing(slow=i) for i in range(3)), RANDOM)


@functools.cache
def edges():
    """Return a call that has what a fault may spoil.

    Both edges of a window cut tiles, and a query tile has key tiles without an edge; tiles follow
    each other in a block, and keys are hidden by the length.
    """
    return call(340, 600, heads=2, left=330, right=90, offset=130, length=560)


def is_found(module, each, timing):
    """Tell whether a run goes wrong."""
    try:
        return not each.run(module, blocks=1, timing=timing).is_right()
    except (Deadlock, Fault, AssertionError, IndexError, KeyError):
        return True


@pytest.mark.parametrize("each", [edges(), not_finite(True)], ids=["edges", "not finite"])
def test_nothing_is_found_where_nothing_is_planted(each):
    assert not any(is_found(wgmma, each, timing) for timing in SCHEDULES)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    module = with_fault(wgmma, *FAULTS[name])
    each = not_finite(True) if name.startswith("flags") else edges()
    assert any(is_found(module, each, timing) for timing in SCHEDULES)
