"""One new token over a cache that keeps what later queries can still see.

    cache = decode.prefill(pattern, T, k_BTHK, v_BTHV, length)
    out_BHV, cache = decode.step(cache, q_BHK, k_BHK, v_BHV, position)  # length, ..

A step reads what its query sees, and a few masked places beside it: the window, a
column of T / stride rows, a block and the summaries before it; never T, but for Dense.

    pattern            keys kept                             keys read in a step
    Dense              T                                     T
    Local              min(window, T)                        all
    Columns            T, rounded up to rows of `stride`     T / stride, a strided slice
    Strided            the same                              stride + T / stride
    Blocks             min(block, T)                         all
    Summaries          1 + summary * whole blocks before T   all
    Fixed              block + summary * whole blocks        all
    PerHead, rotate    head by head as above

A cache holds no position: shapes are static, the position is traced, and what a place
holds follows from it (`stores.py`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparse_flax.attention import stores
from sparse_flax.attention.layouts import spec_of, unset_mesh
from sparse_flax.attention.patterns import Pattern


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv"],
    meta_fields=["pattern", "T", "group"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer.

    `kv` has an array [B, heads, places, K + V] for each store: keys and values lie side
    by side, so that one write serves both.
    """

    pattern: Pattern
    T: int  # tokens at most
    group: int  # query heads that share a key head
    kv: tuple[jax.Array, ...]


def prefill(
    pattern: Pattern,
    T: int,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    length: jax.Array | int,
    *,
    group: int = 1,
) -> Cache:
    """Make the cache that `length` tokens leave behind, all of them at once.

    Args:
      pattern: who sees whom.
      T: the most tokens that the cache is for, those still to come included.
      k_BTHK, v_BTHV: keys and values of the first tokens, `length` or more; the rest
        are never seen. Without any (B, 0, H_kv, K), the cache is empty.
      length: int, or a traced int32 scalar.
      group: query heads that share a key head, H / H_kv.

    Raises:
      ValueError: k and v are no such arrays, or hold more than T tokens.
    """
    if not k_BTHK.ndim == v_BTHV.ndim == 4 or k_BTHK.shape[:3] != v_BTHV.shape[:3]:
        raise ValueError(
            f"k {k_BTHK.shape}, v {v_BTHV.shape}: both must be (batch, tokens, heads, "
            "width), and agree in all but the width"
        )
    if not (k_BTHK.shape[1] <= T and T >= 1 and group >= 1):
        raise ValueError(
            f"T={T} and group={group} must be at least 1, and T at least the "
            f"{k_BTHK.shape[1]} tokens given; try T={max(T, k_BTHK.shape[1], 1)}"
        )

    def keep(k, v, length):
        kv_BHTW = jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2)
        kept = [
            heads.store.keep(stores.take(kv_BHTW, heads.keys, 1), length)
            for heads in stores.groups(pattern, T, k.shape[2] * group, group)
        ]
        return Cache(pattern, T, group, tuple(kept))

    batch, _, head, _ = spec_of(k_BTHK)
    if batch or head:
        kv = P(batch, None, head, None)
        out = P(batch, head, None, None)
        mesh = unset_mesh(k_BTHK)
        keep = jax.shard_map(keep, mesh=mesh, in_specs=(kv, kv, P()), out_specs=out)
    return keep(k_BTHK, v_BTHV, jnp.asarray(length, jnp.int32))


def step(
    cache: Cache,
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    position: jax.Array | int,
    *,
    reach: int | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, Cache]:
    """Attend with one query a row, its own key and value among those it sees.

    Args:
      cache: of the tokens before `position`.
      q_BHK: the queries of the token at `position`.
      k_BHK, v_BHV: its keys [B, H_kv, K] and values [B, H_kv, V], in q's dtype.
      position: int32 scalar below T; the same for every row.
      reach: a whole number above `position`, T by default. Summaries, columns and dense
        attention then read no further, which saves time at the start of a long T.
      scale: multiplies q.k; 1/sqrt(K) by default.

    Returns:
      (out_BHV in v's dtype, the cache with this token). Scores, softmax and sums are in
      float32, as the paper does it where it samples (section 5.6).

    Raises:
      ValueError: batch or heads are not those that the cache was made for.
    """
    B, H = q_BHK.shape[:2]
    if H != k_BHK.shape[1] * cache.group or B != cache.kv[0].shape[0]:
        raise ValueError(
            f"q {q_BHK.shape}, k {k_BHK.shape}: the cache is of {cache.kv[0].shape[0]} "
            f"rows with {cache.group} query heads to a key head; make it with prefill("
            f"..., group={max(H // k_BHK.shape[1], 1)}) from as many rows"
        )
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    reach = cache.T if reach is None else min(reach, cache.T)
    attend = functools.partial(_step, reach=reach, scale=scale)
    batch, head, _ = spec_of(q_BHK)
    if batch or head:
        row, kv = P(batch, head, None), P(batch, head, None, None)
        attend = jax.shard_map(
            attend,
            mesh=unset_mesh(q_BHK),
            in_specs=(kv, row, row, row, P()),
            out_specs=(row, kv),
        )
    return attend(cache, q_BHK, k_BHK, v_BHV, jnp.asarray(position, jnp.int32))


def _step(cache: Cache, q_BHK, k_BHK, v_BHV, t, *, reach, scale):
    H = q_BHK.shape[1]
    kv_BHW = jnp.concatenate([k_BHK, v_BHV], axis=-1)
    groups = stores.groups(cache.pattern, cache.T, H, H // k_BHK.shape[1])
    outs, kept = [], []
    for heads, before in zip(groups, cache.kv, strict=True):
        kv = heads.store.write(before, stores.take(kv_BHW, heads.keys, 1), t)
        pieces = heads.store.read(kv, t, reach)
        outs.append(_attend(stores.take(q_BHK, heads.queries, 1), pieces, scale))
        kept.append(kv)
    order = np.argsort([head for heads in groups for head in heads.queries])
    out_BHV = stores.take(jnp.concatenate(outs, axis=1), order, 1)
    return out_BHV.astype(v_BHV.dtype), dataclasses.replace(cache, kv=tuple(kept))


def _attend(q_BHK, pieces, scale: float) -> jax.Array:
    """Softmax attention over some pieces (kv_BHSW, seen_S), float32.

    Sums of products and no matrix products: a query a key head is too few for those,
    and so the compiler reads the cache in place.
    """
    B, H, K = q_BHK.shape
    H_kv = pieces[0][0].shape[1]
    q_BHGK = q_BHK.astype(jnp.float32).reshape(B, H_kv, H // H_kv, K) * scale
    logits, values = [], []
    for kv_BHSW, seen_S in pieces:
        kv_BHGSW = kv_BHSW[:, :, None].astype(jnp.float32)
        logits_BHGS = _dot(q_BHGK[..., None, :], kv_BHGSW[..., :K])
        logits.append(jnp.where(seen_S, logits_BHGS, -jnp.inf))
        values.append(kv_BHGSW[..., K:])
    weights_BHGS = jax.nn.softmax(jnp.concatenate(logits, axis=-1))
    ends = np.cumsum([seen_S.size for _, seen_S in pieces])[:-1]
    split = jnp.split(weights_BHGS, ends, axis=-1)
    outs = [
        jnp.sum(weights[..., None] * value, axis=-2)
        for weights, value in zip(split, values, strict=True)
    ]
    return sum(outs[1:], start=outs[0]).reshape(B, H, -1)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum the products along the last dimension, of many rows eight at a time.

    A GPU thread then loads eight neighbours at once and adds them up by itself. With a
    warp for each key, which is what it is otherwise, instructions and not the memory
    would set the time of a large batch.
    """
    if x.shape[0] == 1 or x.shape[-1] % 8:
        return jnp.sum(x * y, axis=-1)
    return jnp.sum(sum(x[..., i::8] * y[..., i::8] for i in range(8)), axis=-1)
