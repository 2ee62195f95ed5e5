"""Attention over a union of pieces whose gradients are kernels' own.

A piece is a re-layout of q, k and v around one small problem, which a core computes.
Backward, every piece gets the merged (out, log-sum-exp) and the gradients add up:
exact, since a probability of the union is exp(logit - lse of the union) in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparse_flax.attention import union

Fold = Callable[[jax.Array], jax.Array]


class Core(NamedTuple):
    """Attention of q [B, Q, H, W] over k and v [B, S, H_kv, W].

    forward(q, k, v, *args) -> (out [B, Q, H, W], lse [B, Q, H])
    backward(q, k, v, out, lse, d_out, *args) -> (dq, dk, dv)
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Piece(Protocol):
    """A re-layout around one call. Queries that `fold_q` leaves out see nothing."""

    @property
    def fold_q(self) -> Fold:
        """Of queries."""

    @property
    def fold_kv(self) -> Fold:
        """Of keys and values."""


class Union(Protocol):
    """What is attended to, and what computes it; hashable."""

    def calls(self, q: jax.Array) -> Iterator[tuple[Piece, Core, tuple]]:
        """Each piece with its core and the core's last arguments."""


def forward(what: Union, q, k, v):
    """Return (out_BTHV, lse_BTH) of the union."""
    done = []
    for piece, core, args in what.calls(q):
        folds = piece.fold_q, piece.fold_kv, piece.fold_kv
        folded = (fold(x) for fold, x in zip(folds, (q, k, v), strict=True))
        out, lse = core.forward(*folded, *args)
        out = _unfold(piece, q, out).astype(jnp.float32)
        lse, seen = (
            _unfold(piece, q, x[..., None])[..., 0] for x in (lse, jnp.ones_like(lse))
        )
        # Queries that the piece leaves out see nothing in it.
        done.append((out, jnp.where(seen > 0, lse, -jnp.inf)))
    out, lse = union.merge_all(done)
    return out.astype(v.dtype), lse


def _unfold(piece: Piece, q, x):
    """Undo fold_q; 0 at queries that it leaves out."""
    like = jnp.broadcast_to(q[..., :1], (*q.shape[:3], x.shape[3]))
    # Folds are linear and only move numbers, so their transpose unfolds.
    return jax.vjp(piece.fold_q, like.astype(x.dtype))[1](x)[0]


def backward(what: Union, q, k, v, out, lse, d_out):
    """Return (dq, dk, dv), given what `forward` returned."""
    total: list = [0.0, 0.0, 0.0]
    for piece, core, args in what.calls(q):
        folds = piece.fold_q, piece.fold_kv, piece.fold_kv
        folded = [jax.vjp(f, x) for f, x in zip(folds, (q, k, v), strict=True)]
        lse_piece = piece.fold_q(lse[..., None])[..., 0]
        rest = piece.fold_q(out), lse_piece, piece.fold_q(d_out)
        grads = core.backward(*(x for x, _ in folded), *rest, *args)
        for i, ((x, unfold), grad) in enumerate(zip(folded, grads, strict=True)):
            total[i] += unfold(grad.astype(x.dtype))[0].astype(jnp.float32)
    return tuple(x.astype(q.dtype) for x in total)
