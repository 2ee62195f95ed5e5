"""Columns, the band, or both under one softmax, with a gradient of their own.

The columns come first and the band goes on from their (out, log-sum-exp). Backward,
both get the merged (out, log-sum-exp) and the band adds to the columns' gradients:
exact, since a probability of the union is exp(logit - lse of the union) in either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from sparse_flax.attention import parts
from sparse_flax.attention.hopper import (
    band,
    band_ring,
    band_walk,
    columns,
    columns_backward,
    long_columns,
    span_backward,
    span_forward,
    tiles,
)
from sparse_flax.attention.hopper.spans import Grid, Span
from sparse_flax.attention.layouts import (
    attend_by,
    fit,
    positive,
    row_products,
    sum_groups,
    up,
)
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern

# What goes through span_forward.py and span_backward.py: all that is beyond these.
LONGEST_COLUMN = 256  # rows: what fits a block's memory, and one TMA copy
# Where K or V is over 64; in columns_backward.py; and from where on `_fold` makes rows
# a multiple of 64, as long_columns.py and the spans want them.
LONGEST_WIDE_COLUMN = 128
WIDEST_WINDOW = 512  # in band.py's forward, if its keys fit a block's memory
WIDEST_RING_WINDOW = 512  # in band_ring.py


@dataclasses.dataclass(frozen=True)
class Halves:
    """What is attended to: the last `window` keys, every `stride`-th one, or both.

    Of every `stride`-th key, `strict` leaves out the query's own.
    """

    window: int | None
    stride: int | None
    strict: bool = False
    scale: float = 1.0
    interpret: bool = False
    union: bool = True  # whether other parts may need log-sum-exps and deltas

    @property
    def by_token(self) -> bool:
        """Whether a value a row is (B, H, T); of columns alone it is (B, S*H, R)."""
        return self.union or bool(self.window)

    @classmethod
    def of(cls, some_parts: Sequence[Part], T: int, **settings) -> Halves | None:
        """Read them off a pattern's parts; None if there are others."""
        window, stride, strict = None, None, False
        for part in some_parts:
            if isinstance(part, parts.Band):
                window = min(part.width, T)
            elif isinstance(part, parts.Columns):
                stride, strict = min(part.stride, T), part.strict
            else:
                return None
        if stride and stride >= T:  # no earlier token is so far away
            if window:
                stride = None
            elif not strict:
                window, stride = 1, None
        return cls(window, stride, strict, **settings)


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> str | None:
    """Return None, or the sentence that says what does not fit."""
    halves = Halves.of(pattern.parts(), q.shape[1])
    if halves is None:
        return f"hopper has no kernels for {type(pattern).__name__}"
    B, T, H, K = q.shape
    most, stride = 0, halves.stride
    if stride and -(-T // stride) > LONGEST_WIDE_COLUMN:  # which may go to the spans
        cut = span_forward.cut_of(K, v.shape[3])
        most = Grid(B, -(-T // stride), stride * H, cut).axes["far"]
    return tiles.too_many(pattern, q, most)


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Return out_BTHV in v's dtype; the arguments are what `supports` lets pass."""
    T, V = q_BTHK.shape[1], v_BTHV.shape[3]
    scale, q_BTHK = positive(scale, q_BTHK)
    halves = Halves.of(
        pattern.parts(), T, scale=scale, interpret=interpret, union=False
    )
    args = _widened(q_BTHK, k_BTHK, v_BTHV)
    return attend_by(_forward, _backward, halves, *args)[..., :V]


def attend_parts(q_BTHK, k_BTHK, v_BTHV, some_parts, scale, interpret=False):
    """Return (out_BTHV, lse_BTH) of a band, of columns or of both."""
    T, V = q_BTHK.shape[1], v_BTHV.shape[3]
    scale, q_BTHK = positive(scale, q_BTHK)
    halves = Halves.of(some_parts, T, scale=scale, interpret=interpret)
    out, lse = _forward(halves, *_widened(q_BTHK, k_BTHK, v_BTHV))
    return out[..., :V], lse.swapaxes(1, 2)


def parts_gradients(
    q_BTHK, k_BTHK, v_BTHV, out, lse_BTH, d_out, some_parts, scale, interpret=False
):
    """Return (dq, dk, dv); out and lse_BTH may be of a union with other parts."""
    q, back_q = jax.vjp(lambda q: positive(scale, q)[1], q_BTHK)
    scale = positive(scale, q)[0]
    halves = Halves.of(some_parts, q.shape[1], scale=scale, interpret=interpret)
    args = _widened(q, k_BTHK, v_BTHV)
    out, d_out = (fit(x, args[2].shape[3], 3) for x in (out, d_out))
    dq, dk, dv = _backward(halves, *args, out, lse_BTH.swapaxes(1, 2), d_out)
    dq, dk = (x[..., : q.shape[3]] for x in (dq, dk))
    return *back_q(dq), dk, dv[..., : v_BTHV.shape[3]]


def _widened(q, k, v) -> list[jax.Array]:
    """Widen heads; zeros behind the last column change no product."""
    return [fit(x, tiles.width_of(x.shape[3]), 3) for x in (q, k, v)]


def _forward(halves: Halves, q, k, v):
    """Return (out_BTHV, lse), a `by_token` one as (B, H, T)."""
    T, H = q.shape[1:3]
    window, stride = halves.window or 0, halves.stride or 0
    run: dict[str, Any] = {"interpret": halves.interpret}
    init = None
    if stride:
        folded, strict = [_fold(x, stride) for x in (q, k, v)], halves.strict
        if _column_fits(*folded):
            out, lse = columns.forward(
                *(*folded, halves.scale),
                heads=H,
                strict=strict,
                by_token=halves.by_token,
                **run,
            )
            if halves.by_token:
                lse = lse[:, :, :T]
        else:
            out, lse = span_forward.forward(
                *(*folded, halves.scale, Span(int(strict))), **run
            )
            if halves.by_token:
                lse = _by_token(lse, stride, T)
        out = _unfold(out, T, H)
        if not window:
            return out, lse
        init = out, lse
    memory = band.forward_memory(window, q.shape[3], v.shape[3], 1)
    on_chip = 2 <= window <= WIDEST_WINDOW and memory <= tiles.SHARED_MEMORY
    warpgroups = band.settings(window, q.shape[3], v.shape[3])[0] if on_chip else 1
    padded = up(T, tiles.M * warpgroups)
    if init:
        init = fit(init[0], padded, 1), fit(init[1], padded, 2)
    args: list[Any] = [fit(x, padded, 1) for x in (q, k, v)]
    if on_chip:
        args += [halves.scale, window]
        out, lse = band.forward(*args, init=init, **run)
    else:
        args += [halves.scale, Span(window=window)]
        out, lse = span_forward.forward(*args, init=init, **run)
    return out[:, :T], lse[:, :, :T]


def _backward(halves: Halves, q, k, v, out, lse, d_out):
    """Return (dq, dk, dv), given what `_forward` returned."""
    T, H = q.shape[1:3]
    window, stride = halves.window or 0, halves.stride or 0
    run: dict[str, Any] = {"interpret": halves.interpret}
    into: Any = None
    delta: Any = None
    if stride:
        folded = [_fold(x, stride) for x in (q, k, v, out, d_out)]
        strict = halves.strict
        backward = _columns_backward(*folded[:3])
        if backward:
            *into, delta = backward(
                *(*folded[:4], lse, folded[4], halves.scale),
                heads=H,
                strict=strict,
                by_token=halves.by_token,
                **run,
            )
            if halves.by_token:
                delta = delta[:, :, :T]
        else:
            if halves.by_token:
                delta = row_products(out, d_out)
                rows = [_by_column(x, stride) for x in (lse, delta)]
            else:
                rows = [lse, row_products(*folded[3:])]
            span = Span(int(strict))
            into = span_backward.backward(
                *(*folded[:3], folded[4], *rows, halves.scale, span), **run
            )
        into = [_unfold(x, T, H) for x in into]
    else:
        delta = row_products(out, d_out)
    if window:
        padded = up(T, tiles.M)
        args: list[Any] = [fit(x, padded, 1) for x in (q, k, v, d_out)]
        args += [fit(x, padded, 2) for x in (lse, delta)]
        if into:
            into = [fit(x, padded, 1) for x in into]
        K, V = q.shape[3], v.shape[3]
        backward, reach = _window_backward(window, K, V, adds=bool(into))
        if backward is band_walk.backward and not into and band_walk.makes_delta(K, V):
            run["out_BTHV"] = fit(out, padded, 1)
            args[-1] = None
        into = backward(*args, halves.scale, reach, into=into, **run)
    dq, dk, dv = (x[:, :T] for x in into)
    return dq, sum_groups(dk, k.shape[2]), sum_groups(dv, k.shape[2])


def _column_fits(q_BRCK, k_BRCK, v_BRCV) -> bool:
    """Whether a block's memory holds a column."""
    wide = max(q_BRCK.shape[3], v_BRCV.shape[3]) > tiles.M
    return q_BRCK.shape[1] <= (LONGEST_WIDE_COLUMN if wide else LONGEST_COLUMN)


def _columns_backward(q_BRCK, k_BRCK, v_BRCV):
    """The kernel that makes the gradient of a column on chip; None if there is none."""
    R, _, K = q_BRCK.shape[1:]
    if R <= LONGEST_WIDE_COLUMN:
        return columns_backward.backward
    if R <= LONGEST_COLUMN and K == v_BRCV.shape[3] == tiles.M:
        return long_columns.backward
    return None


def _window_backward(window: int, K: int, V: int, adds: bool):
    """The kernel that makes the gradient of a window, and what it calls that window."""
    if band_walk.supports(window, K, V, adds):
        return band_walk.backward, window
    if 2 <= window <= 2 * tiles.M:
        return band.backward, window
    if 2 <= window <= WIDEST_RING_WINDOW:
        return band_ring.backward, window
    return span_backward.backward, Span(window=window)


# ---- Layouts -----------------------------------------------------------------------


def _fold(x_BTHK, stride: int):
    """(B, T, H, K) -> (B, R, S*H, K), with R as the kernels want it."""
    rows = -(-x_BTHK.shape[1] // stride)
    rows = up(rows, 8 if rows <= LONGEST_WIDE_COLUMN else tiles.M)
    x = fit(x_BTHK, rows * stride, 1)
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
