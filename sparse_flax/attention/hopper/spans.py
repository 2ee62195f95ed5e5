"""Which keys a query sees where they are a stretch, and how blocks walk over them.

A block of threads takes 64 rows a warpgroup, the "own" ones: queries, or keys. It walks
over tiles of the others through a ring; each warpgroup passes by the tiles that its own
rows do not see.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.ring import Cut, ring
from sparse_flax.attention.hopper.tiles import M

# Neighbouring heads (of a column view: columns) whose blocks run at the same time, so
# that they read whole pages of memory, and the keys they share out of the L2 cache.
NEAR = 8


@dataclasses.dataclass(frozen=True)
class Span:
    """Query i sees key j if least <= i - j < window; all earlier ones if None."""

    least: int = 0
    window: int | None = None

    def hide(self, s, distance, keys: int, near: bool, far: bool):
        """Put -inf where a key is too near to be seen, or too far.

        `distance` is the tile's first query less its first key, `keys` the dimension of
        s that keys lie along.
        """
        # Sums are made along rows, of which a thread has two: differences of all pairs
        # would be kept in registers through every loop.
        rows, columns = tiles.positions(s, 0), tiles.positions(s, 1)
        if near and keys == 1:
            s = jnp.where(columns <= rows + (distance - self.least), s, -jnp.inf)
        elif near:
            s = jnp.where(columns >= rows + (self.least - distance), s, -jnp.inf)
        if far and keys == 1:
            s = jnp.where(columns > rows + (distance - self.window), s, -jnp.inf)
        elif far:
            s = jnp.where(columns < rows + (self.window - distance), s, -jnp.inf)
        return s

    def key_tiles(self, row, N: int):
        """Tiles of N keys that the 64 queries from `row` on see.

        (first seen, first wholly seen, first no more wholly seen, first not seen)
        """
        last, until = lax.div(row + 1 - self.least, N), pl.cdiv(row + M - self.least, N)
        since = whole = 0
        if self.window is not None:
            since = lax.div(jnp.maximum(row - self.window + 1, 0), N)
            whole = pl.cdiv(jnp.maximum(row + M - self.window, 0), N)
        return since, whole, last, until

    def query_tiles(self, row, N: int, rows: int):
        """The same of the `rows` queries, for the 64 keys from `row` on."""
        since, whole = (
            lax.div(row + self.least, N),
            pl.cdiv(row + M - 1 + self.least, N),
        )
        last = until = rows // N
        if self.window is not None:
            last = lax.div(row + self.window, N)
            until = jnp.minimum(pl.cdiv(row + M - 1 + self.window, N), until)
        return since, whole, last, until


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the rows of all heads are put on blocks, `cut.warpgroups` tiles each."""

    batch: int
    rows: int  # a multiple of 64
    heads: int
    cut: Cut

    @property
    def _near(self) -> int:
        return math.gcd(self.heads, NEAR)

    @property
    def axes(self) -> dict[str, int]:
        """Names and sizes for `tiles.launch`."""
        tile = pl.cdiv(self.rows, self.cut.warpgroups * M)
        far = self.batch * self.heads // self._near
        return {"far": far, "tile": tile, "near": self._near}

    def place(self, last_first: bool):
        """(batch, head, warpgroup, first row of the block), inside the kernel."""
        n = self.heads // self._near
        far, tile, near, w = (
            lax.axis_index(name) for name in (*self.axes, "warpgroup")
        )
        if last_first:
            tile = self.axes["tile"] - 1 - tile
        head = lax.rem(far, n) * self._near + near
        return lax.div(far, n), head, w, tile * (self.cut.warpgroups * M)


class Walk:
    """The walk of a block over tiles of `cut.columns` others: keys, or queries.

    issue(tile, buffer) copies one. Where the rows of a block end behind the last of
    all, `live` is false in the warpgroups that have none of their own; these walk along
    and must write nothing.
    """

    def __init__(self, grid: Grid, span: Span, over_keys: bool, place, issue, bars):
        first_row, w = place
        cut, last = grid.cut, grid.rows - M
        mine = first_row + w * M
        self.span, self.over_keys, self.N = span, over_keys, cut.columns
        self.live = mine <= last
        self.row = jnp.minimum(mine, last)

        def seen(row):
            if over_keys:
                return span.key_tiles(row, self.N)
            return span.query_tiles(row, self.N, grid.rows)

        block_last = jnp.minimum(first_row + (cut.warpgroups - 1) * M, last)
        self.begin, self.end = seen(first_row)[0], seen(block_last)[3]
        self.seen = seen(self.row)
        self.start, self._steps = ring(
            lambda j, buffer: issue(self.begin + j, buffer),
            *(*bars, self.end - self.begin, cut, w),
        )

    def over(self, use, carry):
        """Return carry = use(buffer, mask, carry) after all tiles seen."""
        since, whole, last, until = self.seen
        # What is one thing has nothing between: no loop then, and no code for it.
        all_seen_at_first, all_seen_at_last = whole is since, last is until
        until = jnp.where(self.live, until, since)
        # A walk may be so short that no tile is wholly seen.
        whole = since if all_seen_at_first else jnp.minimum(whole, until)
        last = until if all_seen_at_last else jnp.clip(last, whole, until)
        # In a wide window no tile has keys too near and keys too far.
        window = self.span.window
        both = window is not None and window < self.N + M

        def go(first, end, carry, near=False, far=False):
            def step(j, buffer, carry):
                def mask(s):
                    apart = self.row - (self.begin + j) * self.N
                    keys = 1 if self.over_keys else 0
                    distance = apart if self.over_keys else -apart
                    return self.span.hide(s, distance, keys, near or both, far or both)

                return use(buffer, mask if near or far else lambda s: s, carry)

            return self._steps(first - self.begin, end - self.begin, step, carry)

        def pass_by(first, end):
            if first is not end:
                first, end = first - self.begin, end - self.begin
                self._steps(first, end, lambda j, buffer, carry: carry, 0)

        pass_by(self.begin, since)
        if not all_seen_at_first:
            carry = go(since, whole, carry, near=not self.over_keys, far=self.over_keys)
        carry = go(whole, last, carry)
        if not all_seen_at_last:
            carry = go(last, until, carry, near=self.over_keys, far=not self.over_keys)
        pass_by(until, self.end)
        return carry
