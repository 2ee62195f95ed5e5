"""Columns, the band, or both under one softmax, with a gradient of their own.

The columns come first and the band goes on from their (out, log-sum-exp). Backward,
both get the merged (out, log-sum-exp) and the band adds to the columns' gradients:
exact, since a probability of the union is exp(logit - lse of the union) in either.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparse_flax.attention import parts
from sparse_flax.attention.hopper import (
    band,
    band_ring,
    columns,
    columns_backward,
    long_columns,
    tiles,
)
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern

LONGEST_COLUMN = 256  # rows: what fits a block's memory, and one TMA copy
LONGEST_WIDE_COLUMN = 128  # where K or V is 128
WIDEST_WINDOW = 512


@dataclasses.dataclass(frozen=True)
class Halves:
    """What is attended to: the last `window` keys, every `stride`-th one, or both."""

    window: int | None
    stride: int | None
    scale: float = 1.0
    interpret: bool = False

    @classmethod
    def of(cls, some_parts: Sequence[Part], T: int, **settings) -> Halves | None:
        """Read them off a pattern's parts; None if there are others."""
        window = stride = None
        for part in some_parts:
            if isinstance(part, parts.Band):
                window = min(part.width, T)
            elif isinstance(part, parts.Columns):
                stride = part.stride
            else:
                return None
        return cls(window, stride, **settings)


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> str | None:
    """Return None, or the sentence that says what does not fit."""
    T = q.shape[1]
    halves = Halves.of(pattern.parts(), T)
    if halves is None:
        name = type(pattern).__name__
        return f"hopper has no kernels for {name}"
    K, V = (tiles.M * _tiles(x.shape[3]) for x in (q, v))
    window, stride = halves.window, halves.stride
    if stride:
        rows, most = -(-T // stride), LONGEST_COLUMN
        if max(K, V) > tiles.M:
            most = LONGEST_WIDE_COLUMN
        if not 8 <= rows <= most:
            best = -(-T // most) if rows > most else max(T // 8, 1)
            return (
                f"hopper keeps a whole column on chip, 8 to {most} rows at widths {K} "
                f"and {V}; {T} tokens at stride {stride} make {rows}: try stride {best}"
            )
    if window:
        memory = band.forward_memory(window, K, V, 1)
        if not 2 <= window <= WIDEST_WINDOW or memory > tiles.SHARED_MEMORY:
            room = (tiles.SHARED_MEMORY - band.forward_memory(1, K, V, 1)) // (
                tiles.M * (K + V) * 2
            )
            most = min(WIDEST_WINDOW, room * tiles.M + 1)
            return (
                f"hopper keeps a window on chip, 2 to {most} keys at widths {K} and "
                f"{V}, not {window}; try {min(max(window, 2), most)}"
            )
    return None


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Return out_BTHV in v's dtype; the arguments are what `supports` lets pass."""
    T, K, V = q_BTHK.shape[1], q_BTHK.shape[3], v_BTHV.shape[3]
    halves = Halves.of(pattern.parts(), T, scale=scale, interpret=interpret)
    # Zeros behind the last column of q and k change no product; wgmma takes 64s.
    widths = [tiles.M * _tiles(width) for width in (K, K, V)]
    args = [
        _fit(x, width, 3)
        for x, width in zip((q_BTHK, k_BTHK, v_BTHV), widths, strict=True)
    ]
    return _attend(halves, *args)[..., :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(halves: Halves, q, k, v):
    return _over_batch(functools.partial(_forward, halves), q, k, v)[0]


def _attend_forward(halves, q, k, v):
    out, lse = _over_batch(functools.partial(_forward, halves), q, k, v)
    # Without it XLA runs the kernel twice in a scan over layers: once for what comes
    # after, and once into the stack of results that the backward pass will read.
    out, lse = jax.lax.optimization_barrier((out, lse))
    # Named here, so that a policy of jax.checkpoint can keep them.
    out, lse = (
        checkpoint_name(out, "attention_out"),
        checkpoint_name(lse, "attention_lse"),
    )
    return out, (q, k, v, out, lse)


def _attend_backward(halves, residuals, d_out):
    return _over_batch(functools.partial(_backward, halves), *residuals, d_out)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(halves: Halves, q, k, v):
    """Return (out_BTHV, lse): lse_BHT, but lse_BCR of columns alone."""
    T, H = q.shape[1:3]
    window, stride, run = halves.window, halves.stride, {"interpret": halves.interpret}
    init = None
    if stride:
        folded = [_fold(x, stride) for x in (q, k, v)]
        out, lse = columns.forward(
            *folded, halves.scale, strict=window is not None, **run
        )
        out = _unfold(out, T, H)
        if not window:
            return out, lse
        init = out, _by_token(lse, stride, T)
    warpgroups, _ = band.settings(window, q.shape[3], v.shape[3])
    padded = _up(T, tiles.M * warpgroups)
    if init:
        init = _fit(init[0], padded, 1), _fit(init[1], padded, 2)
    args = [_fit(x, padded, 1) for x in (q, k, v)]
    out, lse = band.forward(*args, halves.scale, window, init=init, **run)
    return out[:, :T], lse[:, :, :T]


def _backward(halves: Halves, q, k, v, out, lse, d_out):
    """Return (dq, dk, dv), given what `_forward` returned."""
    T, H = q.shape[1:3]
    window, stride, run = halves.window, halves.stride, {"interpret": halves.interpret}
    into = None
    if stride:
        folded = [_fold(x, stride) for x in (q, k, v, out, d_out)]
        by_column = _by_column(lse, stride) if window else lse
        long = folded[0].shape[1] > LONGEST_WIDE_COLUMN
        backward = (long_columns if long else columns_backward).backward
        *into, delta = backward(
            *folded[:4],
            by_column,
            folded[4],
            halves.scale,
            strict=window is not None,
            **run,
        )
        into = [_unfold(x, T, H) for x in into]
        delta = _by_token(delta, stride, T) if window else None
    else:
        delta = jnp.einsum(
            "BTHV,BTHV->BHT", out, d_out, preferred_element_type=jnp.float32
        )
    if window:
        padded = _up(T, tiles.M)
        args = [_fit(x, padded, 1) for x in (q, k, v, d_out)]
        args += [_fit(x, padded, 2) for x in (lse, delta)]
        if into:
            into = [_fit(x, padded, 1) for x in into]
        backward = (band if window <= 2 * tiles.M else band_ring).backward
        into = backward(*args, halves.scale, window, into=into, **run)
    dq, dk, dv = (x[:, :T] for x in into)
    return dq, _sum_groups(dk, k.shape[2]), _sum_groups(dv, k.shape[2])


# ---- Layouts -----------------------------------------------------------------------


def _fold(x_BTHK, stride: int):
    """(B, T, H, K) -> (B, R, S*H, K), with R as the kernels want it."""
    rows = -(-x_BTHK.shape[1] // stride)
    rows = _up(rows, 8 if rows <= LONGEST_WIDE_COLUMN else tiles.M)
    x = _fit(x_BTHK, rows * stride, 1)
    return x.reshape(x.shape[0], rows, stride * x.shape[2], x.shape[3])


def _unfold(x_BRCK, T: int, H: int):
    return x_BRCK.reshape(x_BRCK.shape[0], -1, H, x_BRCK.shape[3])[:, :T]


def _by_token(x_BCR, stride: int, T: int):
    """(B, S*H, R) -> (B, H, T)."""
    B, C, R = x_BCR.shape
    x = x_BCR.reshape(B, stride, C // stride, R).transpose(0, 2, 3, 1)
    return x.reshape(B, C // stride, R * stride)[:, :, :T]


def _by_column(x_BHT, stride: int):
    """(B, H, T) -> (B, S*H, R)."""
    folded = _fold(x_BHT.transpose(0, 2, 1)[..., None], stride)
    return folded[..., 0].transpose(0, 2, 1)


def _fit(x, size: int, axis: int):
    """Pad with zeros. Padded keys lie after every real query."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _sum_groups(x_BTHK, heads: int):
    """Add up the gradients of the query heads that share a key head."""
    B, T, H, K = x_BTHK.shape
    if heads == H:
        return x_BTHK
    x = x_BTHK.reshape(B, T, heads, H // heads, K)
    return jnp.sum(x, axis=3, dtype=jnp.float32).astype(x.dtype)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _tiles(width: int) -> int:
    return -(-width // tiles.M)


def _over_batch(run, *args):
    """Call run; under vmap, join the mapped axis to the batch.

    A kernel mapped as it is would gain a dimension, and its copies may have five.
    """
    mapped = jax.custom_batching.custom_vmap(run)

    @mapped.def_vmap
    def _(size, in_batched, *args):
        args = [
            x if batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, batched in zip(args, in_batched, strict=True)
        ]
        outs = _over_batch(run, *(x.reshape(-1, *x.shape[2:]) for x in args))
        outs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in outs)
        return outs, (True,) * len(outs)

    return mapped(*args)
