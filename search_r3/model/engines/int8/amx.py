"""Intel AMX kernels for `decode_kernels`: the product of int16 by int8 on tiles, exact, as bytes by bytes.

A 16-bit activation is split into a high byte (times 256) and a low byte; each is multiplied with the weights by
`tdpbssd`, 16 rows by 16 outputs by 64 inputs at a time. Reading the weights then dominates a pass over few tokens, so
thirty tokens take hardly longer than one. The weights are laid out once such that they are read sequentially. As in
`avx512`, each function builds a numba intrinsic that emits LLVM instructions.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

ROWS = 16
"""Number of activation rows in a tile."""
OUTPUTS = 32
"""Number of outputs computed together, in two tiles; the total number must be a multiple of it."""
PIECE = 64
"""Number of inputs multiplied at once; the total number must be a multiple of it."""
TILE = 1024
"""Size of a tile of weights or sums, in bytes."""
AHEAD = 2 * TILE
"""How far ahead weights are prefetched, in bytes; a quarter is prefetched between two products, as all at once is
slower."""
_ASK_FOR_STATE, _TILE_DATA, _ARCH_PRCTL = 0x1023, 18, 158


def runs_here() -> bool:
    """Whether this machine has AMX and the system lets this process use it (arch_prctl(2))."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-int8", "avx512f", "avx512bw")):
        return False
    try:
        return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0
    except (AttributeError, OSError):
        return False


def lay_out(weight_AOI: np.ndarray) -> np.ndarray:
    """Rearrange int8 (A, O, I) to (A, O / 32, I / 64, 2048): two tiles of 16 times 4 inputs for 16 outputs."""
    layers, outputs, inputs = weight_AOI.shape
    apart = weight_AOI.reshape(layers, outputs // OUTPUTS, 2, 16, inputs // PIECE, 16, 4)
    return np.ascontiguousarray(apart.transpose(0, 1, 4, 2, 5, 3, 6)).reshape(
        layers, outputs // OUTPUTS, inputs // PIECE, 2 * TILE
    )


def configuration() -> np.ndarray:
    """The configuration for `ldtilecfg` with full tiles: uint8 (64,)."""
    bytes_ = np.zeros(64, np.uint8)
    bytes_[0] = 1  # the palette
    bytes_[16:32:2] = 64  # bytes per row of each of the eight tiles
    bytes_[48:56] = ROWS
    return bytes_


def tiles_intrinsic() -> Any:
    """Build a numba function (high, low, inputs, w, pieces, sums).

    All arguments except `inputs` and `pieces` are addresses. It multiplies `ROWS` rows of high and of low bytes with
    the weights of `OUTPUTS` outputs. The result is four int32 tiles, those of the high bytes first.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    byte, word, long = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    pointer, nothing = byte.as_pointer(), ir.VoidType()

    @intrinsic
    def tiles(typing_context, high, low, inputs, w, pieces, sums):
        def generate(context, builder, signature, arguments):
            high, low, inputs, w, pieces, sums = arguments

            def call(name, takes, *given):
                function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(nothing, takes), name)
                builder.call(function, given)

            def tile(number):
                return ir.Constant(byte, number)

            def read(number, address, stride):
                place = builder.inttoptr(address, pointer)
                call("llvm.x86.tileloadd64", [byte, pointer, long], tile(number), place, stride)

            def plus(address, number):
                return builder.add(address, ir.Constant(long, number))

            before, body, after = builder.block, builder.append_basic_block("body"), builder.append_basic_block("after")
            for number in range(4):
                call("llvm.x86.tilezero", [byte], tile(number))
            builder.branch(body)
            builder.position_at_end(body)
            piece = builder.phi(long)
            piece.add_incoming(ir.Constant(long, 0), before)
            offset = builder.mul(piece, ir.Constant(long, PIECE))
            weights = builder.add(w, builder.mul(piece, ir.Constant(long, 2 * TILE)))

            def ask_for(quarter):
                for line in range(quarter * TILE // 2, (quarter + 1) * TILE // 2, 64):
                    ahead = builder.inttoptr(plus(weights, AHEAD + line), pointer)
                    fetch = [word, word, word]
                    call("llvm.prefetch.p0", [pointer, *fetch], ahead, *(ir.Constant(word, n) for n in (0, 3, 1)))

            ask_for(0)
            read(6, weights, ir.Constant(long, 64))
            read(7, plus(weights, TILE), ir.Constant(long, 64))
            read(4, builder.add(high, offset), inputs)
            for number, left, right in ((0, 4, 6), (1, 4, 7)):
                call("llvm.x86.tdpbssd", [byte] * 3, tile(number), tile(left), tile(right))
                ask_for(1 + number)
            read(5, builder.add(low, offset), inputs)
            ask_for(3)
            call("llvm.x86.tdpbssd", [byte] * 3, tile(2), tile(5), tile(6))
            call("llvm.x86.tdpbssd", [byte] * 3, tile(3), tile(5), tile(7))
            following = plus(piece, 1)
            piece.add_incoming(following, body)
            builder.cbranch(builder.icmp_signed("<", following, pieces), body, after)
            builder.position_at_end(after)
            for number in range(4):
                place = builder.inttoptr(plus(sums, number * TILE), pointer)
                call("llvm.x86.tilestored64", [byte, pointer, long], tile(number), place, ir.Constant(long, 64))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tiles


def configure_intrinsic() -> Any:
    """Build a numba function (address) that configures this thread's tiles with the bytes at the address."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def configure(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer, nothing = ir.IntType(8).as_pointer(), ir.VoidType()
            load = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(nothing, [pointer]), "llvm.x86.ldtilecfg"
            )
            builder.call(load, [builder.inttoptr(arguments[0], pointer)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return configure
