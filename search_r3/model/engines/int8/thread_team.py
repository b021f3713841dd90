"""A team of threads that compute one forward pass together, with a spin barrier between its steps.

A barrier costs a few hundred nanoseconds: each thread increments a counter and spins until all have arrived. A thread
that has been spinning for long yields its core to other threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

MAX_THREADS = 8
"""Maximum number of threads: with more, each would do too little between two barriers."""
SPINS = 20_000
"""Number of spins (about a millisecond) before the core is yielded to other threads."""


class ThreadTeam:
    """Runs a function in as many threads as torch uses in the calling thread, for one call at a time."""

    def __init__(self) -> None:
        self._helpers: ThreadPoolExecutor | None = None
        self._made_for: tuple[int, int] | None = None  # process and number of shares

    def run(self, function: Callable[[int, int, int], Any]) -> None:
        """Call `function(share, shares, barrier)` for each share; `barrier` is the address for `barrier_intrinsic`.

        The function must not raise, and all shares must reach the barrier the same number of times.
        """
        shares = min(torch.get_num_threads(), MAX_THREADS)
        counter = np.zeros(1, np.int64)
        barrier = int(counter.ctypes.data)
        if shares == 1:
            function(0, 1, barrier)
            return
        if self._helpers is None or self._made_for != (os.getpid(), shares):  # threads do not survive a fork
            if self._helpers is not None:
                self._helpers.shutdown(wait=False)
            self._helpers, self._made_for = ThreadPoolExecutor(shares - 1, "int8-share"), (os.getpid(), shares)
        helpers = [self._helpers.submit(function, share, shares, barrier) for share in range(1, shares)]
        function(0, shares, barrier)
        for helper in helpers:
            helper.result()


def barrier_intrinsic() -> Any:
    """Build a numba function (address, until) that increments the counter and returns when it has reached `until`."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def wait(typing_context, address, until):
        def generate(context, builder, signature, arguments):
            address, until = arguments
            long, word = ir.IntType(64), ir.IntType(32)
            place = builder.inttoptr(address, long.as_pointer())
            rest = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            offer = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, []), "sched_yield")
            builder.atomic_rmw("add", place, ir.Constant(long, 1), "seq_cst")
            before = builder.block
            turn, patient, tired, after = (
                builder.append_basic_block(name) for name in ("spin", "rest", "offer", "arrived")
            )
            builder.branch(turn)
            builder.position_at_end(turn)
            turns = builder.phi(long)
            turns.add_incoming(ir.Constant(long, 0), before)
            come = builder.load_atomic(place, "seq_cst", 8, typ=long)
            builder.cbranch(builder.icmp_signed("<", come, until), patient, after)
            builder.position_at_end(patient)
            builder.call(rest, [])
            more = builder.add(turns, ir.Constant(long, 1))
            again = builder.block
            builder.cbranch(builder.icmp_signed("<", more, ir.Constant(long, SPINS)), turn, tired)
            turns.add_incoming(more, again)
            builder.position_at_end(tired)
            builder.call(offer, [])
            turns.add_incoming(more, tired)
            builder.branch(turn)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return wait
