"""Where decoding keeps keys and values: the arrays of a `decode.Cache`.

A store is an array [layers, places, B, heads, W]. Which position lies at which place is
static or follows from the position of the query; heads whose parts are the same but for
the offset of their summaries share the stores of these parts.

    Tokens   every token, in order: All, Columns, and a Band beside Columns
    Ring     the latest tokens: Band, OwnBlock, Self
    Slices   the summaries of whole blocks: Summaries
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_flax.attention import parts
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A place for every token, in order: for parts that come back to each of them."""

    manner: tuple[Part, ...]
    T: int

    @property
    def places(self) -> int:
        """T, rounded up to whole rows of a strided part."""
        strides = [self._stride(p) for p in self.manner if isinstance(p, parts.Columns)]
        return self.T + -self.T % max(strides, default=1)

    def _stride(self, part: parts.Columns) -> int:
        return min(part.stride, self.T)  # beyond T there is nothing to come back to

    def keep(self, x_TBHW, length):
        """Lay out the first `length` rows of those given."""
        del length  # what lies behind it is written before it is seen
        x_TBHW = x_TBHW[: self.places]
        missing = self.places - x_TBHW.shape[0]
        return jnp.pad(x_TBHW, [(0, missing), (0, 0), (0, 0), (0, 0)])

    def write(self, x_LSBHW, x_BHW, layer, t):
        """Add the row of position t."""
        return _put(x_LSBHW, x_BHW, layer, t)

    def read(self, x_LSBHW, layer, t, reach):
        """Return pieces (kv_SBHW, seen_S) that hold what query t < reach sees."""
        return [self._read(part, x_LSBHW, layer, t, reach) for part in self.manner]

    def _read(self, part, x_LSBHW, layer, t, reach):
        if isinstance(part, parts.Columns):
            stride = self._stride(part)
            rows = -(-reach // stride)
            L, S, *rest = x_LSBHW.shape
            x = x_LSBHW.reshape(L, S // stride, stride, *rest)
            x = _slice(x, (layer, 0, t % stride), (1, rows, 1))
            row, last = jnp.arange(rows), t // stride
            return x[0, :, 0], row < last if part.strict else row <= last
        width = min(part.width, self.T) if isinstance(part, parts.Band) else reach
        first = jnp.clip(t - width + 1, 0, self.places - width)
        j = first + jnp.arange(width)
        seen = (t - width < j) & (j <= t)
        return _slice(x_LSBHW, (layer, first), (1, width))[0], seen


@dataclasses.dataclass(frozen=True)
class Ring:
    """The latest tokens, position p at place p mod `places`."""

    part: parts.Band | parts.OwnBlock | parts.Self
    T: int

    @property
    def places(self) -> int:
        """The width of the part, or all of T."""
        part = self.part
        width = {parts.Band: "width", parts.OwnBlock: "size"}.get(type(part))
        return min(getattr(part, width), self.T) if width else 1

    def keep(self, x_TBHW, length):
        """Lay out the first `length` rows of those given."""
        place = jnp.arange(self.places)
        # The last position before `length` that lies at each place.
        held = length - 1 - (length - 1 - place) % self.places
        return _rows(x_TBHW, held[:, None])

    def write(self, x_LSBHW, x_BHW, layer, t):
        """Add the row of position t."""
        return _put(x_LSBHW, x_BHW, layer, t % self.places)

    def read(self, x_LSBHW, layer, t, reach):
        """Return pieces (kv_SBHW, seen_S) that hold what query t < reach sees."""
        last = t % self.places if isinstance(self.part, parts.OwnBlock) else t
        x_SBHW = _slice(x_LSBHW, (layer,), (1, self.places))[0]
        return [(x_SBHW, jnp.arange(self.places) <= last)]


@dataclasses.dataclass(frozen=True)
class Slices:
    """The summaries of whole blocks, one block after the other.

    An array of its own: two writes into one would make the compiler copy it.
    """

    part: parts.Summaries
    offsets: tuple[int, ...]  # of each head
    T: int

    @property
    def places(self) -> int:
        """As many as the last query sees."""
        return self._before(self.T)

    def _before(self, reach: int) -> int:
        """Places of the slices that queries before `reach` see."""
        return (reach - 1) // self.part.size * self.part.width

    def _starts(self) -> np.ndarray:
        """Where in a block the slice of each head begins."""
        return self.part.size - (np.array(self.offsets) + 1) * self.part.width

    def keep(self, x_TBHW, length):
        """Lay out the first `length` rows of those given."""
        del length  # what lies behind it is written before it is seen
        block, within = np.divmod(np.arange(self.places), self.part.width)
        held_SH = (block * self.part.size + within)[:, None] + self._starts()
        return _rows(x_TBHW, held_SH)

    def write(self, x_LSBHW, x_BHW, layer, t):
        """Add the row of position t."""
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
        """Return pieces (kv_SBHW, seen_S) that hold what query t < reach sees."""
        places = self._before(reach)
        if not places:
            return []
        block = jnp.arange(places) // self.part.width
        x_SBHW = _slice(x_LSBHW, (layer,), (1, places))[0]
        return [(x_SBHW, block < t // self.part.size)]


Store = Tokens | Ring | Slices


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query heads that keep keys in the same manner, and the heads of their keys."""

    stores: tuple[Store, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]


@functools.cache
def groups(pattern: Pattern, T: int, H: int, group: int) -> list[Heads]:
    """Group the query heads of H by what they keep, `group` of them a key head."""
    alike: dict[tuple[Part, ...], dict[int, int]] = {}
    for head in range(H):
        offset, manner = 0, []
        for part in pattern.parts(head):
            if isinstance(part, parts.Summaries):
                part, offset = dataclasses.replace(part, offset=0), part.offset
            manner.append(part)
        alike.setdefault(tuple(manner), {})[head] = offset
    found = []
    for manner, offset_of in alike.items():
        queries, offsets = tuple(offset_of), tuple(offset_of.values())
        keys = tuple(head // group for head in queries)
        if len(queries) == H and len(set(offsets)) == 1:
            # Query heads can share their key head only if all of them keep the same.
            keys = tuple(range(H // group))
            offsets = offsets[: len(keys)]
        found.append(Heads(_stores(manner, offsets, T), queries, keys))
    return found


def _stores(
    manner: tuple[Part, ...], offsets: tuple[int, ...], T: int
) -> tuple[Store, ...]:
    if any(isinstance(part, parts.All | parts.Columns) for part in manner):
        return (Tokens(manner, T),)
    stores = [
        Slices(part, offsets, T) if isinstance(part, parts.Summaries) else Ring(part, T)
        for part in manner
    ]
    return tuple(store for store in stores if store.places)


# ---- Arrays ------------------------------------------------------------------------


def take(x: jax.Array, heads, axis: int) -> jax.Array:
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
