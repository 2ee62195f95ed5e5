"""The small dense problems that splash attention computes, through what is private.

The public kernel gives no log-sum-exp that can be differentiated and takes none for its
backward pass, so the functions below it are called. Batch and heads are one axis for
it, and all see the same mask. Scores are float32; q is scaled in its own dtype first.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import jax

from sparse_flax.attention.layouts import fit, up
from sparse_flax.attention.pieces import Core

LANES = 128  # rows and keys come in multiples
# A larger tile means fewer steps of the grid, each of which costs about as long as its
# products take at this size. An estimate: none was timed.
BLOCK = 512


class Seen(NamedTuple):
    """Query i sees key j iff 0 <= i + ahead - j < width; width None: iff 0 <= ..

    A query that sees nothing gets a finite log-sum-exp so low that it counts for
    nothing beside any other piece, and its gradients are 0.
    """

    ahead: int = 0
    width: int | None = None


def _private() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Its kernels, masks, and masks by tiles: imported only when called."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
        splash_attention_mask_info,
    )

    return splash_attention_kernel, splash_attention_mask, splash_attention_mask_info


class _Plan(NamedTuple):
    """Masks by tiles, forward, for dq and for dk and dv; and the sizes of tiles."""

    infos: tuple
    mask_function: object
    blocks: object
    rows: int
    keys: int


@functools.lru_cache(maxsize=64)
def _plan(rows: int, keys: int, seen: Seen) -> _Plan:
    splash, masks, infos = _private()
    block = min(BLOCK, up(max(rows, keys), LANES))
    rows, keys = up(rows, block), up(keys, block)
    left = None if seen.width is None else seen.width - 1
    if left is None:
        mask = masks.CausalMask((rows, keys), seen.ahead)
    else:
        mask = masks.LocalMask((rows, keys), (left, 0), seen.ahead)
    # One for all heads: the kernels then read the first for each of them.
    mask = masks.MultiHeadMask([mask])
    forward, function = infos.process_mask(mask, (block, block))
    backward, _ = infos.process_mask_dkv(mask, (block, block))
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv"
    names += " block_kv_dkv_compute block_q_dq block_kv_dq"
    blocks = splash.BlockSizes(**dict.fromkeys(names.split(), block))
    return _Plan((forward, forward, backward), function, blocks, rows, keys)


def _by_head(x_BTHK: jax.Array, rows: int) -> jax.Array:
    """(B, T, H, K) -> (B*H, rows, K)."""
    x = fit(x_BTHK.swapaxes(1, 2), rows, 2)
    return x.reshape(-1, rows, x.shape[3])


def _by_token(x: jax.Array, like_BTHK: jax.Array) -> jax.Array:
    """Undo `_by_head` for any width, or for none."""
    B, T, H, _ = like_BTHK.shape
    return x.reshape(B, H, *x.shape[1:])[:, :, :T].swapaxes(1, 2)


def _forward(q, k, v, scale, seen, interpret):
    splash, *_ = _private()
    plan = _plan(q.shape[1], k.shape[1], seen)
    out, (lse,) = splash._splash_attention_forward(
        plan.infos[0],
        _by_head(q * scale, plan.rows),
        *(_by_head(x, plan.keys) for x in (k, v)),
        segment_ids=None,
        sinks=None,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=plan.blocks,
        residual_checkpoint_name=None,
        save_residuals=True,
        mask_function=plan.mask_function,
        interpret=interpret,
    )
    return _by_token(out, q), _by_token(lse, q)


def _backward(q, k, v, out, lse, d_out, scale, seen, interpret):
    splash, *_ = _private()
    plan = _plan(q.shape[1], k.shape[1], seen)
    residuals = (
        _by_head(q * scale, plan.rows),
        *(_by_head(x, plan.keys) for x in (k, v)),
        None,
        None,
        _by_head(out, plan.rows),
        _by_head(lse[..., None], plan.rows)[..., 0],
        *plan.infos[1:],
    )
    *_, dq, dk, dv, _, _ = splash._splash_attention_bwd(
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=plan.blocks,
        residual_checkpoint_name=None,
        mask_function=plan.mask_function,
        attn_logits_soft_cap=None,
        interpret=interpret,
        res=residuals,
        do=_by_head(d_out, plan.rows),
    )
    return _by_token(dq, q) * scale, _by_token(dk, k), _by_token(dv, v)


SPLASH = Core(_forward, _backward)
