"""One sequence over several devices: what they send each other, part by part.

Each of the n devices along a mesh axis holds a shard, T/n neighbouring tokens. A
pattern's parts become shares: attention that a device computes alone, once it has
fetched what it needs. The union of the shares is the pattern.

    part       fetched                                            then computed
    Band       last width - 1 keys before the shard (`Halo`)      Band
    Columns    whole columns, all-to-all there and back (`Turn`)  Columns
    OwnBlock   nothing: blocks do not cross shards (`Here`)       OwnBlock
    Summaries  nothing                                            Summaries
               and all summaries, all-gather (`Before`)           Everything
    Self       nothing                                            Self
    All        nothing                                            All
               and all keys, all-gather (`Before`)                Everything

What is computed are parts again, on longer or fewer sequences, so any implementation
that computes parts can be used. Backward, one that has kernels for its gradient gets
the (out, log-sum-exp) of the whole union in each share, which makes the sum of their
gradients exact; 'gathered' is differentiated as it stands.

All functions here run inside `jax.shard_map` over the axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from sparse_flax.attention import heads, parts, union
from sparse_flax.attention.layouts import attend_by, up
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Axis:
    """The mesh axis that tokens are spread over."""

    name: str
    size: int  # devices
    tokens: int  # of a shard

    def place(self) -> jax.Array:
        """Return which shard of the sequence this device holds."""
        return jax.lax.axis_index(self.name)


# ---- Shares ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
    """Parts over tokens that a device holds already (`Here`)."""

    axis: Axis
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """Queries of a sequence."""
        return self.axis.tokens

    @property
    def says(self) -> str:
        """What is sent."""
        return f"{_listed(self.parts)} inside each device's tokens"

    def fetch_q(self, x_BTHK: jax.Array) -> jax.Array:
        """Lay out queries, or anything with a row for each query; linear."""
        return x_BTHK

    def fetch_kv(self, x_BTHK: jax.Array) -> tuple[jax.Array, ...]:
        """Lay out keys or values; linear. The keys of several are disjoint."""
        return (self.fetch_q(x_BTHK),)

    def give(self, x: jax.Array) -> jax.Array:
        """Undo `fetch_q` for an output (.., V) or a log-sum-exp."""
        return x

    def applies(self) -> tuple[jax.Array | None, ...]:
        """Whether this device sees each of the keys of `fetch_kv`; None: all do."""
        return (None,)


Here = Share


@dataclasses.dataclass(frozen=True)
class Halo(Share):
    """The keys before the shard that its first queries reach, from neighbours.

    Queries and keys lie on a sequence that begins with the first key that there is, so
    that nothing has to be hidden: the first shard is followed by zeros, not preceded.
    """

    @property
    def reach(self) -> int:
        """Keys before the shard."""
        (band,) = self.parts
        assert isinstance(band, parts.Band)
        return min(band.width - 1, (self.axis.size - 1) * self.axis.tokens)

    @property
    def tokens(self) -> int:
        """Halo and shard."""
        return self.reach + self.axis.tokens

    @property
    def says(self) -> str:
        """What is sent."""
        hops = -(-self.reach // self.axis.tokens)
        neighbours = "the device" if hops == 1 else f"the {hops} devices"
        return f"{_listed(self.parts)} with {self.reach} keys of {neighbours} before"

    def _before(self) -> jax.Array:
        """How many of the keys before the shard exist."""
        return jnp.minimum(self.axis.place() * self.axis.tokens, self.reach)

    def _from_the_start(self, x: jax.Array, rows: int) -> jax.Array:
        """Lay `rows` rows and the shard out, without those that do not exist."""
        front = self.reach - rows
        x = jnp.pad(x, [(0, 0), (front, self.reach)] + [(0, 0)] * (x.ndim - 2))
        missing = self.reach - self._before()
        return jax.lax.dynamic_slice_in_dim(x, missing, self.tokens, 1)

    def fetch_q(self, x_BTHK: jax.Array) -> jax.Array:
        """Place the shard behind its halo, whose rows are zero."""
        return self._from_the_start(x_BTHK, 0)

    def fetch_kv(self, x_BTHK: jax.Array) -> tuple[jax.Array, ...]:
        """Fetch the halo, farthest device first."""
        n, T, found = self.axis.size, self.axis.tokens, [x_BTHK]
        for hop in range(1, -(-self.reach // T) + 1):
            rows = min(self.reach - (hop - 1) * T, T)
            pairs = [(device, device + hop) for device in range(n - hop)]
            found.insert(0, jax.lax.ppermute(x_BTHK[:, -rows:], self.axis.name, pairs))
        return (self._from_the_start(jnp.concatenate(found, axis=1), self.reach),)

    def give(self, x: jax.Array) -> jax.Array:
        """Take the shard's own rows."""
        return jax.lax.dynamic_slice_in_dim(x, self._before(), self.axis.tokens, 1)


@dataclasses.dataclass(frozen=True)
class Turn(Share):
    """Whole columns, a piece of the stride to each device."""

    stride: int

    @property
    def width(self) -> int:
        """Columns of a device."""
        return up(self.stride, self.axis.size) // self.axis.size

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.axis.size * self.axis.tokens // self.stride * self.width

    @property
    def says(self) -> str:
        """What is sent."""
        return f"{_listed(self.parts)} all-to-all, {self.width} columns a device"

    def fetch_q(self, x_BTHK: jax.Array) -> jax.Array:
        """(B, rows * stride, H, K) to (B, n * rows * columns, H, K)."""
        B, T, H, K = x_BTHK.shape
        x = x_BTHK.reshape(B, T // self.stride, self.stride, H, K)
        missing = self.width * self.axis.size - self.stride
        x = jnp.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0), (0, 0)])
        x = jax.lax.all_to_all(x, self.axis.name, 2, 1, tiled=True)
        return x.reshape(B, -1, H, K)

    def give(self, x: jax.Array) -> jax.Array:
        """Send each row back to where it came from."""
        x = x.reshape(x.shape[0], -1, self.width, *x.shape[2:])
        x = jax.lax.all_to_all(x, self.axis.name, 1, 2, tiled=True)
        x = x[:, :, : self.stride]
        return x.reshape(x.shape[0], -1, *x.shape[3:])


@dataclasses.dataclass(frozen=True)
class Before(Share):
    """Keys of all earlier shards, or what `summary` takes of them.

    Of every 2 * half shards, the later half sees the earlier half's keys: shard i sees
    shard j < i at the highest bit in which i and j differ, and at no other. So levels
    of 1, 2, 4, ... shards need no mask, and their shapes are the same on all devices.
    Together they cost what the last device would alone, for which all others wait.
    """

    summary: parts.Summaries | None

    @property
    def says(self) -> str:
        """What is sent."""
        what = f"the keys of {self.summary}" if self.summary else "all keys"
        return f"{what} of all devices gathered on each"

    def _levels(self) -> list[int]:
        return [1 << level for level in range((self.axis.size - 1).bit_length())]

    def applies(self) -> tuple[jax.Array | None, ...]:
        """Whether the shard is in the later half, for each level."""
        return tuple((self.axis.place() & half) > 0 for half in self._levels())

    def fetch_kv(self, x_BTHK: jax.Array) -> tuple[jax.Array, ...]:
        """Gather once, and cut out the keys of each level."""
        x = self.summary.fold_kv(x_BTHK) if self.summary else x_BTHK
        S = x.shape[1]
        x = jax.lax.all_gather(x, self.axis.name, axis=1, tiled=True)
        # Or XLA for TPUs gathers again in every turn of a loop over queries.
        x = jax.lax.optimization_barrier(x)
        place, found = self.axis.place(), []
        for half in self._levels():
            first = place // (2 * half) * (2 * half) * S
            found.append(jax.lax.dynamic_slice_in_dim(x, first, half * S, 1))
        return tuple(found)


def shares(some_parts: Sequence[Part], axis: Axis) -> list[Share]:
    """Split disjoint parts into disjoint shares; `refusal` says which can be."""
    T = axis.size * axis.tokens
    here: list[Part] = []
    away: list[Share] = []
    for part in some_parts:
        size = getattr(part, "stride", getattr(part, "size", 0))
        if isinstance(part, parts.Band) and part.width > 1:
            away.append(Halo(axis, (part,)))
        elif isinstance(part, parts.Columns) and size >= T:
            # No other token is so far away.
            here += [] if part.strict else [parts.Self()]
        elif isinstance(part, parts.Columns):
            turn = Turn(axis, (), size)
            columns = parts.Columns(turn.width, part.strict)
            away.append(dataclasses.replace(turn, parts=(columns,)))
        elif isinstance(part, parts.Summaries):
            here += [part] if size < axis.tokens else []
            away += [Before(axis, (parts.Everything(),), part)] if size < T else []
        elif isinstance(part, parts.All) or (
            isinstance(part, parts.OwnBlock) and size >= T
        ):
            here.append(parts.All())
            away.append(Before(axis, (parts.Everything(),), None))
        elif isinstance(part, parts.Band | parts.OwnBlock | parts.Self):
            here.append(part)
        else:
            raise NotImplementedError(f"parallel does not know {part}")
    return ([Here(axis, tuple(here))] if here else []) + away


def refusal(pattern: Pattern, tokens: int, devices: int) -> str | None:
    """Return None, or why a pattern cannot be spread, as a sentence.

    Args:
      pattern: any.
      tokens: of the whole sequence.
      devices: that it is spread over.
    """
    if tokens % devices:
        fits = max(n for n in range(1, devices) if tokens % n == 0)
        return (
            f"{tokens} tokens do not divide over {devices} devices; try {fits} devices"
        )
    each = tokens // devices
    if devices == 1:
        return None
    for head in range(pattern.head_period):
        for part in pattern.parts(head):
            name = "stride" if isinstance(part, parts.Columns) else "size"
            size = getattr(part, name, 1)
            if size < tokens and each % size:
                what = "stride" if name == "stride" else "block"
                divisors = [d for d in range(1, each + 1) if each % d == 0]
                nearest = min(divisors, key=lambda d: (abs(d - size), d))
                return (
                    f"{pattern} over {devices} devices with {each} tokens each: "
                    f"{what}s of {size} would cross devices; try {nearest}"
                )
    return None


def supports(
    module: ModuleType, pattern: Pattern, q: Any, k: Any, v: Any, devices: int
) -> str | None:
    """Return None, or why an implementation does not compute a pattern's shares.

    Args:
      module: as in dispatch.py. It needs `supports_parts` and `attend_parts`; and
        `parts_gradients`, unless `attend_parts` can be differentiated.
      pattern: one that `refusal` lets pass.
      q, k, v: anything with the shapes and dtypes of one device's arrays.
      devices: along the axis.
    """
    if not hasattr(module, "attend_parts"):
        name = module.__name__.rpartition(".")[2]
        return f"{name} needs a sequence whole, and it is spread over {devices} devices"
    axis = Axis("", devices, q.shape[1])
    for head in range(min(q.shape[2], pattern.head_period)):
        for share in shares(pattern.parts(head), axis):
            local = [
                jax.ShapeDtypeStruct((x.shape[0], share.tokens, *x.shape[2:]), x.dtype)
                for x in (q, k, v)
            ]
            if why := module.supports_parts(share.parts, *local):
                return why
    return None


def says(pattern: Pattern, tokens: int, devices: int) -> list[str]:
    """Say what the devices send each other for a pattern, a line a share."""
    if devices == 1:
        return []
    axis = Axis("", devices, tokens // devices)
    lines = [
        share.says
        for head in range(pattern.head_period)
        for share in shares(pattern.parts(head), axis)
    ]
    return list(dict.fromkeys(lines))


# ---- Their union -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is attended to, and what computes it."""

    parts: tuple[Part, ...]
    axis: Axis
    scale: float
    module: ModuleType

    def shares(self) -> list[Share]:
        """The shares of a device."""
        return shares(self.parts, self.axis)


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
    axis: str,
    module: ModuleType,
) -> jax.Array:
    """Return out_BTHV in v's dtype of this device's tokens, inside a shard_map.

    Args:
      q_BTHK, k_BTHK, v_BTHV: the shard of tokens that the device holds.
      pattern: over the whole sequence; one that `refusal` lets pass.
      scale: multiplies q.k.
      axis: the mesh axis that tokens are spread over, in order.
      module: what computes the shares; see `supports`.
    """
    where = Axis(axis, jax.lax.axis_size(axis), q_BTHK.shape[1])

    def run(q, k, v, head):
        plan = Plan(pattern.parts(head), where, scale, module)
        if hasattr(module, "parts_gradients"):
            return attend_by(_forward, _backward, plan, q, k, v)
        return _forward(plan, q, k, v)[0]

    return heads.by_period(run, q_BTHK, k_BTHK, v_BTHV, pattern.head_period)


def _forward(plan: Plan, q, k, v):
    """Return (out_BTHV, lse_BTH)."""
    pieces = []
    for share in plan.shares():
        rows = share.fetch_q(q)
        found = zip(share.fetch_kv(k), share.fetch_kv(v), share.applies(), strict=True)
        for keys, values, applies in found:
            out, lse = plan.module.attend_parts(
                rows, keys, values, share.parts, plan.scale
            )
            lse = lse if applies is None else jnp.where(applies, lse, -jnp.inf)
            pieces.append((share.give(out), share.give(lse)))
    out, lse = union.merge_all((out.astype(jnp.float32), lse) for out, lse in pieces)
    return out.astype(v.dtype), lse


def _backward(plan: Plan, q, k, v, out, lse, d_out):
    """Return (dq, dk, dv), given what `_forward` returned."""
    total = [jnp.zeros_like(x, jnp.float32) for x in (q, k, v)]
    for share in plan.shares():
        rows, back_q = jax.vjp(share.fetch_q, q)
        keys, back_k = jax.vjp(share.fetch_kv, k)
        values, back_v = jax.vjp(share.fetch_kv, v)
        rest = [share.fetch_q(x) for x in (out, lse[..., None], d_out)]
        rest[1] = rest[1][..., 0]
        gradients = []
        for some_k, some_v, applies in zip(keys, values, share.applies(), strict=True):
            made = plan.module.parts_gradients(
                rows, some_k, some_v, *rest, share.parts, plan.scale
            )
            if applies is not None:
                made = [jnp.where(applies, x, jnp.zeros_like(x)) for x in made]
            gradients.append(made)
        dq, dk, dv = zip(*gradients, strict=True)
        given = back_q(functools.reduce(jnp.add, dq)), back_k(dk), back_v(dv)
        total = [
            a + b.astype(jnp.float32) for a, (b,) in zip(total, given, strict=True)
        ]
    return tuple(x.astype(q.dtype) for x in total)


def _listed(some_parts: Sequence[Part]) -> str:
    return " and ".join(map(str, some_parts))
