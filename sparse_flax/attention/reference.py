"""The oracle: dense masked softmax in float32. Slow, obvious, never optimised."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_flax.attention.patterns import Pattern


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> None:
    """Return None: everything."""


def runs_on(device_kind: str) -> None:
    """Return None: everywhere."""


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
) -> jax.Array:
    """Return out_BTHV in v's dtype, through a T x T matrix for every head."""
    T, H = q_BTHK.shape[1:3]
    group = H // k_BTHK.shape[2]
    k_BTHK = jnp.repeat(k_BTHK.astype(jnp.float32), group, axis=2)
    values_BTHV = jnp.repeat(v_BTHV.astype(jnp.float32), group, axis=2)
    masks = [pattern.mask(T, head) for head in range(min(H, pattern.head_period))]
    mask_HTT = np.stack([masks[head % len(masks)] for head in range(H)])
    with jax.default_matmul_precision("highest"):
        logits_BHTT = jnp.einsum(
            "BTHK,BSHK->BHTS", q_BTHK.astype(jnp.float32) * scale, k_BTHK
        )
        weights_BHTT = jax.nn.softmax(jnp.where(mask_HTT, logits_BHTT, -jnp.inf))
        out_BTHV = jnp.einsum("BHTS,BSHV->BTHV", weights_BHTT, values_BTHV)
    return out_BTHV.astype(v_BTHV.dtype)
