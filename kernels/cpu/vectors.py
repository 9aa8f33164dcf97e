"""Explicit vectors in numba: 16 lanes of float32, loaded from and stored to float32 or bfloat16 memory.

A compiler left to itself vectorizes one loop this way and another that way, and rounds accordingly. Here each operation
is one instruction of LLVM on all lanes, sums are taken in the order that is written, and nothing else is contracted or
reordered: so a kernel gives a number the same bits wherever it stands in a batch. A machine with narrower
registers takes several for one vector. bfloat16 has no type in numba: its memory is read through pointers to uint16.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_VF = ir.VectorType(_F32, LANES)
_VI = ir.VectorType(_I32, LANES)
_VH = ir.VectorType(ir.IntType(16), LANES)


class Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VF)


FLOATS: Any = types.CPointer(types.float32)
BFLOATS: Any = types.CPointer(types.uint16)
INT32S: Any = types.CPointer(types.int32)
INTS: Any = types.CPointer(types.int64)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VF, [value] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_VI, [value] * LANES)


def _call(builder: Any, name: str, *operands: Any) -> Any:
    """An intrinsic function of LLVM, on vectors that all have one type."""
    of = operands[0].type
    kind = f"v{LANES}f32" if of == _VF else f"v{LANES}i32"
    function_type = ir.FunctionType(of, [operand.type for operand in operands])
    function = builder.module.globals.get(f"llvm.{name}.{kind}")
    function = function or ir.Function(builder.module, function_type, f"llvm.{name}.{kind}")
    return builder.call(function, operands)


def widened(builder: Any, pointer: Any, index: Any, element: Any) -> Any:
    """The lanes at `pointer[index:]`, of whichever element."""
    at = builder.gep(pointer, [index])
    if element == types.float32:
        return builder.load(builder.bitcast(at, _VF.as_pointer()), align=4)
    halves = builder.load(builder.bitcast(at, _VH.as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, _VI), _integers(16)), _VF)


def narrowed(builder: Any, value: Any, pointer: Any, index: Any, element: Any) -> None:
    """To the nearest, ties to even; NaN stays NaN."""
    at = builder.gep(pointer, [index])
    if element == types.float32:
        builder.store(value, builder.bitcast(at, _VF.as_pointer()), align=4)
        return
    bits = builder.bitcast(value, _VI)
    odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
    rounded = builder.add(bits, builder.add(odd, _integers(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    kept = builder.select(nan, builder.or_(bits, _integers(0x400000)), rounded)
    halves = builder.trunc(builder.lshr(kept, _integers(16)), _VH)
    builder.store(halves, builder.bitcast(at, _VH.as_pointer()), align=2)


@intrinsic
def shifted(typing: Any, pointer: Any, count: Any) -> Any:
    """The pointer, so many elements on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), generate


@intrinsic
def load(typing: Any, pointer: Any, index: Any) -> Any:
    """pointer[index : index + LANES]"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return widened(builder, args[0], args[1], pointer.dtype)

    return vector(pointer, index), generate


@intrinsic
def store(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    """pointer[index : index + LANES] = value"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrowed(builder, args[2], args[0], args[1], pointer.dtype)
        return context.get_dummy_value()

    return types.void(pointer, index, value), generate


@intrinsic
def prefetch(typing: Any, pointer: Any) -> Any:
    """Begin to bring what is there into the cache; any address will do."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        name = "llvm.prefetch.p0i8"
        function_type = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
        builder.call(function, [builder.bitcast(args[0], byte), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(pointer), generate


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """The scalar in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splatted(builder, args[0])

    return vector(types.float32), generate


def splatted(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VF, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(first, ir.Constant(_VF, ir.Undefined), ir.Constant(_VI, [0] * LANES))


@intrinsic
def within(typing: Any, value: Any, low: Any, high: Any, otherwise: Any) -> Any:
    """Lane i of `value` where low <= i < high, `otherwise` elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, low, high, otherwise = args
        steps = ir.Constant(_VI, list(range(LANES)))

        def all_lanes(scalar: Any) -> Any:
            first = builder.insert_element(ir.Constant(_VI, ir.Undefined), builder.trunc(scalar, _I32), _I32(0))
            return builder.shuffle_vector(first, ir.Constant(_VI, ir.Undefined), ir.Constant(_VI, [0] * LANES))

        inside = builder.and_(
            builder.icmp_signed(">=", steps, all_lanes(low)), builder.icmp_signed("<", steps, all_lanes(high))
        )
        return builder.select(inside, value, splatted(builder, otherwise))

    return vector(vector, types.int64, types.int64, types.float32), generate


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "fma", a, b, c)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fused(builder, *args)

    return vector(vector, vector, vector), generate


def _arithmetic(symbol: Any, instruction: str) -> None:
    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args)

        return vector(vector, vector), generate

    @overload(symbol)
    def on_vectors(a: Any, b: Any) -> Any:
        def apply(a: Any, b: Any) -> Any:
            return operation(a, b)

        return apply if a == b == vector else None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """Of each pair of lanes; NaN if one of them is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = args
        bigger = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.select(builder.fcmp_unordered("uno", a, a), a, bigger)

    return vector(vector, vector), generate


def _folded(builder: Any, value: Any, combine: Any) -> Any:
    """The lanes in pairs at a distance of 8, 4, 2 and 1."""
    for distance in (8, 4, 2, 1):
        moved = ir.Constant(_VI, [(i + distance) % LANES for i in range(LANES)])
        value = combine(value, builder.shuffle_vector(value, ir.Constant(_VF, ir.Undefined), moved))
    return builder.extract_element(value, _I32(0))


@intrinsic
def total(typing: Any, value: Any) -> Any:
    """The sum of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], builder.fadd)

    return types.float32(vector), generate


@intrinsic
def largest(typing: Any, value: Any) -> Any:
    """The largest lane; NaN if one is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def combine(a: Any, b: Any) -> Any:
            bigger = builder.select(builder.fcmp_ordered(">", a, b), a, b)
            return builder.select(builder.fcmp_unordered("uno", a, a), a, bigger)

        return _folded(builder, args[0], combine)

    return types.float32(vector), generate


@intrinsic
def first_equal(typing: Any, value: Any, scalar: Any) -> Any:
    """The first lane that equals the scalar; LANES if none does."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i16, i64 = ir.IntType(16), ir.IntType(64)
        equal = builder.bitcast(builder.fcmp_ordered("==", args[0], splatted(builder, args[1])), i16)
        return builder.zext(builder.cttz(equal, ir.Constant(ir.IntType(1), 0)), i64)

    return types.int64(vector, types.float32), generate


_LOG2_E = 1.44269504088896341
_LN2_HIGH = -0.693359375  # exact in few bits, so that n times it is exact
_LN2_LOW = 2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOWEST, _HIGHEST = -87.3, 88.3


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """e^x within 2 units in the last place; 0 below -87.3, infinity above 88.3, NaN of NaN.

    Range reduction and polynomial are those of Cephes' expf (Moshier, https://www.netlib.org/cephes).
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,) = args
        low = builder.fcmp_ordered("<", x, _constant(_LOWEST))
        high = builder.fcmp_ordered(">", x, _constant(_HIGHEST))
        reduced = builder.select(builder.or_(low, high), _constant(0.0), x)
        n = _call(builder, "floor", fused(builder, reduced, _constant(_LOG2_E), _constant(0.5)))
        r = fused(builder, n, _constant(_LN2_LOW), fused(builder, n, _constant(_LN2_HIGH), reduced))
        p = _constant(_POLYNOMIAL[0])
        for coefficient in _POLYNOMIAL[1:]:
            p = fused(builder, p, r, _constant(coefficient))
        p = fused(builder, builder.fmul(r, r), p, builder.fadd(r, _constant(1.0)))
        nan = builder.fcmp_unordered("uno", x, x)
        whole = builder.fptosi(builder.select(nan, _constant(0.0), n), _VI)
        power = builder.bitcast(builder.shl(builder.add(whole, _integers(127)), _integers(23)), _VF)
        value = builder.fmul(p, power)
        value = builder.select(low, _constant(0.0), value)
        return builder.select(high, _constant(float("inf")), value)

    return vector(vector), generate
