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
    Fixed              block + the same                      all
    PerHead, rotate    head by head as above

A cache holds no position: shapes are static, the position is traced, and what a place
holds follows from it. Heads that keep keys in the same manner share an array.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sparse_flax.attention import parts
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv"],
    meta_fields=["pattern", "T"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, or of several stacked ones.

    `kv` has an array [.., places, B, heads, K + V] for each group of heads that keep
    keys in the same manner: keys and values lie side by side, so that one write and one
    read serve both.
    """

    pattern: Pattern
    T: int  # tokens at most
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
    """

    def keep(k, v, length):
        kv_BTHW = jnp.concatenate([k, v], axis=-1)
        H = k.shape[2] * group
        kept = []
        for heads in _groups(pattern, T, H, group):
            kv_TBHW = jnp.moveaxis(_take(kv_BTHW, heads.keys, 2), 1, 0)
            kept += [store.keep(kv_TBHW, length) for store in heads.stores]
        return Cache(pattern, T, tuple(kept))

    batch, _, head, _ = _spec(k_BTHK)
    if batch or head:
        kv = P(batch, None, head, None)
        out = P(None, batch, head, None)
        keep = jax.shard_map(keep, in_specs=(kv, kv, P()), out_specs=out)
    return keep(k_BTHK, v_BTHV, jnp.asarray(length, jnp.int32))


def step(
    cache: Cache,
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    position: jax.Array | int,
    *,
    layer: jax.Array | int | None = None,
    reach: int | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, Cache]:
    """Attend with one query a row, its own key and value among those it sees.

    Args:
      cache: of the tokens before `position`.
      q_BHK: the queries of the token at `position`.
      k_BHK, v_BHV: its keys [B, H_kv, K] and values [B, H_kv, V], in q's dtype.
      position: int32 scalar below T; the same for every row.
      layer: which of stacked caches, int32 scalar; None where there is but one.
      reach: a whole number above `position`, T by default. Summaries, columns and dense
        attention then read no further, which saves time at the start of a long T.
      scale: multiplies q.k; 1/sqrt(K) by default.

    Returns:
      (out_BHV in v's dtype, the cache with this token). Scores, softmax and sums are in
      float32, as the paper does it where it samples (section 5.5).
    """
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    reach = cache.T if reach is None else min(reach, cache.T)
    one = layer is None
    stacked = jax.tree.map(lambda x: x[None], cache) if one else cache
    attend = functools.partial(_step, reach=reach, scale=scale)
    batch, head, _ = _spec(q_BHK)
    if batch or head:
        row, kv = P(batch, head, None), P(None, None, batch, head, None)
        attend = jax.shard_map(
            attend, in_specs=(kv, row, row, row, P(), P()), out_specs=(row, kv)
        )
    scalars = (jnp.asarray(x, jnp.int32) for x in (position, 0 if one else layer))
    out_BHV, stacked = attend(stacked, q_BHK, k_BHK, v_BHV, *scalars)
    return out_BHV, jax.tree.map(lambda x: x[0], stacked) if one else stacked


def _step(cache: Cache, q_BHK, k_BHK, v_BHV, t, layer, *, reach, scale):
    H = q_BHK.shape[1]
    kv_BHW = jnp.concatenate([k_BHK, v_BHV], axis=-1)
    groups = _groups(cache.pattern, cache.T, H, H // k_BHK.shape[1])
    outs, kept, before = [], [], iter(cache.kv)
    for heads in groups:
        pieces = []
        for store in heads.stores:
            kv = store.write(next(before), _take(kv_BHW, heads.keys, 1), layer, t)
            pieces += store.read(kv, layer, t, reach)
            kept.append(kv)
        outs.append(_attend(_take(q_BHK, heads.queries, 1), pieces, scale))
    order = np.argsort([head for heads in groups for head in heads.queries])
    out_BHV = _take(jnp.concatenate(outs, axis=1), order, 1)
    return out_BHV.astype(v_BHV.dtype), dataclasses.replace(cache, kv=tuple(kept))


def _attend(q_BHK, pieces, scale: float) -> jax.Array:
    """Softmax attention over some pieces (kv_SBHW, seen_S), float32.

    Sums of products and no matrix products: a query a key head is too few for those,
    and so the compiler reads the cache in place.
    """
    B, H, K = q_BHK.shape
    H_kv = pieces[0][0].shape[2]
    q_BHGK = q_BHK.astype(jnp.float32).reshape(B, H_kv, H // H_kv, K) * scale
    logits, values = [], []
    for kv_SBHW, seen_S in pieces:
        kv_SBHGW = kv_SBHW[:, :, :, None].astype(jnp.float32)
        logits_SBHG = jnp.sum(q_BHGK * kv_SBHGW[..., :K], axis=-1)
        logits_BHGS = jnp.moveaxis(logits_SBHG, 0, -1)
        logits.append(jnp.where(seen_S, logits_BHGS, -jnp.inf))
        values.append(kv_SBHGW[..., K:])
    weights_BHGS = jax.nn.softmax(jnp.concatenate(logits, axis=-1))
    ends = np.cumsum([seen_S.size for _, seen_S in pieces])[:-1]
    out_BHGV = sum(
        jnp.sum(jnp.moveaxis(weights, -1, 0)[..., None] * value, axis=0)
        for weights, value in zip(
            jnp.split(weights_BHGS, ends, axis=-1), values, strict=True
        )
    )
    return out_BHGV.reshape(B, H, -1)


# ---- Where keys lie ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """A place for every token, in order: for parts that come back to each of them."""

    parts: tuple[Part, ...]
    T: int

    @property
    def places(self) -> int:
        """T, rounded up to whole rows of a strided part."""
        strides = [self._stride(p) for p in self.parts if isinstance(p, parts.Columns)]
        return self.T + -self.T % max(strides, default=1)

    def _stride(self, part: parts.Columns) -> int:
        return min(part.stride, self.T)  # beyond T there is nothing to come back to

    def keep(self, x_TBHW, length):
        del length  # what lies behind it is written before it is seen
        x_TBHW = x_TBHW[: self.places]
        missing = self.places - x_TBHW.shape[0]
        return jnp.pad(x_TBHW, [(0, missing), (0, 0), (0, 0), (0, 0)])

    def write(self, x_LSBHW, x_BHW, layer, t):
        return _put(x_LSBHW, x_BHW, layer, t)

    def read(self, x_LSBHW, layer, t, reach):
        return [self._read(part, x_LSBHW, layer, t, reach) for part in self.parts]

    def _read(self, part, x_LSBHW, layer, t, reach):
        if isinstance(part, parts.Columns):
            stride = self._stride(part)
            rows = -(-reach // stride)
            L, S, *rest = x_LSBHW.shape
            x = x_LSBHW.reshape(L, S // stride, stride, *rest)
            x = _slice(x, (layer, 0, t % stride), (1, rows, 1))
            row = jnp.arange(rows)
            last = t // stride
            return x[0, :, 0], row < last if part.strict else row <= last
        width = min(part.width, self.T) if isinstance(part, parts.Band) else reach
        first = jnp.clip(t - width + 1, 0, self.places - width)
        j = first + jnp.arange(width)
        return _slice(x_LSBHW, (layer, first), (1, width))[0], (j <= t) & (
            t - j < width
        )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The latest tokens, position p at place p mod `places`."""

    part: parts.Band | parts.OwnBlock | parts.Self
    T: int

    @property
    def places(self) -> int:
        part = self.part
        width = {parts.Band: "width", parts.OwnBlock: "size"}.get(type(part))
        return min(getattr(part, width), self.T) if width else 1

    def keep(self, x_TBHW, length):
        place = jnp.arange(self.places)
        # The last position before `length` that lies at each place.
        held = length - 1 - (length - 1 - place) % self.places
        return _rows(x_TBHW, held[:, None])

    def write(self, x_LSBHW, x_BHW, layer, t):
        return _put(x_LSBHW, x_BHW, layer, t % self.places)

    def read(self, x_LSBHW, layer, t, reach):
        last = t % self.places if isinstance(self.part, parts.OwnBlock) else t
        x_SBHW = _slice(x_LSBHW, (layer,), (1, self.places))[0]
        return [(x_SBHW, jnp.arange(self.places) <= last)]


@dataclasses.dataclass(frozen=True)
class _Slices:
    """The summaries of whole blocks, one block after the other.

    An array of its own: two writes into one would make the compiler copy it.
    """

    part: parts.Summaries
    offsets: tuple[int, ...]  # of each head
    T: int

    @property
    def places(self) -> int:
        return self._before(self.T)

    def _before(self, reach: int) -> int:
        """Places of the slices that queries before `reach` see."""
        return (reach - 1) // self.part.size * self.part.width

    def _starts(self) -> np.ndarray:
        """Where in a block the slice of each head begins."""
        return self.part.size - (np.array(self.offsets) + 1) * self.part.width

    def keep(self, x_TBHW, length):
        del length  # what lies behind it is written before it is seen
        block, within = np.divmod(np.arange(self.places), self.part.width)
        held_SH = (block * self.part.size + within)[:, None] + self._starts()
        return _rows(x_TBHW, held_SH)

    def write(self, x_LSBHW, x_BHW, layer, t):
        size, width = self.part.size, self.part.width
        block, within = t // size, t % size
        starts_H = self._starts()
        mine_H = (starts_H <= within) & (within < starts_H + width)
        # Slices end whole widths before their block does, so that all heads that keep
        # this token have the same place for it. The others keep what they had there.
        place = block * width + (within - size) % width
        mine_H &= place < self.places  # no query sees the slice of the last block
        place = jnp.minimum(place, self.places - 1)
        had_BHW = _slice(x_LSBHW, (layer, place), (1, 1))[0, 0]
        x_BHW = jnp.where(mine_H[:, None], x_BHW, had_BHW)
        return _put(x_LSBHW, x_BHW, layer, place)

    def read(self, x_LSBHW, layer, t, reach):
        places = self._before(reach)
        if not places:
            return []
        block = jnp.arange(places) // self.part.width
        x_SBHW = _slice(x_LSBHW, (layer,), (1, places))[0]
        return [(x_SBHW, block < t // self.part.size)]


Store = _Tokens | _Ring | _Slices


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Query heads that keep keys in the same manner, and the heads of their keys."""

    stores: tuple[Store, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]


@functools.cache
def _groups(pattern: Pattern, T: int, H: int, group: int) -> list[_Heads]:
    alike: dict[tuple[Part, ...], dict[int, int]] = {}
    for head in range(H):
        offset, manner = 0, []
        for part in pattern.parts(head):
            if isinstance(part, parts.Summaries):
                part, offset = dataclasses.replace(part, offset=0), part.offset
            manner.append(part)
        alike.setdefault(tuple(manner), {})[head] = offset
    groups = []
    for manner, offset_of in alike.items():
        queries, offsets = tuple(offset_of), tuple(offset_of.values())
        keys = tuple(head // group for head in queries)
        if len(queries) == H and len(set(offsets)) == 1:
            # Query heads can share their key head only if all of them keep the same.
            keys = tuple(range(H // group))
            offsets = offsets[: len(keys)]
        groups.append(_Heads(_stores(manner, offsets, T), queries, keys))
    return groups


def _stores(
    manner: tuple[Part, ...], offsets: tuple[int, ...], T: int
) -> tuple[Store, ...]:
    if any(isinstance(part, parts.All | parts.Columns) for part in manner):
        return (_Tokens(manner, T),)
    stores = [
        _Slices(part, offsets, T)
        if isinstance(part, parts.Summaries)
        else _Ring(part, T)
        for part in manner
    ]
    return tuple(store for store in stores if store.places)


# ---- Arrays ------------------------------------------------------------------------


def _take(x: jax.Array, heads, axis: int) -> jax.Array:
    """Take some heads; all of them for nothing."""
    if tuple(heads) == tuple(range(x.shape[axis])):
        return x
    return jnp.take(x, np.asarray(heads), axis=axis)


def _slice(x: jax.Array, starts: tuple, sizes: tuple[int, ...]) -> jax.Array:
    """Slice the leading dimensions, whatever is the size of the others."""
    rest = x.ndim - len(sizes)
    starts = (*starts, *[0] * (x.ndim - len(starts)))
    return jax.lax.dynamic_slice(x, starts, (*sizes, *x.shape[x.ndim - rest :]))


def _rows(x_TBHW: jax.Array, held_SH) -> jax.Array:
    """Take the row of each place and head; any row where there is none yet."""
    if not x_TBHW.shape[0]:
        x_TBHW = jnp.zeros_like(x_TBHW, shape=(1, *x_TBHW.shape[1:]))
    held_SH = jnp.clip(held_SH, 0, x_TBHW.shape[0] - 1)
    return jnp.take_along_axis(x_TBHW, held_SH[:, None, :, None], axis=0)


def _put(x_LSBHW: jax.Array, x_BHW: jax.Array, layer, place) -> jax.Array:
    return jax.lax.dynamic_update_slice(
        x_LSBHW, x_BHW[None, None].astype(x_LSBHW.dtype), (layer, place, 0, 0, 0)
    )


def _spec(x: jax.Array) -> tuple:
    spec = jax.typeof(x).sharding.spec
    return tuple(spec) + (None,) * (x.ndim - len(spec))
