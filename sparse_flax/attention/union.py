"""Attention over a union of disjoint key sets, from attention over each."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp


def merge(
    out1: jax.Array, lse1: jax.Array, out2: jax.Array, lse2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merge attention over two disjoint sets of keys into attention over both.

    Args:
      out1, out2: [..., V], softmax-weighted means of the values of each set.
      lse1, lse2: [...] float32, log-sum-exp of the scaled logits of each set;
        -inf for a query whose set is empty (its out must then be finite).

    Returns:
      (out, lse) of the union, out in the wider of the two dtypes, lse in float32. Both
      are differentiable, to any order, through all four arguments; a query that sees
      nothing in either set gives out 0 and lse -inf, never NaN.
    """
    lse1, lse2 = lse1.astype(jnp.float32), lse2.astype(jnp.float32)
    # A constant shift: it cancels in the value, so it takes no part in the gradient.
    top = jax.lax.stop_gradient(jnp.maximum(lse1, lse2))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weight1, weight2 = jnp.exp(lse1 - top), jnp.exp(lse2 - top)
    total = weight1 + weight2
    # The inner where keeps log and division away from 0: an unused branch whose
    # derivative is infinite would turn the gradient into NaN.
    seen = jnp.where(total > 0, total, 1.0)
    out = (weight1 / seen)[..., None] * out1 + (weight2 / seen)[..., None] * out2
    lse = jnp.where(total > 0, top + jnp.log(seen), -jnp.inf)
    return out.astype(jnp.promote_types(out1.dtype, out2.dtype)), lse


def merge_all(
    pieces: Iterable[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Merge any number of (out, lse) over pairwise disjoint sets of keys."""
    return functools.reduce(lambda a, b: merge(*a, *b), pieces)
