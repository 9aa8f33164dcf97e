"""Matrix products small enough to stay in registers: what attention is made of.

Two vectors of each row of the result are held, for several rows at once, and every sum is added up in an order that does
not depend on how many rows there are.
"""

from itertools import product
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .vectors import _VF, FLOATS, LANES, fused, shifted, splatted, widened

_I64 = ir.IntType(64)
_ZERO = ir.Constant(_VF, [0.0] * LANES)


def _generated(
    builder: Any,
    count: int,
    chains: int,
    depth: Any,
    a: Any,
    a_row: Any,
    columns: list[Any],
    b_row: Any,
    element: Any,
    begun: list[Any],
) -> list[Any]:
    """The loop over depth, `chains` steps at a time, each adding to sums of its own: one sum must wait for the last product,
    several overlap. `columns` point to a vector each of b's first row; `begun` is what the first chain starts from. Returns
    the sums, row by row."""
    size = count * len(columns)
    begun = [*begun, *[_ZERO] * (size * (chains - 1))]
    before, loop = builder.block, builder.append_basic_block("panel")
    after = builder.append_basic_block("panel.end")
    builder.cbranch(builder.icmp_signed(">", depth, _I64(0)), loop, after)

    builder.position_at_end(loop)
    first = builder.phi(_I64)
    sums = [builder.phi(_VF) for _ in begun]
    added: list[Any] = []
    for chain in range(chains):
        k = builder.add(first, _I64(chain))
        vectors = [widened(builder, column, builder.mul(k, b_row), element) for column in columns]
        for i in range(count):
            factor = builder.load(builder.gep(a, [builder.add(builder.mul(a_row, _I64(i)), k)]), align=4)
            row = splatted(builder, factor)
            added += [fused(builder, row, vector, sums[len(added) + j]) for j, vector in enumerate(vectors)]
    following = builder.add(first, _I64(chains))
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
    first.add_incoming(_I64(0), before)
    first.add_incoming(following, loop)
    for phi, begin, end in zip(sums, begun, added, strict=True):
        phi.add_incoming(begin, before)
        phi.add_incoming(end, loop)

    builder.position_at_end(after)
    results = [builder.phi(_VF) for _ in begun]
    for result, begin, end in zip(results, begun, added, strict=True):
        result.add_incoming(begin, before)
        result.add_incoming(end, loop)
    whole = results[:size]
    for chain in range(1, chains):
        more = results[size * chain : size * (chain + 1)]
        whole = [builder.fadd(one, other) for one, other in zip(whole, more, strict=True)]
    return whole


def _places(builder: Any, count: int, width: int, c: Any, c_row: Any) -> list[Any]:
    """Pointers to `width` vectors of each of `count` rows."""
    at = [builder.add(builder.mul(c_row, _I64(i)), _I64(j * LANES)) for i, j in product(range(count), range(width))]
    return [builder.bitcast(builder.gep(c, [index]), _VF.as_pointer()) for index in at]


@intrinsic(prefer_literal=True)
def _rows_of_panel(
    typing: Any, rows: Any, depth: Any, a: Any, a_row: Any, left: Any, right: Any, b_row: Any, c: Any, c_row: Any
) -> Any:
    """As `panel`, for so many rows as the literal `rows` says."""
    count = rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, depth, a, a_row, *columns, b_row, c, c_row = values
        begun = [_ZERO] * (2 * count)
        sums = _generated(builder, count, 2, depth, a, a_row, columns, b_row, left.dtype, begun)
        for value, place in zip(sums, _places(builder, count, 2, c, c_row), strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, i64, FLOATS, i64, left, left, i64, FLOATS, i64), generate


@intrinsic(prefer_literal=True)
def _rows_added(typing: Any, rows: Any, width: Any, depth: Any, a: Any, a_row: Any, b: Any, row: Any, c: Any) -> Any:
    """As `add_panel`, for so many rows, and so many vectors of each, as the literals say."""
    count, vectors = rows.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, _, depth, a, a_row, b, row, c = values
        places = _places(builder, count, vectors, c, row)
        begun = [builder.load(place, align=4) for place in places]
        columns = [builder.gep(b, [_I64(j * LANES)]) for j in range(vectors)]
        sums = _generated(builder, count, 1, depth, a, a_row, columns, row, signature.args[5].dtype, begun)
        for value, place in zip(sums, places, strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(rows, width, i64, FLOATS, i64, b, i64, FLOATS), generate


@njit(error_model="numpy")
def panel(
    rows: Any, depth: Any, a: Any, a_row: Any, left: Any, right: Any, b_row: Any, c: Any, c_row: Any
) -> None:  # fmt: skip
    """c[i, : 2 * LANES] = a[i, :depth] b[:depth] for `rows` rows i, the lanes of b's rows being at `left` and at `right`. b is of
    either element, a and c float32; `a_row` and the like are the elements from one row to the next; depth is even.

    Even and odd products are added up in order, then both sums.
    """
    while rows >= 4:
        _rows_of_panel(4, depth, a, a_row, left, right, b_row, c, c_row)
        a, c, rows = shifted(a, 4 * a_row), shifted(c, 4 * c_row), rows - 4
    if rows == 3:
        _rows_of_panel(3, depth, a, a_row, left, right, b_row, c, c_row)
    elif rows == 2:
        _rows_of_panel(2, depth, a, a_row, left, right, b_row, c, c_row)
    elif rows == 1:
        _rows_of_panel(1, depth, a, a_row, left, right, b_row, c, c_row)


@njit(error_model="numpy")
def add_panel(rows: Any, depth: Any, a: Any, a_row: Any, b: Any, row: Any, c: Any) -> None:
    """c[i] += a[i, :depth] b[:depth] for `rows` rows i, in order; the rows of b and those of c are `row` elements long, a multiple
    of 2 * LANES. b is of either element, a and c float32."""
    while rows > 0:
        for at in range(0, row, 4 * LANES):
            begin, to = shifted(b, at), shifted(c, at)
            if at + 4 * LANES <= row:
                if rows >= 4:
                    _rows_added(4, 4, depth, a, a_row, begin, row, to)
                elif rows == 3:
                    _rows_added(3, 4, depth, a, a_row, begin, row, to)
                elif rows == 2:
                    _rows_added(2, 4, depth, a, a_row, begin, row, to)
                else:
                    _rows_added(1, 4, depth, a, a_row, begin, row, to)
            elif rows >= 4:
                _rows_added(4, 2, depth, a, a_row, begin, row, to)
            elif rows == 3:
                _rows_added(3, 2, depth, a, a_row, begin, row, to)
            elif rows == 2:
                _rows_added(2, 2, depth, a, a_row, begin, row, to)
            else:
                _rows_added(1, 2, depth, a, a_row, begin, row, to)
        a, c, rows = shifted(a, 4 * a_row), shifted(c, 4 * row), rows - 4
