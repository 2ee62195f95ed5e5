"""How Hopper's kernels for fixed patterns walk over the summaries of earlier blocks.

Summary keys are numbered by slot: slot = block * summary + place in the slice. Tiles of
slots are copied straight out of k and v, a piece of a slice at a time, and stream
through a ring of buffers.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which keys a query sees; `block` and `summary` as in the patterns.

    summary is 0 where no summaries are seen. Head h takes the slice `offset`, or
    h mod (block / summary) with rotate. With self_only, the own block is only the
    query's own token.
    """

    block: int
    summary: int = 0
    offset: int = 0
    rotate: bool = False
    self_only: bool = False

    def slice_start(self, head):
        """First row, inside a block, of the slice that a head sees."""
        offset = self.offset
        if self.rotate:
            offset = lax.rem(head, jnp.int32(self.block // self.summary))
        return self.block - (offset + 1) * self.summary

    def piece(self, rows):
        """Slots that one copy brings into a tile of `rows`: those of one slice."""
        return min(self.summary, rows) or rows

    def slot_row(self, slot, head):
        """Row of the sequence where the summary key of a slot lies."""
        block, place = lax.div(slot, self.summary), lax.rem(slot, self.summary)
        return block * self.block + self.slice_start(head) + place


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is tuned: warpgroups, keys (or queries) of a tile, buffers of the ring.

    A buffer is filled again `lag` steps after its use: the warpgroup that loads waits
    for the slowest one only when it is so many steps ahead.
    """

    warpgroups: int = 2
    columns: int = 64
    stages: int = 4
    lag: int = 2


def copy_summaries(walk, sources, buffers, barriers, index, first, at):
    """Copy the rows of the slots from `first` on into buffer `index` of each source.

    `at` is (batch, query head, key head). A source and piece is one arrival at the
    barrier.
    """
    batch, head, key_head = at
    (rows,) = {x.shape[1] for x in buffers}
    (T,) = {x.shape[1] for x in sources}
    piece = walk.piece(rows)
    for i in range(rows // piece):
        row = jnp.minimum(walk.slot_row(first + i * piece, head), T - piece)
        to = pl.ds(i * piece, piece)
        for source, buffer in zip(sources, buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                source.at[batch, pl.ds(row, piece), key_head],
                buffer.at[index, to],
                barriers.at[index],
            )


def ring(issue, full, free, total, cut, warpgroup):
    """Return (start, walk) for `total` steps over a ring of `cut.stages` buffers.

    issue(j, buffer) copies what step j needs. start() goes first, in the warpgroup that
    loads, number 0. walk(since, until, use, carry) takes these steps, and at each makes
    carry = use(j, buffer, carry). Every warpgroup must take all steps, in order.
    """

    def start():
        @pl.loop(0, jnp.minimum(total, cut.stages))
        def _(j):
            issue(j, j)

    def refill(j):
        used = j - cut.lag

        @pl.when((used >= 0) & (used + cut.stages < total))
        def _():
            buffer = lax.rem(used, cut.stages)
            plgpu.barrier_wait(free.at[buffer])
            issue(used + cut.stages, buffer)

    def release(j):
        @pl.when(j + cut.stages < total)
        def _():
            plgpu.barrier_arrive(free.at[lax.rem(j, cut.stages)])

    def walk(since, until, use, carry):
        def step(j, carry):
            buffer = lax.rem(j, cut.stages)
            pl.when(warpgroup == 0)(lambda: refill(j))
            plgpu.barrier_wait(full.at[buffer])
            carry = use(j, buffer, carry)
            release(j)
            return carry

        return lax.fori_loop(since, until, step, carry)

    return start, walk
