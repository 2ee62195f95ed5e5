"""What one tile of keys, or of queries, adds to gradients on a walk: the inner loops.

The masks come before the scale, which must be above 0: then the scale and the
subtraction after it are one instruction.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E


def from_keys(acc, own, others, mask, factor, dtype, interpret):
    """Add to dq / scale of the own queries what a tile of keys gives."""
    (queries, d_out, lse_row, delta_row), (keys, values) = own, others

    def weights(s):
        return jnp.exp2(mask(s) * factor - tiles.per_row(lse_row, s))

    p, dp = tiles.weigh([(queries, keys()), (d_out, values())], weights, interpret)
    ds = (p * (dp - tiles.per_row(delta_row, dp))).astype(dtype)
    return tiles.accumulate((acc,), [(0, ds, keys)], interpret)[0]


def from_queries(sums, operands, row_values, mask, factor, dtype, interpret):
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
