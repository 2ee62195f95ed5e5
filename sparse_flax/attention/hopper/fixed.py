"""The own block, summaries of earlier blocks, or both, with a gradient of their own.

One softmax over all keys of a row, so nothing is merged. A gathered copy of the summary
keys is never made. Backward, the summary keys' gradients come first, and the kernel of
the own blocks adds them to the rows they belong to.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sparse_flax.attention.hopper import fixed_kernels as kernels
from sparse_flax.attention.hopper.fixed_kernels import ROWS, Tiles, Walk
from sparse_flax.attention.patterns import Blocks, Fixed, Pattern, Summaries

OLDEST_JAX = (0, 11)
DTYPES = ("bfloat16", "float16")
BLOCKS = (64, 128, 256)
SUMMARIES = (8, 16, 32, 64, 128, 256)
WIDEST_HEAD = 128
LARGEST_WIDE_BLOCK = 128  # where K or V is over 64: what fits a block's memory


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> str | None:
    """Return None, or the sentence that says why not.

    Args:
      pattern: any.
      q, k, v: anything with the shape and dtype of arrays that fit `sparse_attention`.
    """
    if jax.__version_info__ < OLDEST_JAX:
        return (
            f"hopper needs jax {'.'.join(map(str, OLDEST_JAX))} or newer, and this is "
            f"{jax.__version__}"
        )
    if not isinstance(pattern, (Fixed, Blocks, Summaries)):
        return f"these kernels are for Fixed, Blocks and Summaries, not for {pattern}"
    if np.dtype(q.dtype).name not in DTYPES:
        return (
            f"hopper computes {' and '.join(DTYPES)}, not {q.dtype}; try q, k and v in "
            "bfloat16"
        )
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST_HEAD:
        return f"hopper takes heads up to {WIDEST_HEAD} wide, not {widest}"
    blocks = [x for x in BLOCKS if widest <= ROWS or x <= LARGEST_WIDE_BLOCK]
    if pattern.block not in blocks:
        return _choice("block", pattern.block, blocks, f" at width {widest}")
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
    pattern: Pattern,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Return out_BTHV in v's dtype; the arguments are what `supports` lets pass.

    `interpret` runs the kernels on a CPU, for tests.
    """
    T, V = q_BTHK.shape[1], v_BTHV.shape[3]
    plan = Plan.of(pattern, max(q_BTHK.shape[3], V), scale, interpret)
    # Zeros behind the last column change no product, and no real query sees the keys
    # behind the last token.
    T_padded = _up(T, math.lcm(plan.walk.block, *plan.query_rows))
    args = [_fit(_fit(x, T_padded, 1), plan.width, 3) for x in (q_BTHK, k_BTHK, v_BTHV)]
    return _attend(plan, *args)[:, :T, :, :V]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is attended to, and how the kernels are cut."""

    walk: Walk
    width: int
    scale: float
    interpret: bool
    forward: Tiles
    summaries: Tiles
    blocks: Tiles

    @classmethod
    def of(cls, pattern: Pattern, width: int, scale: float, interpret: bool) -> Plan:
        """Read the walk off a pattern, and choose the tiles.

        Those of width 64 are the fastest seen on an H100 at 12,288 tokens, block 128
        and summary 32; those of width 128 are what fits.
        """
        walk = Walk(
            pattern.block,
            getattr(pattern, "summary", 0),
            getattr(pattern, "offset", 0),
            getattr(pattern, "rotate", False),
            self_only=isinstance(pattern, Summaries),
        )
        width = _up(width, ROWS)
        if width > ROWS:
            forward, summaries, blocks = (
                Tiles(2, 64, 2, 1),
                Tiles(2),
                Tiles(2, 64, 2, 1),
            )
        else:
            forward = Tiles(4, 128, 3, 1)
            summaries, blocks = Tiles(3, 64, 3, 2), Tiles(4, 64, 4, 2)
        return cls(walk, width, scale, interpret, forward, summaries, blocks)

    @property
    def query_rows(self) -> tuple[int, ...]:
        """Rows that a block of threads takes, in the kernels that walk over keys."""
        return tuple(x.warpgroups * ROWS for x in (self.forward, self.blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v):
    return _over_batch(functools.partial(_forward, plan), q, k, v)[0]


def _attend_forward(plan, q, k, v):
    out, lse = _over_batch(functools.partial(_forward, plan), q, k, v)
    # Without it XLA runs the kernel twice in a scan over layers: once for what comes
    # after, and once into the stack of results that the backward pass will read.
    out, lse = jax.lax.optimization_barrier((out, lse))
    # Named here, so that a policy of jax.checkpoint can keep them.
    out, lse = (
        checkpoint_name(out, "attention_out"),
        checkpoint_name(lse, "attention_lse"),
    )
    return out, (q, k, v, out, lse)


def _attend_backward(plan, residuals, d_out):
    return _over_batch(functools.partial(_backward, plan), *residuals, d_out)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan: Plan, q, k, v):
    return kernels.forward(q, k, v, plan.walk, plan.scale, plan.forward, plan.interpret)


def _backward(plan: Plan, q, k, v, out, lse, d_out):
    delta_BHT = jnp.einsum(
        "BTHK,BTHK->BHT", out, d_out, preferred_element_type=jnp.float32
    )
    args = (q, k, v, d_out, lse, delta_BHT)
    common = {"walk": plan.walk, "scale": plan.scale, "interpret": plan.interpret}
    summed = None
    if plan.walk.summary:
        summed = kernels.summary_gradients(*args, tiles=plan.summaries, **common)
    dq, dk, dv = kernels.block_gradients(*args, summed, tiles=plan.blocks, **common)
    return dq, _sum_groups(dk, k.shape[2]), _sum_groups(dv, k.shape[2])


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


def _sum_groups(x_BTHK, heads: int):
    """Add up the gradients of the query heads that share a key head."""
    B, T, H, K = x_BTHK.shape
    if heads == H:
        return x_BTHK
    x = x_BTHK.reshape(B, T, heads, H // heads, K)
    return jnp.sum(x, axis=3, dtype=jnp.float32).astype(x.dtype)


def _fit(x, size: int, axis: int):
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _choice(name: str, value: int, choices: list[int], where: str) -> str:
    nearest = min(choices, key=lambda x: (abs(x - value), x))
    listed = ", ".join(map(str, choices))
    return f"hopper takes {name} {listed}{where}, not {value}; try {nearest}"
