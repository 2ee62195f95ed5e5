"""What one tile of keys, or of queries, adds on a walk: the inner loops.

For loops that are loops in the kernel, too, whose state is a carry; `tiles` has the
like for loops that Python unrolls.

The masks come before the scale, which must be above 0: then the scale and the
subtraction after it are one instruction.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.tiles import EMPTY, LAYOUT, LOG2E, LOWEST, M


def nothing_yet(values_width):
    """The state of a softmax before its first key: sum, largest score, weight."""
    row_vector = functools.partial(jnp.full, (M,), dtype=jnp.float32)
    top, total = (
        plgpu.layout_cast(row_vector(x), LAYOUT.reduce(1)) for x in (LOWEST, 0.0)
    )
    return tiles.zeros(M, values_width), top, total


def attend(carry, queries, keys, values, mask, factor, dtype, interpret):
    """Take a tile of keys, in shared memory, into the softmax of 64 queries."""
    acc, top, total = carry
    (s,) = tiles.multiply((queries, keys.transpose((1, 0))))
    s = mask(s)
    new = jnp.maximum(top, s.max(axis=1) * factor)
    shrink = jnp.exp2(top - new)
    p = jnp.exp2(s * factor - tiles.per_row(new, s))
    total = total * shrink + p.sum(axis=1)
    acc = acc * tiles.per_row(shrink, acc)
    pairs = [(0, p.astype(dtype), values)]
    (acc,) = tiles.accumulate((acc,), pairs, interpret)
    return acc, new, total


def finish(carry, dtype):
    """Return (out, natural log-sum-exp); out 0 and EMPTY for a row without keys."""
    acc, top, total = carry
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = (jnp.where(some, top, EMPTY) + jnp.log2(total)) * (1 / LOG2E)
    return (acc * tiles.per_row(1 / total, acc)).astype(dtype), lse


def add_query_gradients(acc, own, others, mask, factor, dtype, interpret):
    """Add to dq / scale of the own queries what a tile of keys gives."""
    (queries, d_out, lse_row, delta_row), (keys, values) = own, others

    def weights(s):
        return jnp.exp2(mask(s) * factor - tiles.per_row(lse_row, s))

    p, dp = tiles.weigh([(queries, keys()), (d_out, values())], weights, interpret)
    ds = (p * (dp - tiles.per_row(delta_row, dp))).astype(dtype)
    return tiles.accumulate((acc,), [(0, ds, keys)], interpret)[0]


def add_key_gradients(sums, operands, row_values, mask, factor, dtype, interpret):
    """Add to (dv, dk / scale) of the own keys what a tile of queries gives.

    operands() is (k, v, q, d_out) and row_values() the queries' (lse, delta).
    """
    return tiles.add_key_gradients(
        sums,
        operands,
        lambda s: column_weights(mask(s), row_values()[0], factor),
        lambda p, dp: column_slopes(p, dp, row_values()[1]),
        dtype,
        interpret,
    )


def column_weights(s, lse, factor):
    """Return probabilities from scores, keys by queries, and a row of log-sum-exp."""
    lse = plgpu.load(lse, layout=LAYOUT.reduce(0)) * LOG2E
    return jnp.exp2(s * factor - tiles.per_column(lse, s))


def column_slopes(p, dp, delta):
    """Return the scores' gradients, keys by queries."""
    delta = plgpu.load(delta, layout=LAYOUT.reduce(0))
    return p * (dp - tiles.per_column(delta, dp))
