"""A softmax over keys that come in tiles, for 64 query rows, in registers.

What it has seen so far is a state (out, top, total): the sum of weighted values, the
largest score and the sum of weights, both a value a row. Largest scores are in powers
of two. A state is a carry of the loops that are loops in a kernel, and None before the
first tile of those that Python unrolls, which saves a rescaling of nothing.

Masks come before the scale, which must be above 0: the largest score is then found
without it, and scale and subtraction are one instruction.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M

# Stands for the log-sum-exp of a row without keys: minus infinity would give NaN.
EMPTY = -1e30
# Below every score and far above -inf: differences of it stay finite, so that no row
# sum, rescaling or contracted multiply-add makes a NaN.
LOWEST = -1e20

State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Softmax:
    """How keys are taken in.

    Attributes:
      width: of a value.
      scale: of scores, above 0.
      dtype: of what is multiplied with values, and of the result.
      interpret: runs on a CPU.
    """

    width: int
    scale: float
    dtype: jnp.dtype
    interpret: bool

    factor = property(lambda self: self.scale * LOG2E)

    def start(self) -> State:
        """The state before the first tile, as a carry."""
        row_vector = functools.partial(jnp.full, (M,), dtype=jnp.float32)
        top, total = (
            plgpu.layout_cast(row_vector(x), LAYOUT.reduce(1)) for x in (LOWEST, 0.0)
        )
        return tiles.zeros(M, self.width), top, total

    def after(self, out: jax.Array, lse: jax.Array) -> State:
        """The state after another part, from its float32 result."""
        # EMPTY * LOG2E - top may be contracted to a multiply-add, whose rounding
        # residue (1e22) would make exp2 infinite: keep EMPTY away.
        top = jnp.maximum(lse * LOG2E, LOWEST)
        return out, top, jnp.ones_like(top)

    def add(self, state: State | None, scores, products, before_values=None) -> State:
        """Take in score tiles, -inf where a key is not seen.

        products: of each tile, a function from its weights to (weights, values) pairs:
        what is to be multiplied, values() in shared memory.
        """
        tops = functools.reduce(jnp.maximum, [s.max(axis=1) for s in scores])
        tops = tops * self.factor
        if state is None:
            top = jnp.maximum(tops, LOWEST)
            out, total = tiles.zeros(M, self.width), jnp.zeros_like(top)
        else:
            out, before, total = state
            top = jnp.maximum(before, tops)
            shrink = jnp.exp2(before - top)
            total = total * shrink
            out = out * tiles.per_row(shrink, out)
        weights = [jnp.exp2(s * self.factor - tiles.per_row(top, s)) for s in scores]
        for w in weights:
            total = total + w.sum(axis=1)
        pairs = [
            (0, part.astype(self.dtype), values)
            for w, parts in zip(weights, products, strict=True)
            for part, values in parts(w)
        ]
        if before_values is not None:
            before_values()
        (out,) = tiles.accumulate((out,), pairs, self.interpret)
        return out, top, total

    def add_tile(self, state: State, queries, keys, values, mask) -> State:
        """Take in one tile of keys, in shared memory, and its values()."""
        (scores,) = tiles.multiply((queries, keys.transpose((1, 0))))
        return self.add(state, [mask(scores)], [lambda p: [(p, values)]])

    def finish(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Return (out, natural log-sum-exp); out 0 and EMPTY for a row without keys."""
        out, top, total = state
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = (jnp.where(some, top, EMPTY) + jnp.log2(total)) * (1 / LOG2E)
        return (out * tiles.per_row(1 / total, out)).astype(self.dtype), lse
