"""Parts: the six disjoint pieces that every pattern is a union of.

A part is a re-layout ("fold") of q, k and v around one small dense problem (its
"core"). A backend implements the four cores and nothing else; `union.merge` puts the
parts of a pattern together again. So patterns, parts and backends add up, they do not
multiply.

    part       query i sees key j iff               core, on the folded view
    All        j <= i                               Causal on (B, T, H, K)
    Band       0 <= i - j < width                   Window on (B, T, H, K)
    Columns    j < i (or <=), (i-j) mod stride = 0  Causal on (B, T/S, S*H, K)
    OwnBlock   j <= i in the same block             Causal on (B*T/S, S, H, K)
    Summaries  j in the slice of an earlier block   BlockCausal, keys (B, T/S*C, H, K)
    Self       j = i                                Diagonal on (B, T, H, K)

Across devices (parallel.py) there is one more, Everything, whose core is Full.

To add a part: write its class here, on a core that there is, and say what it is to
`cudnn._pieces`, `parallel.shares` and `stores.py`, which refuse parts that they do not
know; hopper has kernels for some patterns alone, and leaves the rest to cudnn. A new
core needs a function in `gathered.CORES` first.

Folds pad T at its end to a multiple of the block. Padded keys lie after every real
query, so no causal core lets one be seen. Query heads h use key head h // (H/H_kv), in
the folded view as before it: (s*H + h) // G = s*H_kv + h // G.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# ---- Cores: what a backend computes ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Causal:
    """Query row i sees key rows j <= i, or j < i if strict."""

    strict: bool = False


@dataclasses.dataclass(frozen=True)
class Window:
    """Query i sees the `width` keys up to and with itself: 0 <= i - j < width."""

    width: int


@dataclasses.dataclass(frozen=True)
class BlockCausal:
    """Query i sees key j iff j // k_block < i // q_block."""

    q_block: int
    k_block: int


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """Query i sees key i alone: out = v_i, log-sum-exp = scale * q_i.k_i."""


@dataclasses.dataclass(frozen=True)
class Full:
    """Every query sees every key."""


Core = Causal | Window | BlockCausal | Diagonal | Full


# ---- Parts -------------------------------------------------------------------------


class Part:
    """One disjoint piece of a pattern; the base class folds nothing."""

    @property
    def core(self) -> Core:
        """What computes it on the folded view."""
        raise NotImplementedError

    def fold_q(self, x_BTHK: jax.Array) -> jax.Array:
        """Lay queries, or anything with a row for each query, out for the core."""
        return x_BTHK

    def fold_kv(self, x_BTHK: jax.Array) -> jax.Array:
        """Lay keys or values out for the core."""
        return x_BTHK

    def unfold(self, x: jax.Array, T: int, H: int) -> jax.Array:
        """Undo `fold_q` for an output (.., H, V) or a log-sum-exp (.., H)."""
        del T, H
        return x

    def pairs(self, T: int) -> int:
        """Count the (query, key) pairs of one head over T tokens."""
        raise NotImplementedError

    def keys(self, i: int) -> np.ndarray:
        """Return the keys that query i sees, ascending: int [S], in O(S)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class All(Part):
    """Every earlier key and the query's own."""

    @property
    def core(self) -> Core:
        """Causal()."""
        return Causal()

    def pairs(self, T: int) -> int:
        """T (T + 1) / 2."""
        return _triangle(T)

    def keys(self, i: int) -> np.ndarray:
        """0 to i."""
        return np.arange(i + 1)


@dataclasses.dataclass(frozen=True)
class Band(Part):
    """The last `width` keys, the query's own among them."""

    width: int

    @property
    def core(self) -> Core:
        """Window(width)."""
        return Window(self.width)

    def pairs(self, T: int) -> int:
        """`width` a query, less what the start of the sequence cuts off."""
        return _triangle(T) - _triangle(max(T - self.width, 0))

    def keys(self, i: int) -> np.ndarray:
        """The last `width` up to i."""
        return np.arange(max(i + 1 - self.width, 0), i + 1)


@dataclasses.dataclass(frozen=True)
class Columns(Part):
    """Keys a multiple of `stride` back; strict leaves out the query's own.

    Rows become the sequence and (column, head) the heads, which costs nothing.
    """

    stride: int
    strict: bool = False

    @property
    def core(self) -> Core:
        """Causal(strict) over rows."""
        return Causal(self.strict)

    def fold_q(self, x_BTHK: jax.Array) -> jax.Array:
        """(B, T, H, K) -> (B, R, S*H, K)."""
        stride = min(self.stride, x_BTHK.shape[1])
        x = _pad(x_BTHK, stride)
        B, T, H, K = x.shape
        # In two steps, since a sharded dimension may be merged, and not split as well.
        x = x.reshape(B, T // stride, stride, H, K)
        return x.reshape(B, T // stride, stride * H, K)

    fold_kv = fold_q

    def unfold(self, x: jax.Array, T: int, H: int) -> jax.Array:
        """(B, R, S*H, ..) -> (B, T, H, ..)."""
        x = x.reshape(*x.shape[:2], -1, H, *x.shape[3:])
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]

    def pairs(self, T: int) -> int:
        """One for each whole stride before the query, and itself unless strict."""
        rows, rest = divmod(T, self.stride)
        earlier = self.stride * _triangle(rows - 1) + rest * rows
        return earlier + (0 if self.strict else T)

    def keys(self, i: int) -> np.ndarray:
        """Every `stride` from the row's first place in the column."""
        return np.arange(i % self.stride, i if self.strict else i + 1, self.stride)


@dataclasses.dataclass(frozen=True)
class OwnBlock(Part):
    """Keys up to the query's own in its block of `size`; blocks join the batch."""

    size: int

    @property
    def core(self) -> Core:
        """Causal()."""
        return Causal()

    def fold_q(self, x_BTHK: jax.Array) -> jax.Array:
        """(B, T, H, K) -> (B*R, S, H, K)."""
        size = min(self.size, x_BTHK.shape[1])
        x = _pad(x_BTHK, size)
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return x.reshape(-1, *x.shape[2:])

    fold_kv = fold_q

    def unfold(self, x: jax.Array, T: int, H: int) -> jax.Array:
        """(B*R, S, H, ..) -> (B, T, H, ..)."""
        rows = -(-T // min(self.size, T))
        x = x.reshape(x.shape[0] // rows, rows, *x.shape[1:])
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]

    def pairs(self, T: int) -> int:
        """A triangle a block."""
        blocks, rest = divmod(T, self.size)
        return blocks * _triangle(self.size) + _triangle(rest)

    def keys(self, i: int) -> np.ndarray:
        """From the start of the block."""
        return np.arange(i // self.size * self.size, i + 1)


@dataclasses.dataclass(frozen=True)
class Summaries(Part):
    """A slice of `width` keys from each earlier block of `size`.

    The slice ends offset * width keys before the end of its block.
    """

    size: int
    width: int
    offset: int = 0

    @property
    def core(self) -> Core:
        """BlockCausal over the gathered keys."""
        return BlockCausal(self.size, self.width)

    def fold_kv(self, x_BTHK: jax.Array) -> jax.Array:
        """(B, T, H, K) -> (B, R*C, H, K)."""
        x = _pad(x_BTHK, self.size)
        B, T, H, K = x.shape
        x = x.reshape(B, T // self.size, self.size, H, K)
        end = self.size - self.offset * self.width
        return x[:, :, end - self.width : end].reshape(B, -1, H, K)

    def pairs(self, T: int) -> int:
        """`width` keys for each earlier block."""
        blocks, rest = divmod(T, self.size)
        return self.width * (self.size * _triangle(blocks - 1) + rest * blocks)

    def keys(self, i: int) -> np.ndarray:
        """A slice of each block before the query's."""
        first = self.size - (self.offset + 1) * self.width
        starts = np.arange(i // self.size)[:, None] * self.size + first
        return (starts + np.arange(self.width)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Self(Part):
    """The query's own key, where no other part holds it."""

    @property
    def core(self) -> Core:
        """Diagonal()."""
        return Diagonal()

    def pairs(self, T: int) -> int:
        """One a query."""
        return T

    def keys(self, i: int) -> np.ndarray:
        """The query's own alone."""
        return np.array([i])


@dataclasses.dataclass(frozen=True)
class Everything(Part):
    """All keys that are given, of which there may be more or fewer than queries.

    In no pattern: what parallel.py makes of keys that other devices hold.
    """

    @property
    def core(self) -> Core:
        """Full()."""
        return Full()


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    missing = -x.shape[1] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
