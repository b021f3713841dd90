"""AVX-512 kernels for `decode_kernels` in LLVM's intermediate representation, for operations that numba cannot express.

These are the product of int16 by int8 in blocks of a few rows by `OUTPUTS` outputs, attention's two products, a power
of two, and an address as a pointer. Each function builds a numba intrinsic: Python code that emits LLVM instructions
when numba compiles a call of it. The product uses `pmaddwd` (the sum of two 16-bit products), or VNNI's `vpdpwssd`
where it is available; the weights of the next rows are prefetched. AVX-512BW is required.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

OUTPUTS = 4
"""Number of outputs computed together; the total number must be a multiple of it."""
PIECE = 32
"""Number of inputs multiplied at once; the total number must be a multiple of it."""
AHEAD = 8
"""Number of weight rows that are prefetched."""
SPAN = 64
"""Number of dimensions of a head that `dots` and `weighted` process at once."""
LANES = 16
"""float32 numbers of a vector."""


def runs_here() -> bool:
    """Whether this machine has the instructions that these kernels need."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw"))


def power_of_two_intrinsic() -> Any:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def power_of_two(typing_context, n):
        """2 to the power n as float32, for n from -126 to 127, by its exponent bits, so that loops are vectorized."""

        def generate(context, builder, signature, arguments):
            word = ir.IntType(32)
            exponent = builder.add(arguments[0], ir.Constant(word, 127))
            return builder.bitcast(builder.shl(exponent, ir.Constant(word, 23)), ir.FloatType())

        return types.float32(types.int32), generate

    return power_of_two


def pointer_intrinsic() -> Any:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def pointer(typing_context, address):
        """An address as a pointer to float32."""

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

        return types.CPointer(types.float32)(types.int64), generate

    return pointer


def block_intrinsic(rows: int) -> Any:
    """Build a numba function (x, inputs, w, pieces, y, outputs) on addresses: `rows` of x times `OUTPUTS` of w."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    byte, word, long = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    sums, pairs, bytes_ = ir.VectorType(word, 16), ir.VectorType(ir.IntType(16), PIECE), ir.VectorType(byte, PIECE)

    @intrinsic
    def block(typing_context, x, inputs, w, pieces, y, outputs):
        def generate(context, builder, signature, arguments):
            x, inputs, w, pieces, y, outputs = arguments

            def known(name, result, *takes):
                return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, takes), name)

            multiply = known("llvm.x86.avx512.pmaddw.d.512", sums, pairs, pairs)
            total = known("llvm.vector.reduce.add.v16i32", word, sums)
            fetch = known("llvm.prefetch.p0", ir.VoidType(), byte.as_pointer(), word, word, word)

            def at(base, number, size, offset):
                return builder.add(builder.add(base, builder.mul(size, ir.Constant(long, number))), offset)

            def read(address, kind):
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

            before, body, after = builder.block, builder.append_basic_block("body"), builder.append_basic_block("after")
            builder.branch(body)
            builder.position_at_end(body)
            piece = builder.phi(long)
            piece.add_incoming(ir.Constant(long, 0), before)
            totals = [[builder.phi(sums) for _ in range(OUTPUTS)] for _ in range(rows)]
            offset = builder.mul(piece, ir.Constant(long, PIECE))
            weights = [at(w, output, inputs, offset) for output in range(OUTPUTS)]
            for address in weights:
                ahead = builder.inttoptr(at(address, AHEAD, inputs, ir.Constant(long, 0)), byte.as_pointer())
                builder.call(fetch, [ahead, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])
            loaded = [builder.sext(read(address, bytes_), pairs) for address in weights]
            doubled = builder.shl(offset, ir.Constant(long, 1))
            added = []
            for row in range(rows):
                left = read(at(x, 2 * row, inputs, doubled), pairs)
                added.append(
                    [builder.add(totals[row][o], builder.call(multiply, [left, loaded[o]])) for o in range(OUTPUTS)]
                )
            following = builder.add(piece, ir.Constant(long, 1))
            piece.add_incoming(following, body)
            for row in range(rows):
                for output in range(OUTPUTS):
                    totals[row][output].add_incoming(ir.Constant(sums, [0] * 16), before)
                    totals[row][output].add_incoming(added[row][output], body)
            builder.cbranch(builder.icmp_signed("<", following, pieces), body, after)
            builder.position_at_end(after)
            for row in range(rows):
                for output in range(OUTPUTS):
                    place = at(y, 4 * row, outputs, ir.Constant(long, 4 * output))
                    builder.store(builder.call(total, [added[row][output]]), builder.inttoptr(place, word.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return block


def dots_intrinsic() -> Any:
    """Build a numba function (query, keys, stride, count, factor, sums): sums += factor * (query . key) for each key.

    Query and keys are addresses of `SPAN` float32; keys are `stride` bytes apart.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    number, long = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(number, LANES)
    free = ("reassoc", "nsz", "nnan", "contract")

    @intrinsic
    def dots(typing_context, query, keys, stride, count, factor, sums):
        def generate(context, builder, signature, arguments):
            query, keys, stride, count, factor, sums = arguments
            total = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(number, [number, vector]), "llvm.vector.reduce.fadd.v16f32"
            )
            multiply_add = fused(builder, ir, vector)

            def lane(address, place):
                return read(builder, ir, vector, builder.add(address, ir.Constant(long, 4 * LANES * place)))

            parts = [lane(query, place) for place in range(SPAN // LANES)]
            with loop(builder, ir, count) as t:
                key = builder.add(keys, builder.mul(t, stride))
                product = builder.fmul(parts[0], lane(key, 0), flags=free)
                for place, part in enumerate(parts[1:], 1):
                    product = builder.call(multiply_add, [part, lane(key, place), product])
                dot = builder.call(total, [ir.Constant(number, 0.0), product], fastmath=free)
                out = builder.inttoptr(builder.add(sums, builder.mul(t, ir.Constant(long, 4))), number.as_pointer())
                before = builder.load(out, typ=number)
                builder.store(builder.fadd(before, builder.fmul(dot, factor, flags=free), flags=free), out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float32, types.int64), generate

    return dots


def weighted_intrinsic() -> Any:
    """Build a numba function (weights, values, stride, count, out): out += weight * value for each value."""
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def weighted(typing_context, weights, values, stride, count, out):
        def generate(context, builder, signature, arguments):
            weights, values, stride, count, out = arguments
            products(builder, 1, (weights, 0), (values, stride), SPAN, count, (out, 0), add=True)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return weighted


def products(
    builder: Any,
    rows: int,
    left: Sequence[Any],
    right: Sequence[Any],
    columns: int,
    count: Any,
    out: Sequence[Any],
    *,
    add: bool = False,
) -> None:
    """Emit `out = left @ right` (or `+=`, to `add`), (rows, count) by (count, columns), all float32; each is an address
    and its rows' step in bytes."""
    from llvmlite import ir
    from numba.core import cgutils

    number, long = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(number, LANES)
    multiply_add = fused(builder, ir, vector)

    def stepped(row: Sequence[Any], times: Any) -> Any:
        step = row[1] if isinstance(row[1], ir.Value) else ir.Constant(long, row[1])
        return builder.add(row[0], builder.mul(step, times))

    def lane(address: Any, place: int) -> Any:
        return builder.add(address, ir.Constant(long, 4 * LANES * place))

    lanes = range(columns // LANES)
    targets = [[lane(stepped(out, ir.Constant(long, row)), place) for place in lanes] for row in range(rows)]
    sums = [[cgutils.alloca_once(builder, vector) for _ in lanes] for _ in range(rows)]  # LLVM makes them registers
    for row, addresses in zip(sums, targets, strict=True):
        for total, address in zip(row, addresses, strict=True):
            zeros = ir.Constant(vector, [0.0] * LANES)
            builder.store(read(builder, ir, vector, address) if add else zeros, total)
    starts = [stepped(left, ir.Constant(long, row)) for row in range(rows)]
    with loop(builder, ir, count) as t:
        base = stepped(right, t)
        parts = [read(builder, ir, vector, lane(base, place)) for place in lanes]
        for start, row in zip(starts, sums, strict=True):
            address = builder.add(start, builder.mul(t, ir.Constant(long, 4)))
            one = builder.load(builder.inttoptr(address, number.as_pointer()), typ=number)
            every = broadcast(builder, ir, vector, one)
            for total, part in zip(row, parts, strict=True):
                builder.store(builder.call(multiply_add, [every, part, builder.load(total, typ=vector)]), total)
    for row, addresses in zip(sums, targets, strict=True):
        for total, address in zip(row, addresses, strict=True):
            target = builder.inttoptr(address, vector.as_pointer())
            builder.store(builder.load(total, typ=vector), target, align=4)


def fused(builder: Any, ir: Any, vector: Any) -> Any:
    """The instruction a * b + c of float32 vectors."""
    from numba.core import cgutils

    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), "llvm.fma.v16f32")


def read(builder: Any, ir: Any, vector: Any, address: Any) -> Any:
    """Emit the load of a vector from an address (int64)."""
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4, typ=vector)


def broadcast(builder: Any, ir: Any, vector: Any, number: Any) -> Any:
    """Emit a vector of one number."""
    word, nothing = ir.IntType(32), ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(word, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(word, LANES), [0] * LANES))


@contextmanager
def loop(builder: Any, ir: Any, count: Any) -> Iterator[Any]:
    """A context whose emitted instructions run in a loop for 0, 1, ..., `count` - 1 (int64)."""
    from numba.core import cgutils

    with cgutils.for_range(builder, count, intp=ir.IntType(64)) as emitted:
        yield emitted.index
