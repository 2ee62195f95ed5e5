"""Heads that see the same keys run together."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def by_period(
    run: Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array],
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    period: int,
) -> jax.Array:
    """Call run(q, k, v, head) for heads head, head + period, ...; return all of them.

    Key heads may be fewer than query heads; each call gets those that it needs.
    """
    H = q_BTHK.shape[2]
    if period == 1:
        return run(q_BTHK, k_BTHK, v_BTHV, 0)
    group = H // k_BTHK.shape[2]
    outs: dict[int, jax.Array] = {}
    for first in range(min(period, H)):
        heads = range(first, H, period)
        k, v = (_key_heads(x, heads, group) for x in (k_BTHK, v_BTHV))
        out = run(q_BTHK[:, :, first::period], k, v, first)
        outs |= {head: out[:, :, place] for place, head in enumerate(heads)}
    return jnp.stack([outs[head] for head in range(H)], axis=2)


def _key_heads(x_BTHK: jax.Array, heads: range, group: int) -> jax.Array:
    """Take the key (or value) head of each query head in `heads`.

    By slices: the transpose of a gather is a scatter, which a GPU adds up in no fixed
    order.
    """
    if group == 1:
        return x_BTHK[:, :, heads.start :: heads.step]
    return jnp.stack([x_BTHK[:, :, head // group] for head in heads], axis=2)
