"""A ring of buffers, through which warpgroups of a block walk over tiles together."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is tuned: warpgroups, keys (or queries) of a tile, buffers of the ring.

    A buffer is filled again `lag` steps after its use, so that the warpgroup that does
    it waits for the slowest one only when it is so many steps ahead. That is the first
    warpgroup, or with `in_turns` each for buffers of its own: 10 % faster with three
    warpgroups, but not where registers are so short that it makes them spill.
    """

    warpgroups: int = 2
    columns: int = 64
    stages: int = 4
    lag: int = 2
    in_turns: bool = False


def ring(issue, full, free, total, cut, warpgroup):
    """Return (start, walk) for `total` steps over a ring of `cut.stages` buffers.

    issue(j, buffer) copies what step j needs. start() goes first, in warpgroup 0. Each
    buffer is refilled always by the same warpgroup: it alone counts how often the
    buffer was given back. walk(since, until, use, carry) takes these steps, and at each
    makes carry = use(j, buffer, carry). Every warpgroup must take all steps, in order.
    """

    def start():
        @pl.loop(0, jnp.minimum(total, cut.stages))
        def _(j):
            issue(j, j)

    def refill(j):
        used = j - cut.lag
        buffer = lax.rem(used, cut.stages)
        mine = warpgroup == (lax.rem(buffer, cut.warpgroups) if cut.in_turns else 0)

        @pl.when(mine & (used >= 0) & (used + cut.stages < total))
        def _():
            plgpu.barrier_wait(free.at[buffer])
            issue(used + cut.stages, buffer)

    def release(j):
        # Products have read the buffer when their sums are loaded, before this; what
        # was read of it by plain loads is in registers.
        @pl.when(j + cut.stages < total)
        def _():
            plgpu.barrier_arrive(free.at[lax.rem(j, cut.stages)])

    def walk(since, until, use, carry):
        def step(j, carry):
            buffer = lax.rem(j, cut.stages)
            refill(j)
            plgpu.barrier_wait(full.at[buffer])
            carry = use(j, buffer, carry)
            release(j)
            return carry

        return lax.fori_loop(since, until, step, carry)

    return start, walk
