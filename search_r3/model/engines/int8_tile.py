"""What numba has no word for, said in LLVM's own: int16 by int8 in tiles, a power of two, an address as a pointer.

The tile's product is `pmaddwd` (two products of 16 bits and their sum), which becomes VNNI's `vpdpwssd` where there is
one; the weights of the next rows are asked for in advance. It needs AVX-512BW.
"""

from __future__ import annotations

from typing import Any

OUTPUTS = 4
"""Outputs that are computed together; what the number of outputs is a multiple of."""
PIECE = 32
"""Inputs that are multiplied at once; what the number of inputs is a multiple of."""
AHEAD = 8
"""Rows of weights that are asked for in advance."""


def runs_here() -> bool:
    """Whether this machine has what `tile` needs."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw"))


def power_of_two_intrinsic() -> Any:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def power_of_two(typing_context, n):
        """2 to the n-th as float32, n from -126 to 127: an exponent's own bits, so that a loop of it is vectorised."""

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


def tile_intrinsic(rows: int) -> Any:
    """A function (x, inputs, w, pieces, y, outputs), all by address: `rows` rows of x times `OUTPUTS` of w, into y."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    byte, word, long = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    sums, pairs, bytes_ = ir.VectorType(word, 16), ir.VectorType(ir.IntType(16), PIECE), ir.VectorType(byte, PIECE)

    @intrinsic
    def tile(typing_context, x, inputs, w, pieces, y, outputs):
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
            held = [[builder.phi(sums) for _ in range(OUTPUTS)] for _ in range(rows)]
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
                    [builder.add(held[row][o], builder.call(multiply, [left, loaded[o]])) for o in range(OUTPUTS)]
                )
            following = builder.add(piece, ir.Constant(long, 1))
            piece.add_incoming(following, body)
            for row in range(rows):
                for output in range(OUTPUTS):
                    held[row][output].add_incoming(ir.Constant(sums, [0] * 16), before)
                    held[row][output].add_incoming(added[row][output], body)
            builder.cbranch(builder.icmp_signed("<", following, pieces), body, after)
            builder.position_at_end(after)
            for row in range(rows):
                for output in range(OUTPUTS):
                    place = at(y, 4 * row, outputs, ir.Constant(long, 4 * output))
                    builder.store(builder.call(total, [added[row][output]]), builder.inttoptr(place, word.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile
