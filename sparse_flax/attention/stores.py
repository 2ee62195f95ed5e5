"""Where decoding keeps keys and values: the arrays of a `decode.Cache`.

A store is an array [B, heads, places, W], a head's keys one after the other. Which
position lies at which place is static or follows from the position of the query; heads
whose parts are the same but for the offset of their summaries share a store.

    Tokens   every token, in order: All, Columns, and a Band beside Columns
    Latest   what is seen of the latest tokens, and the summaries of whole blocks:
             sections, one after the other, that are written and read at once
      Ring     the latest tokens: Band, OwnBlock, Self
      Slices   the summaries: Summaries
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

    def keep(self, x_BHTW, length):
        """Lay out the first `length` rows of those given."""
        del length  # what lies behind it is written before it is seen
        x_BHTW = x_BHTW[:, :, : self.places]
        missing = self.places - x_BHTW.shape[2]
        return jnp.pad(x_BHTW, [(0, 0), (0, 0), (0, missing), (0, 0)])

    def write(self, x_BHSW, x_BHW, t):
        """Add the row of position t."""
        return _put(x_BHSW, x_BHW, t)

    def read(self, x_BHSW, t, reach):
        """Return pieces (kv_BHSW, seen_S) that hold what query t < reach sees."""
        return [self._read(part, x_BHSW, t, reach) for part in self.manner]

    def _read(self, part, x_BHSW, t, reach):
        if isinstance(part, parts.Columns):
            stride = self._stride(part)
            rows = -(-reach // stride)
            B, H, S, W = x_BHSW.shape
            x = x_BHSW.reshape(B, H, S // stride, stride, W)[:, :, :rows]
            x = jax.lax.dynamic_index_in_dim(x, t % stride, 3, keepdims=False)
            row, last = jnp.arange(rows), t // stride
            return x, row < last if part.strict else row <= last
        width = min(part.width, self.T) if isinstance(part, parts.Band) else reach
        first = jnp.clip(t - width + 1, 0, self.places - width)
        j = first + jnp.arange(width)
        seen = (t - width < j) & (j <= t)
        return jax.lax.dynamic_slice_in_dim(x_BHSW, first, width, 2), seen


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

    def before(self, reach: int) -> int:
        """Places that hold something for queries before `reach`."""
        return min(self.places, reach)

    def held(self, length):
        """Return the last position before `length` that lies at each place."""
        place_S = jnp.arange(self.places)
        return length - 1 - (length - 1 - place_S) % self.places

    def place(self, t):
        """Return the place of position t."""
        return t % self.places

    def seen(self, t):
        """Whether query t sees what lies at each place."""
        last = t % self.places if isinstance(self.part, parts.OwnBlock) else t
        return jnp.arange(self.places) <= last


@dataclasses.dataclass(frozen=True)
class Slices:
    """The summaries of whole blocks, one block after the other."""

    part: parts.Summaries
    offsets: tuple[int, ...]  # of each head
    T: int

    @property
    def places(self) -> int:
        """As many as the last query sees."""
        return self.before(self.T)

    def before(self, reach: int) -> int:
        """Places of the slices that queries before `reach` see."""
        return (reach - 1) // self.part.size * self.part.width

    def _starts(self) -> np.ndarray:
        """Where in a block the slice of each head begins."""
        return self.part.size - (np.array(self.offsets) + 1) * self.part.width

    def held(self, length):
        """Return the position that lies at each place, for each head."""
        del length  # what lies behind it is written before it is seen
        block_S, within_S = np.divmod(np.arange(self.places), self.part.width)
        return self._starts()[:, None] + block_S * self.part.size + within_S

    def place(self, t):
        """Return the place of position t for each head, `places` where it has none."""
        width = self.part.width
        within_H = t % self.part.size - self._starts()
        place_H = t // self.part.size * width + within_H
        return jnp.where((0 <= within_H) & (within_H < width), place_H, self.places)

    def seen(self, t):
        """Whether query t sees what lies at each place."""
        return jnp.arange(self.places) // self.part.width < t // self.part.size


@dataclasses.dataclass(frozen=True)
class Latest:
    """Rings and slices of the same heads in one array, the slices last.

    One array, because each write and each read of another one costs a GPU as much time
    as a hundred thousand keys.
    """

    sections: tuple[Ring | Slices, ...]

    @property
    def places(self) -> int:
        """Those of all sections."""
        return sum(section.places for section in self.sections)

    def keep(self, x_BHTW, length):
        """Lay out the first `length` rows of those given."""
        H = x_BHTW.shape[1]
        held_HS = jnp.concatenate(
            [
                jnp.broadcast_to(section.held(length), (H, section.places))
                for section in self.sections
            ],
            axis=1,
        )
        return _rows(x_BHTW, held_HS)

    def write(self, x_BHSW, x_BHW, t):
        """Add the row of position t: once in each section."""
        if len(self.sections) == 1 and isinstance(self.sections[0], Ring):
            return _put(x_BHSW, x_BHW, self.sections[0].place(t))
        H, first, places = x_BHW.shape[1], 0, []
        for section in self.sections:
            place = section.place(t)
            place = jnp.where(place < section.places, first + place, self.places)
            places.append(jnp.broadcast_to(place, (H,)))
            first += section.places
        place_CH = jnp.stack(places)
        return x_BHSW.at[:, np.arange(H), place_CH].set(
            x_BHW[:, None].astype(x_BHSW.dtype), mode="drop", unique_indices=True
        )

    def read(self, x_BHSW, t, reach):
        """Return pieces (kv_BHSW, seen_S) that hold what query t < reach sees."""
        whole, last = self.sections[:-1], self.sections[-1]
        end = sum(section.places for section in whole) + last.before(reach)
        seen = [section.seen(t) for section in self.sections]
        return [(x_BHSW[:, :, :end], jnp.concatenate(seen)[:end])]


Store = Tokens | Latest
TOKENS_READS = parts.All | parts.Columns | parts.Band
LATEST_READS = parts.Band | parts.OwnBlock | parts.Self | parts.Summaries


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query heads that keep keys in the same manner, and the heads of their keys."""

    store: Store
    queries: tuple[int, ...]
    keys: tuple[int, ...]


@functools.cache
def groups(pattern: Pattern, T: int, H: int, group: int) -> list[Heads]:
    """Group the query heads of H by what they keep, `group` of them a key head."""
    alike: dict[tuple[Part, ...], dict[int, int]] = {}
    for head in range(H):
        offset = 0
        manner: list[Part] = []
        for part in pattern.parts(head):
            if isinstance(part, parts.Summaries):
                part, offset = dataclasses.replace(part, offset=0), part.offset
            manner.append(part)
        alike.setdefault(tuple(manner), {})[head] = offset
    found = []
    for same, offset_of in alike.items():
        queries, offsets = tuple(offset_of), tuple(offset_of.values())
        keys = tuple(head // group for head in queries)
        if len(queries) == H and len(set(offsets)) == 1:
            # Query heads can share their key head only if all of them keep the same.
            keys = tuple(range(H // group))
            offsets = offsets[: len(keys)]
        found.append(Heads(_store(same, offsets, T), queries, keys))
    return found


def _store(manner: tuple[Part, ...], offsets: tuple[int, ...], T: int) -> Store:
    every = any(isinstance(part, parts.All | parts.Columns) for part in manner)
    known = TOKENS_READS if every else LATEST_READS
    strides = {part.stride for part in manner if isinstance(part, parts.Columns)}
    if len(strides) > 1 or not all(isinstance(part, known) for part in manner):
        raise NotImplementedError(
            f"decode keeps nothing for {' and '.join(map(str, manner))} together; add "
            "it to stores.py"
        )
    if every:
        return Tokens(manner, T)
    rings = [
        Ring(part, T)
        for part in manner
        if isinstance(part, parts.Band | parts.OwnBlock | parts.Self)
    ]
    slices = [
        Slices(part, offsets, T) for part in manner if isinstance(part, parts.Summaries)
    ]
    return Latest((*rings, *(section for section in slices if section.places)))


# ---- Arrays ------------------------------------------------------------------------


def take(x: jax.Array, heads, axis: int) -> jax.Array:
    """Take some heads; all of them for nothing."""
    if tuple(heads) == tuple(range(x.shape[axis])):
        return x
    return jnp.take(x, np.asarray(heads), axis=axis)


def _rows(x_BHTW: jax.Array, held_HS) -> jax.Array:
    """Take the row of each place and head; any row where there is none yet."""
    if not x_BHTW.shape[2]:
        B, H, _, W = x_BHTW.shape
        x_BHTW = jnp.zeros_like(x_BHTW, shape=(B, H, 1, W))
    held_HS = jnp.clip(held_HS, 0, x_BHTW.shape[2] - 1)
    return jnp.take_along_axis(x_BHTW, held_HS[None, :, :, None], axis=2)


def _put(x_BHSW: jax.Array, x_BHW: jax.Array, place) -> jax.Array:
    row = x_BHW[:, :, None].astype(x_BHSW.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BHSW, row, place, axis=2)
