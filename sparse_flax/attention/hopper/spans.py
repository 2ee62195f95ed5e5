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

    def hide(self, s, distance, keys: int):
        """Put -inf where a key is not seen.

        `distance` is the tile's first query less its first key, `keys` the dimension of
        s that keys lie along.
        """
        d = tiles.positions(s, 1 - keys) - tiles.positions(s, keys) + distance
        seen = d >= self.least
        if self.window is not None:
            seen = seen & (d < self.window)
        return jnp.where(seen, s, -jnp.inf)

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
    """The walk of a block over tiles of `cut.columns` others.

    seen(row) tells which tiles the 64 own rows from `row` on see, as Span's methods do;
    issue(tile, buffer) copies one. Where the rows of a block end behind the last of
    all, `live` is false in the warpgroups that have none of their own; these walk along
    and must write nothing.
    """

    def __init__(self, grid: Grid, first_row, w, seen, issue, full, free):
        cut, last = grid.cut, grid.rows - M
        mine = first_row + w * M
        self.live = mine <= last
        self.row = jnp.minimum(mine, last)
        block_last = jnp.minimum(first_row + (cut.warpgroups - 1) * M, last)
        self.begin, self.end = seen(first_row)[0], seen(block_last)[3]
        self.parts = seen(self.row)
        self.start, self._steps = ring(
            lambda j, buffer: issue(self.begin + j, buffer),
            *(full, free, self.end - self.begin, cut, w),
        )

    def over(self, use, carry):
        """Return carry = use(tile, buffer, masked, carry) after all tiles seen."""
        since, whole, last, until = self.parts
        # What is one thing has nothing between: no loop then, and no code for it.
        all_seen_at_first, all_seen_at_last = whole is since, last is until
        until = jnp.where(self.live, until, since)
        # A walk may be so short that no tile is wholly seen.
        whole = since if all_seen_at_first else jnp.minimum(whole, until)
        last = until if all_seen_at_last else jnp.clip(last, whole, until)

        def go(first, end, masked, carry):
            def step(j, buffer, carry):
                return use(self.begin + j, buffer, masked, carry)

            return self._steps(first - self.begin, end - self.begin, step, carry)

        def pass_by(first, end):
            if first is not end:
                first, end = first - self.begin, end - self.begin
                self._steps(first, end, lambda j, buffer, carry: carry, 0)

        pass_by(self.begin, since)
        if not all_seen_at_first:
            carry = go(since, whole, True, carry)
        carry = go(whole, last, False, carry)
        if not all_seen_at_last:
            carry = go(last, until, True, carry)
        pass_by(until, self.end)
        return carry
