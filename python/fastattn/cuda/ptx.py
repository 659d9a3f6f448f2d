# SPDX-License-Identifier: Apache-2.0
"""PTX statements as functions that Numba kernels call: one line each.

`op` makes an intrinsic of a statement. Its operands are scalars, or runs of neighbouring elements
of a `cuda.local.array`, passed as (array, offset); with constant offsets in unrolled loops these
arrays become registers. Used by the kernels for tensor cores, which Numba has no names for.

Meanings: https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

# One letter says both PTX's register class and the type: f float32, r int32, l int64, h int16.
NUMBA = {"f": types.float32, "r": types.int32, "l": types.int64, "h": types.int16}
LLVM = {"f": ir.FloatType(), "r": ir.IntType(32), "l": ir.IntType(64), "h": ir.IntType(16)}
BOOL = ir.IntType(1)
PLACEHOLDER = re.compile(r"%([a-z]\w*)(?:\[(\d+):(\d+)\])?")


@dataclass(frozen=True)
class Operand:
    """One operand of a statement."""

    name: str
    kind: str  # scalar, return, in, out, update; the last three are elements of a local array
    letter: str
    count: int

    @property
    def is_array(self) -> bool:
        """Whether the function takes (array, offset) for it."""
        return self.kind in ("in", "out", "update")

    @property
    def is_read(self) -> bool:
        """Whether it is an input of its own, not tied to an output."""
        return self.kind in ("scalar", "in")

    @property
    def is_written(self) -> bool:
        """Whether the statement gives it a value."""
        return self.kind in ("return", "out", "update")


@dataclass(frozen=True)
class Statement:
    """What a function of `op` stands for; an emulator looks at it."""

    name: str
    text: str
    operands: tuple[Operand, ...]
    family: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def operand(text: str) -> Operand:
    """Parse NAME:LETTER, NAME:return:LETTER or NAME:(in|out|update):LETTER COUNT."""
    name, *kind, last = text.split(":")
    return Operand(name, kind[0] if kind else "scalar", last[0], int(last[1:] or 1))


def op(
    name: str,
    text: str,
    operands: str = "",
    *,
    volatile: bool = True,
    memory: bool = False,
    family: str | None = None,
    **facts: Any,
) -> Any:
    """Make a function of a PTX statement.

    Parameters
    ----------
    name : str
        The function's name.
    text : str
        PTX, with %NAME for an operand (an array as {r0,r1,...}) and %NAME[i:j] for a part of one.
    operands : str
        As `operand` parses them, with spaces between.
    volatile : bool
        False: the result depends on the operands alone, so that unused ones may be dropped.
    memory : bool
        Other reads and writes of memory stay on their side of it.
    family, **facts
        What an emulator must know of a statement that was made for a shape or a dtype.

    Returns
    -------
    Numba intrinsic, with the attribute `statement`
    """
    parsed = tuple(map(operand, operands.split()))
    written = [x for x in parsed if x.is_written]
    places: dict[str, range] = {}
    count = 0
    for x in written + [x for x in parsed if x.is_read]:
        places[x.name] = range(count, count + x.count)
        count += x.count
    by_name = {x.name: x for x in parsed}

    def placed(match: re.Match[str]) -> str:
        numbers = places[match[1]]
        if match[2] is not None:
            numbers = numbers[int(match[2]) : int(match[3])]
        if not by_name[match[1]].is_array:
            return f"${numbers[0]}"
        return "{" + ",".join(f"${i}" for i in numbers) + "}"

    template = PLACEHOLDER.sub(placed, text)
    outputs = [x.letter for x in written for _ in range(x.count)]
    constraints = ["=" + letter for letter in outputs]
    constraints += [x.letter for x in parsed if x.is_read for _ in range(x.count)]
    # An update's value comes in the register that it leaves in.
    constraints += [str(i) for x in parsed if x.kind == "update" for i in places[x.name]]
    constraints += ["~{memory}"] if memory else []

    def typed(*given: Any) -> tuple[Any, Any]:
        kinds = iter(given)
        arguments: list[Any] = []
        result = types.void
        for x in parsed:
            if x.kind == "return":
                result = NUMBA[x.letter]
            elif x.is_array:
                arguments += [next(kinds), types.int32]
                next(kinds)
            else:
                next(kinds)
                arguments.append(NUMBA[x.letter])
        return result(*arguments), generate

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pairs = iter(zip(values, signature.args, strict=True))
        inputs: list[Any] = []
        tied: list[Any] = []
        stores: list[tuple[Operand, list[Any]]] = []
        for x in parsed:
            if x.kind == "scalar":
                inputs.append(next(pairs)[0])
            elif x.is_array:
                (array, kind), (offset, _) = next(pairs), next(pairs)
                data = context.make_array(kind)(context, builder, array).data
                elements = [
                    builder.gep(data, [builder.add(offset, LLVM["r"](i))], inbounds=True)
                    for i in range(x.count)
                ]
                if x.kind != "out":
                    loads = [builder.load(element) for element in elements]
                    (inputs if x.kind == "in" else tied).extend(
                        v if v.type == LLVM[x.letter] else builder.bitcast(v, LLVM[x.letter])
                        for v in loads
                    )
                if x.is_written:
                    stores.append((x, elements))
        kinds = [LLVM[letter] for letter in outputs]
        returned: Any = ir.VoidType()
        if kinds:
            returned = kinds[0] if len(kinds) == 1 else ir.LiteralStructType(kinds)
        called = ir.FunctionType(returned, [v.type for v in inputs + tied])
        assembly = ir.InlineAsm(called, template, ",".join(constraints), side_effect=volatile)
        # What all threads of a warp do together must not move into, or out of, a branch.
        attributes = ("convergent",) if volatile or ".sync" in text else ()
        result = builder.call(assembly, inputs + tied, attrs=attributes)
        parts = [result] if len(kinds) == 1 else []
        if len(kinds) > 1:
            parts = [builder.extract_value(result, i) for i in range(len(kinds))]
        for x, elements in stores:
            for element, i in zip(elements, places[x.name], strict=True):
                v = parts[i]
                if v.type != element.type.pointee:
                    v = builder.bitcast(v, element.type.pointee)
                builder.store(v, element)
        for x in written:
            if x.kind == "return":
                return parts[places[x.name][0]]
        return context.get_dummy_value()

    taken = [
        y for x in parsed if x.kind != "return" for y in (x.name, f"{x.name}_at")[: 1 + x.is_array]
    ]
    statement = Statement(name, text, parsed, family or name, facts)
    return _intrinsic(name, taken, typed, statement)


def _intrinsic(name: str, parameters: list[str], typed: Any, statement: Statement) -> Any:
    """Return Numba's intrinsic, which wants a function with these parameters."""
    listed = ", ".join(parameters)
    scope = {"typed": typed}
    exec(f"def {name}(context, {listed}):\n    return typed({listed})", scope)
    function = intrinsic(scope[name])
    function.statement = statement
    return function


def _builtin(name: str, parameters: str, typed: Any) -> Any:
    """Make a function that LLVM has instructions for."""
    return _intrinsic(name, parameters.split(), typed, Statement(name, "", (), name))


# Choices without a branch. A kernel has no `if` on what differs between the threads of a warp, so
# that it can be run on vectors of threads too.


def _select(_condition: Any, x: Any, y: Any) -> tuple[Any, Any]:
    kind = types.float32 if types.float32 in (x, y) else types.int32

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.select(_bit(builder, values[0]), *values[1:])

    return kind(types.boolean, kind, kind), generate


def _extreme(sign: str) -> Any:
    def typed(x: Any, y: Any) -> tuple[Any, Any]:
        if types.float32 in (x, y):
            return types.float32(types.float32, types.float32), of_floats
        kind = types.int64 if types.int64 == x == y else types.int32
        return kind(kind, kind), of_integers

    def of_integers(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.select(builder.icmp_signed(sign, *values), *values)

    def of_floats(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(LLVM["f"], [LLVM["f"]] * 2)
        text = f"{'max' if sign == '>' else 'min'}.f32 $0, $1, $2;"
        return builder.call(ir.InlineAsm(kind, text, "=f,f,f"), values)

    return typed


def _both(_x: Any, _y: Any) -> tuple[Any, Any]:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.and_(*(_bit(builder, value) for value in values))

    return types.boolean(types.boolean, types.boolean), generate


def _bit(builder: Any, condition: Any) -> Any:
    return condition if condition.type == BOOL else builder.trunc(condition, BOOL)


def _elect(_condition: Any) -> tuple[Any, Any]:
    return types.boolean(types.boolean), lambda _context, _builder, _signature, values: values[0]


def _shared_address(array: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        if data.type.addrspace == 0:
            data = builder.addrspacecast(data, ir.PointerType(data.type.pointee, addrspace=3))
        return builder.ptrtoint(data, LLVM["r"])

    return types.int32(array), generate


select = _builtin("select", "condition x y", _select)  # of two float32 or two int32
minimum = _builtin("minimum", "x y", _extreme("<"))
maximum = _builtin("maximum", "x y", _extreme(">"))  # of floats: the other one, if one is NaN
both = _builtin("both", "x y", _both)
elect = _builtin("elect", "condition", _elect)  # marks an `if` that one thread of the warp enters
shared_address = _builtin("shared_address", "array", _shared_address)
uniform = op(
    "uniform", "shfl.sync.idx.b32 %d, %x, 0, 0x1f, 0xffffffff;", "d:return:r x:r"
)  # the same in all threads of the warp, and known to be so

# Numbers.
ex2 = op("ex2", "ex2.approx.ftz.f32 %d, %x;", "d:return:f x:f", volatile=False)
lg2 = op("lg2", "lg2.approx.ftz.f32 %d, %x;", "d:return:f x:f", volatile=False)
rcp = op("rcp", "rcp.approx.ftz.f32 %d, %x;", "d:return:f x:f", volatile=False)
product = op(
    "product", "mul.rn.f32 %d, %x, %y;", "d:return:f x:f y:f", volatile=False
)  # rounded, never fused with a sum
quotient = op(
    "quotient", "div.s32 %d, %x, %y;", "d:return:r x:r y:r", volatile=False
)  # of int32 that are not negative: Numba's // divides int64
exchange = op(
    "exchange", "shfl.sync.bfly.b32 %d, %x, %m, 0x1f, 0xffffffff;", "d:return:f x:f m:r"
)  # the x of the thread whose number differs in the bits of m
exchange_int32 = op(
    "exchange_int32", "shfl.sync.bfly.b32 %d, %x, %m, 0x1f, 0xffffffff;", "d:return:r x:r m:r"
)
pack = {
    dtype: op(
        f"pack_{dtype}",
        f"cvt.rn.{letter}x2.f32 %d, %high, %low;",
        "d:return:r low:f high:f",
        volatile=False,
        family="pack",
        dtype=dtype,
    )
    for dtype, letter in (("float16", "f16"), ("bfloat16", "bf16"))
}

# Memory of the device: addresses are int64.
load_int64 = op("load_int64", "ld.global.b64 %d, [%g];", "d:return:l g:l", memory=True)
load_float32 = op("load_float32", "ld.global.f32 %d, [%g];", "d:return:f g:l", memory=True)
load_float32_if = op(
    "load_float32_if",
    "{ .reg .pred p; setp.ne.b32 p, %c, 0; mov.f32 %d, %x; @p ld.global.f32 %d, [%g]; }",
    "d:return:f c:r g:l x:f",
    memory=True,
)  # x where not c
store_int32 = op("store_int32", "st.global.b32 [%g], %v;", "g:l v:r", memory=True)
store_int32_if = op(
    "store_int32_if",
    "{ .reg .pred p; setp.ne.b32 p, %c, 0; @p st.global.b32 [%g], %v; }",
    "c:r g:l v:r",
    memory=True,
)
store_float32_if = op(
    "store_float32_if",
    "{ .reg .pred p; setp.ne.b32 p, %c, 0; @p st.global.f32 [%g], %v; }",
    "c:r g:l v:f",
    memory=True,
)
store_float32_4_if = op(
    "store_float32_4_if",
    "{ .reg .pred p; setp.ne.b32 p, %c, 0; @p st.global.v4.f32 [%g], %v; }",
    "c:r g:l v:in:f4",
    memory=True,
)

store_16_if = op(
    "store_16_if",
    "{ .reg .pred p; setp.ne.b32 p, %c, 0; @p st.global.v4.b32 [%g], %v; }",
    "c:r g:l v:in:r4",
    memory=True,
)
load_float32_4 = op("load_float32_4", "ld.global.v4.f32 %d, [%g];", "d:out:f4 g:l", memory=True)

# Copies to shared memory that go on while the threads compute (sm_80): of n bytes, 0 or 16, the
# rest of the 16 become 0.
copy_16 = op("copy_16", "cp.async.cg.shared.global [%s], [%g], 16, %n;", "s:r g:l n:r", memory=True)
copy_16_if = op(
    "copy_16_if",
    "{ .reg .pred p; setp.ne.b32 p, %c, 0; @p cp.async.cg.shared.global [%s], [%g], 16; }",
    "c:r s:r g:l",
    memory=True,
)
commit_copies = op("commit_copies", "cp.async.commit_group;", memory=True)
wait_copies = {
    left: op(
        f"wait_copies_{left}",
        f"cp.async.wait_group {left};",
        memory=True,
        family="wait_copies",
        left=left,
    )
    for left in range(8)
}

# Shared memory: addresses are int32.
load_matrices = op(
    "load_matrices",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 %d, [%s];",
    "d:out:r4 s:r",
    memory=True,
)
load_matrices_transposed = op(
    "load_matrices_transposed",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 %d, [%s];",
    "d:out:r4 s:r",
    memory=True,
)
load_shared_float32 = op(
    "load_shared_float32", "ld.shared.f32 %d, [%s];", "d:return:f s:r", memory=True
)
load_shared_float32_2 = op(
    "load_shared_float32_2", "ld.shared.v2.f32 %d, [%s];", "d:out:f2 s:r", memory=True
)
load_shared_float32_4 = op(
    "load_shared_float32_4", "ld.shared.v4.f32 %d, [%s];", "d:out:f4 s:r", memory=True
)
store_shared_int32 = op("store_shared_int32", "st.shared.b32 [%s], %v;", "s:r v:r", memory=True)
store_shared_float32 = op("store_shared_float32", "st.shared.f32 [%s], %v;", "s:r v:f", memory=True)
store_shared_float32_2 = op(
    "store_shared_float32_2", "st.shared.v2.f32 [%s], {%x,%y};", "s:r x:f y:f", memory=True
)

# Barriers.
sync_warp = op("sync_warp", "bar.warp.sync 0xffffffff;", memory=True)
any_in_block = op(
    "any_in_block",
    "{ .reg .pred p, q; setp.ne.b32 p, %c, 0; bar.red.or.pred q, 0, p; selp.b32 %d, 1, 0, q; }",
    "d:return:r c:r",
    memory=True,
)  # waits for the block

# d[16 x 8] += a[16 x 16] b[16 x 8] by one warp (sm_80).
multiply = {
    dtype: op(
        f"multiply_{dtype}",
        f"mma.sync.aligned.m16n8k16.row.col.f32.{letter}.{letter}.f32 %d, %a, {{%b0,%b1}}, %d;",
        "d:update:f4 a:in:r4 b0:r b1:r",
        volatile=False,
        family="multiply",
        dtype=dtype,
    )
    for dtype, letter in (("float16", "f16"), ("bfloat16", "bf16"))
}
