"""The own block, summaries of earlier blocks, or both, with a gradient of their own.

One softmax over all keys of a row, so nothing is merged. A gathered copy of the summary
keys is never made. Backward, the summary keys' gradients come first, and the kernel of
the own blocks adds them to the rows they belong to.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import jax

from sparse_flax.attention.hopper import fixed_backward, fixed_forward, tiles
from sparse_flax.attention.hopper.fixed_walk import Walk
from sparse_flax.attention.hopper.ring import Cut
from sparse_flax.attention.hopper.tiles import M
from sparse_flax.attention.layouts import (
    attend_by,
    fit,
    positive,
    row_products,
    sum_groups,
    up,
)
from sparse_flax.attention.patterns import Blocks, Fixed, Summaries

Own: TypeAlias = Blocks | Summaries | Fixed  # the patterns that it computes
BLOCKS = (64, 128, 256)
SUMMARIES = (8, 16, 32, 64, 128, 256)
LARGEST_WIDE_BLOCK = 128  # where K or V is over 64: what fits a block's memory


def supports(pattern: Own, q: Any, k: Any, v: Any) -> str | None:
    """Return None, or the sentence that says what does not fit."""
    widest = max(q.shape[3], v.shape[3])
    blocks = [x for x in BLOCKS if widest <= M or x <= LARGEST_WIDE_BLOCK]
    if pattern.block not in blocks:
        return _choice("block", pattern.block, blocks, f" at width {widest}")
    if why := tiles.too_many(pattern, q):
        return why
    if isinstance(pattern, Blocks):
        return None
    summaries = [x for x in SUMMARIES if x <= pattern.block]
    if pattern.summary not in summaries:
        return _choice("summary", pattern.summary, summaries, f" of {pattern.block}")
    return None


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Own,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Return out_BTHV in v's dtype; the arguments are what `supports` lets pass.

    `interpret` runs the kernels on a CPU, for tests.
    """
    T, V = q_BTHK.shape[1], v_BTHV.shape[3]
    scale, q_BTHK = positive(scale, q_BTHK)
    plan = FixedPlan.of(pattern, max(q_BTHK.shape[3], V), scale, interpret)
    args = (plan.padded(x) for x in (q_BTHK, k_BTHK, v_BTHV))
    return attend_by(_forward, _backward, plan, *args)[:, :T, :, :V]


def attend_pattern(q_BTHK, k_BTHK, v_BTHV, pattern, scale, interpret=False):
    """Return (out_BTHV, lse_BTH)."""
    T, V = q_BTHK.shape[1], v_BTHV.shape[3]
    scale, q_BTHK = positive(scale, q_BTHK)
    plan = FixedPlan.of(pattern, max(q_BTHK.shape[3], V), scale, interpret)
    out, lse = _forward(plan, *(plan.padded(x) for x in (q_BTHK, k_BTHK, v_BTHV)))
    return out[:, :T, :, :V], lse.swapaxes(1, 2)[:, :T]


def pattern_gradients(
    q_BTHK, k_BTHK, v_BTHV, out, lse_BTH, d_out, pattern, scale, interpret=False
):
    """Return (dq, dk, dv); out and lse_BTH may be of a union with other parts."""
    q, back_q = jax.vjp(lambda q: positive(scale, q)[1], q_BTHK)
    scale = positive(scale, q)[0]
    given = q, k_BTHK, v_BTHV
    plan = FixedPlan.of(pattern, max(q.shape[3], v_BTHV.shape[3]), scale, interpret)
    out, d_out = plan.padded(out), plan.padded(d_out)
    lse = fit(lse_BTH, out.shape[1], 1).swapaxes(1, 2)
    made = _backward(plan, *(plan.padded(x) for x in given), out, lse, d_out)
    dq, dk, dv = (
        x[:, : like.shape[1], :, : like.shape[3]]
        for x, like in zip(made, given, strict=True)
    )
    return *back_q(dq), dk, dv


@dataclasses.dataclass(frozen=True)
class FixedPlan:
    """What is attended to, and how the kernels are cut."""

    walk: Walk
    width: int
    scale: float
    interpret: bool
    forward: Cut
    summaries: Cut
    blocks: Cut

    @classmethod
    def of(cls, pattern: Own, width: int, scale: float, interpret: bool) -> FixedPlan:
        """Read the walk off a pattern, and choose the cuts.

        Those of width 64 are the fastest seen at 12,288 tokens, block 128 and summary
        32, on an H100 and, of the gradients, on an H200; those of width 128 are what
        fits.
        """
        walk = Walk(
            pattern.block,
            getattr(pattern, "summary", 0),
            getattr(pattern, "offset", 0),
            getattr(pattern, "rotate", False),
            self_only=isinstance(pattern, Summaries),
        )
        width = tiles.width_of(width)
        if width > M:
            forward, summaries, blocks = Cut(2, 64, 2, 1), Cut(2), Cut(2, 64, 2, 1)
        else:
            forward = Cut(4, 128, 3, 1)
            summaries, blocks = Cut(3, 64, 3, 2, True), Cut(4, 64, 4, 2, True)
        return cls(walk, width, scale, interpret, forward, summaries, blocks)

    def padded(self, x_BTHK: jax.Array) -> jax.Array:
        """Fill up whole tiles.

        Zeros behind the last column change no product, and no real query sees the keys
        behind the last token.
        """
        T = up(x_BTHK.shape[1], math.lcm(self.walk.block, *self.query_rows))
        return fit(fit(x_BTHK, T, 1), self.width, 3)

    @property
    def query_rows(self) -> tuple[int, ...]:
        """Rows that a block of threads takes, in the kernels that walk over keys."""
        return tuple(x.warpgroups * M for x in (self.forward, self.blocks))


def _forward(plan: FixedPlan, q, k, v):
    return fixed_forward.forward(
        q, k, v, plan.walk, plan.scale, plan.forward, plan.interpret
    )


def _backward(plan: FixedPlan, q, k, v, out, lse, d_out):
    args = (q, k, v, d_out, lse, row_products(out, d_out))
    common = {"walk": plan.walk, "scale": plan.scale, "interpret": plan.interpret}
    summed = None
    if plan.walk.summary:
        summed = fixed_backward.summary_gradients(*args, cut=plan.summaries, **common)
    dq, dk, dv = fixed_backward.block_gradients(
        *args, summed, cut=plan.blocks, **common
    )
    return dq, sum_groups(dk, k.shape[2]), sum_groups(dv, k.shape[2])


def _choice(name: str, value: int, choices: list[int], where: str) -> str:
    nearest = min(choices, key=lambda x: (abs(x - value), x))
    listed = ", ".join(map(str, choices))
    return f"hopper takes {name} {listed}{where}, not {value}; try {nearest}"
