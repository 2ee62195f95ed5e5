"""How Hopper's kernels for fixed patterns walk over the summaries of earlier blocks.

Summary keys are numbered by slot: slot = block * summary + place in the slice. Tiles of
slots are copied straight out of k and v, a piece of a slice at a time.
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
