# SPDX-License-Identifier: Apache-2.0
"""What Hopper (sm_90a) adds to `fastattn.cuda.ptx`: one intrinsic per PTX statement.

Called by the kernels `wgmma` and `wgmma_backward`; calls `ptx.op`. Three groups: asynchronous
matrix products of a warpgroup (wgmma), asynchronous copies (TMA) with the barriers that announce
them (mbarrier), and what warpgroups that do different work need (setmaxnreg, named barriers).

A wgmma statement covers a whole loop over k: fence, one wgmma per 16 of k, commit. Its result is
not there before `wgmma_wait`, which therefore takes the accumulators as operands.

Matrices in shared memory are boxes of 128-byte rows (64 values of 16 bits), swizzled as TMA's
128-byte mode writes them, each box on a multiple of 1024 bytes. Two ways to read one:

* k runs along the 128 bytes (K-major, the usual way for queries and keys): 16 of k are 32 bytes
  further, 64 of k one box further; `descriptor()`.
* k runs down the rows (MN-major, `a_trans` or `b_trans`, the usual way for values): 16 of k are
  2048 bytes further; columns beyond 64 lie one box further, `descriptor(leading=box bytes)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn.cuda.ptx import op

if TYPE_CHECKING:
    from collections.abc import Sequence

PTX_DTYPES = {"float16": "f16", "bfloat16": "bf16"}


def descriptor(leading: int = 16, stride: int = 1024) -> int:
    """Return the constant part of a shared memory matrix descriptor, 128-byte swizzle.

    The address of the matrix, divided by 16, is or-ed in by the kernel.

    Parameters
    ----------
    leading : int
        Bytes from one box of 64 columns to the next, where k runs down the rows (MN-major); not
        used for a K-major matrix.
    stride : int
        Bytes from one group of 8 rows to the next.
    """
    return (1 << 62) | ((stride >> 4) << 32) | ((leading >> 4) << 16)


def _step(name: str, source: str, step: int) -> str:
    if step % 16:
        raise ValueError(f"a descriptor moves in steps of 16 bytes, not by {step}")
    return f"add.s64 {name}, {source}, {step >> 4};"


def wgmma_shared(
    name: str,
    n: int,
    dtype: str,
    a_steps: Sequence[int],
    b_steps: Sequence[int],
    *,
    a_trans: bool = False,
    b_trans: bool = False,
    accumulate: bool = False,
) -> Any:
    """Make the intrinsic `name(d, d_offset, a, b)`: d (+)= A @ B.T, both in shared memory.

    Parameters
    ----------
    name : str
        Name of the intrinsic.
    n : int
        Columns of the product; it has 64 rows. d is a local array of float32, n / 2 per thread.
    dtype : {"float16", "bfloat16"}
        Of A and B.
    a_steps, b_steps : sequence of int
        Where 16 of k begin, in bytes from the address in the descriptors a and b.
    a_trans, b_trans : bool
        Whether k runs down the rows.
    accumulate : bool
        Add to d; else overwrite it.
    """
    kind, mode = PTX_DTYPES[dtype], "update" if accumulate else "out"
    lines = [".reg .pred first, next; .reg .b64 da, db;"]
    lines += [f"setp.ne.b32 first, {int(accumulate)}, 0; setp.ne.b32 next, 1, 0;"]
    lines += ["wgmma.fence.sync.aligned;"]
    for k, (a, b) in enumerate(zip(a_steps, b_steps, strict=True)):
        lines += [_step("da", "%a", a), _step("db", "%b", b)]
        lines += [
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} %d, da, db, "
            f"{'next' if k else 'first'}, 1, 1, {int(a_trans)}, {int(b_trans)};"
        ]
    lines += ["wgmma.commit_group.sync.aligned;"]
    operands = f"d:{mode}:f{n // 2} a:l b:l"
    return op(name, "{ " + " ".join(lines) + " }", operands, memory=True, family="wgmma")


def wgmma_registers(
    name: str,
    n: int,
    dtype: str,
    b_steps: Sequence[int],
    *,
    b_trans: bool = False,
    accumulate: bool = True,
) -> Any:
    """Make the intrinsic `name(d, d_offset, a, a_offset, b)`: d (+)= A @ B.T, A in registers.

    a is a local array of int32, four pairs per 16 of k: the layout in which a product's
    accumulators lie, rounded and packed in pairs. The other parameters are those of `wgmma_shared`.
    """
    kind, mode = PTX_DTYPES[dtype], "update" if accumulate else "out"
    lines = [".reg .pred first, next; .reg .b64 db;"]
    lines += [f"setp.ne.b32 first, {int(accumulate)}, 0; setp.ne.b32 next, 1, 0;"]
    lines += ["wgmma.fence.sync.aligned;"]
    for k, b in enumerate(b_steps):
        lines += [_step("db", "%b", b)]
        lines += [
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "
            f"%d, %a[{4 * k}:{4 * k + 4}], db, {'next' if k else 'first'}, 1, 1, {int(b_trans)};"
        ]
    lines += ["wgmma.commit_group.sync.aligned;"]
    operands = f"d:{mode}:f{n // 2} a:in:r{4 * len(b_steps)} b:l"
    return op(name, "{ " + " ".join(lines) + " }", operands, memory=True, family="wgmma")


def wgmma_wait(name: str, pending: int, *arrays: str) -> Any:
    """Make the intrinsic `name(array, offset, ...)`: wait until at most `pending` products run.

    `arrays` says what must not be touched before, accumulators ("f64": 64 float32) and operands in
    registers ("r32": 32 packed pairs).
    """
    operands = " ".join(f"d{i}:update:{array}" for i, array in enumerate(arrays))
    text = f"wgmma.wait_group.sync.aligned {pending};"
    return op(name, text, operands, memory=True, family="wgmma_wait", pending=pending)


# ---- barriers in shared memory: a phase ends when all arrived and all announced bytes are there
mbarrier_init = op(
    "mbarrier_init", "mbarrier.init.shared::cta.b64 [%b], %n;", "b:r n:r", memory=True
)
mbarrier_arrive = op(
    "mbarrier_arrive", "mbarrier.arrive.shared::cta.b64 _, [%b];", "b:r", memory=True
)
mbarrier_expect = op(  # arrives, and announces n bytes
    "mbarrier_expect",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], %n;",
    "b:r n:r",
    memory=True,
)
mbarrier_wait = op(  # until the phase of that parity has ended; parity 1 passes a new barrier
    "mbarrier_wait",
    "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%b], %parity; "
    "@done bra DONE; bra AGAIN; DONE: }",
    "b:r parity:r",
    memory=True,
)
fence_mbarrier_init = op("fence_mbarrier_init", "fence.mbarrier_init.release.cluster;", memory=True)
fence_proxy_async = op(  # what was written to shared memory is seen by wgmma and TMA
    "fence_proxy_async", "fence.proxy.async.shared::cta;", memory=True
)

# ---- asynchronous copies into shared memory
tma_prefetch = op("tma_prefetch", "prefetch.tensormap [%map];", "map:l", memory=True)
tma_load_4d = op(
    "tma_load_4d",
    "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[%s], [%map, {%x, %y, %z, %w}], [%b];",
    "s:r map:l x:r y:r z:r w:r b:r",
    memory=True,
)
bulk_load = op(  # n bytes from address g; both multiples of 16
    "bulk_load",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%g], %n, [%b];",
    "s:r g:l n:r b:r",
    memory=True,
)

# ---- warpgroups that do different work: barrier i (1 to 15) of n threads
named_sync = op("named_sync", "bar.sync %i, %n;", "i:r n:r", memory=True)
named_arrive = op("named_arrive", "bar.arrive %i, %n;", "i:r n:r", memory=True)
named_or = op(  # a named_sync that returns whether c was not 0 in any thread
    "named_or",
    "{ .reg .pred p, q; setp.ne.b32 p, %c, 0; "
    "bar.red.or.pred q, %i, %n, p; selp.b32 %d, 1, 0, q; }",
    "d:return:r i:r n:r c:r",
    memory=True,
)
# How many registers a thread of the warpgroup may use from here on.
take_registers = {
    n: op(f"take_registers_{n}", f"setmaxnreg.inc.sync.aligned.u32 {n};", family="registers")
    for n in (160, 224, 240)
}
give_registers = {
    n: op(f"give_registers_{n}", f"setmaxnreg.dec.sync.aligned.u32 {n};", family="registers")
    for n in (24, 32, 56)
}

# ---- shared and global memory
add_shared_int32 = op(  # atomic; returns what was there before
    "add_shared_int32", "atom.shared.add.u32 %d, [%s], %v;", "d:return:r s:r v:r", memory=True
)
add_float32_2 = op(  # x, y to two neighbouring float32, without returning
    "add_float32_2",
    "red.relaxed.gpu.global.add.v2.f32 [%g], {%x, %y};",
    "g:l x:f y:f",
    memory=True,
)
