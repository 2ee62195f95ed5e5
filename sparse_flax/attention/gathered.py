"""Any device: gathered blocks and strided views in plain JAX.

Each core is a small dense problem; memory and compute grow with the keys that are seen,
never with T x T. No custom gradient, so jvp and derivatives of any order work. Where a
core's logits would pass `LOGITS`, or the rows of a causal one `ROWS`, its query rows
are walked in chunks, each rematerialised in the backward pass; under `jax.vmap` that
holds for each example, so give a batch as a batch. Masked pairs are computed too where
a block holds them: about as many as are seen, or more where a window is below
`SMALLEST_BLOCK`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_flax.attention import heads, parts, union
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern

# At most so many logits of one core exist at a time: 1 GiB in float32.
LOGITS = 2**28

# Query rows of a causal core that are walked at a time: dense attention over T tokens
# then needs memory for ROWS * T logits, not T * T.
ROWS = 512

# Queries that one block of a window holds: fewer make poor matrix products, more
# compute too many masked pairs.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 512


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> None:
    """Return None: everything."""


def supports_parts(some_parts: Sequence[Part], q: Any, k: Any, v: Any) -> None:
    """Return None: all of them."""


def runs_on(device_kind: str) -> None:
    """Return None: everywhere."""


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
) -> jax.Array:
    """Return out_BTHV in v's dtype; heads that see the same keys run together."""

    def run(q, k, v, head):
        out, _ = attend_parts(q, k, v, pattern.parts(head), scale)
        return out

    out_BTHV = heads.by_period(run, q_BTHK, k_BTHK, v_BTHV, pattern.head_period)
    return out_BTHV.astype(v_BTHV.dtype)


def attend_parts(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    some_parts: Sequence[Part],
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Return (out_BTHV, lse_BTH) in float32 over the union of disjoint parts."""
    T, H = q_BTHK.shape[1:3]
    pieces = []
    for part in some_parts:
        if not isinstance(part, parts.Everything) and not part.pairs(T):
            continue  # it sees nothing, and would be padded to a whole stride or block
        q, k, v = part.fold_q(q_BTHK), part.fold_kv(k_BTHK), part.fold_kv(v_BTHV)
        out, lse = CORES[type(part.core)](part.core, q, k, v, scale)
        pieces.append((part.unfold(out, T, H), part.unfold(lse, T, H)))
    return union.merge_all(pieces)


# ---- Cores: (core, q, k, v, scale) -> (out, lse), on folded views ------------------


def _causal(core: parts.Causal, q, k, v, scale):
    j = jnp.arange(k.shape[1])
    return _walk(q, k, v, lambda i: i[:, None] >= j + int(core.strict), scale, ROWS)


def _block_causal(core: parts.BlockCausal, q, k, v, scale):
    j = jnp.arange(k.shape[1]) // core.k_block
    return _walk(q, k, v, lambda i: i[:, None] // core.q_block > j, scale)


def _window(core: parts.Window, q, k, v, scale):
    """Blocks of queries against their own and the previous block(s) of keys."""
    B, T, H, _ = q.shape
    width = min(core.width, T)
    size = min(max(width, SMALLEST_BLOCK), LARGEST_BLOCK, T)
    behind = -(-(width - 1) // size)
    blocks = -(-T // size)

    def to_blocks(x, before):
        x = jnp.pad(x, [(0, 0), (before * size, -T % size), (0, 0), (0, 0)])
        return x.reshape(B, blocks + before, size, *x.shape[2:])

    def with_previous(x):
        x = to_blocks(x, behind)
        views = [x[:, back : back + blocks] for back in range(behind + 1)]
        return jnp.concatenate(views, axis=2).reshape(B * blocks, -1, *x.shape[3:])

    j = jnp.arange((behind + 1) * size) - behind * size
    inside = j + size * jnp.arange(blocks)[:, None] >= 0  # not the padding in front
    inside = jnp.tile(inside, (B, 1))[:, None, None, None, :]

    def allowed(i):
        distance = i[:, None] - j
        return inside & (0 <= distance) & (distance < width)

    q = to_blocks(q, 0).reshape(B * blocks, size, H, -1)
    out, lse = _walk(q, with_previous(k), with_previous(v), allowed, scale)
    out, lse = (x.reshape(B, blocks * size, *x.shape[2:]) for x in (out, lse))
    return out[:, :T], lse[:, :T]


def _diagonal(core: parts.Diagonal, q, k, v, scale):
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    lse = jnp.einsum("BTHK,BTHK->BTH", q, k, preferred_element_type=jnp.float32)
    return v.astype(jnp.float32), lse * scale


def _full(core: parts.Full, q, k, v, scale):
    return _walk(q, k, v, lambda i: jnp.bool(True), scale, ROWS)


CORES: dict[type, Callable[..., tuple[jax.Array, jax.Array]]] = {
    parts.Causal: _causal,
    parts.Window: _window,
    parts.BlockCausal: _block_causal,
    parts.Diagonal: _diagonal,
    parts.Full: _full,
}


# ---- The small dense problem -------------------------------------------------------

Allowed = Callable[[jax.Array], jax.Array]  # query rows [Q] -> bool [..., Q, S]


def _walk(q, k, v, allowed: Allowed, scale, most_rows: int = LOGITS):
    """Attend with all query rows at once or, where that is too much, in chunks."""
    B, T, H, K = q.shape
    rows = min(max(LOGITS // (B * H * k.shape[1]), 1), most_rows)
    if rows >= T:
        return _attend_rows(q, k, v, allowed(jnp.arange(T)), scale)
    rows = 1 << (rows.bit_length() - 1)
    steps = -(-T // rows)
    chunks = jnp.pad(q, [(0, 0), (0, steps * rows - T), (0, 0), (0, 0)])
    chunks = jnp.moveaxis(chunks.reshape(B, steps, rows, H, K), 1, 0)

    def chunk(start_and_q):
        start, q_chunk = start_and_q
        return _attend_rows(q_chunk, k, v, allowed(start + jnp.arange(rows)), scale)

    starts = rows * jnp.arange(steps)
    out, lse = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), (starts, chunks))
    out, lse = (jnp.moveaxis(x, 0, 1) for x in (out, lse))
    return tuple(x.reshape(B, steps * rows, *x.shape[3:])[:, :T] for x in (out, lse))


def _attend_rows(q, k, v, mask, scale):
    """Softmax attention of q [B,Q,H,K] over k [B,S,H_kv,K]; a row may see nothing."""
    B, T, H, _ = q.shape
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], -1)
    logits_BHGTS = jnp.einsum(
        "BTHGK,BSHK->BHGTS", q, k, preferred_element_type=jnp.float32
    )
    logits_BHGTS = jnp.where(mask, logits_BHGTS * scale, -jnp.inf)
    # The shift cancels, so it takes no part in the gradient; 0 for an empty row.
    top = jax.lax.stop_gradient(jnp.max(logits_BHGTS, axis=-1, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights_BHGTS = jnp.exp(logits_BHGTS - top[..., None])
    total = jnp.sum(weights_BHGTS, axis=-1)
    seen = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum(
        "BHGTS,BSHV->BTHGV",
        # Divided before they are rounded, as their gradient is made of the quotient.
        (weights_BHGTS / seen[..., None]).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    lse = jnp.moveaxis(jnp.where(total > 0, top + jnp.log(seen), -jnp.inf), 3, 1)
    return out.reshape(B, T, H, -1), lse.reshape(B, T, H)
