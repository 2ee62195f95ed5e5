"""TPUs from v4 on: the parts of a pattern as splash attention, or as einsums.

    part       with splash, where a head has 128 rows or more
    All        causal
    Band       chunks of the sequence in the batch, each over its own and earlier keys
    Columns    causal, or strictly, over the rows of each column
    OwnBlock   causal, blocks in the batch
    Summaries  never, nor Self

What splash does not take is computed as gathered.py does. The masks that splash wants
as objects are made for a chunk, a block or a column; only All's grow with T squared.
The backward pass is that of pieces.py. Reverse mode only. bfloat16 and float32; softmax
and sums in float32, q scaled in its own dtype before splash.

Never run on a TPU: compiled by the TPU's own compiler, and its kernels interpreted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_flax.attention import gathered, heads, parts, pieces
from sparse_flax.attention.layouts import attend_by, fit, jax_refusal, up
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern
from sparse_flax.attention.pieces import Core, Fold
from sparse_flax.attention.splash_calls import BLOCK, LANES, SPLASH, Seen

OLDEST_JAX, TOO_NEW_JAX = (0, 10, 2), (0, 13)  # whose private functions are known
DTYPES = ("bfloat16", "float32")
NARROWEST_HEAD, WIDEST_HEAD = 32, 256
# Queries of a band in one chunk: its keys before the chunk are copied once more.
CHUNK = 4 * BLOCK


def runs_on(device_kind: str) -> str | None:
    """Return None on a TPU from v4 on, else a sentence: what this is."""
    found = re.match(r"TPU ?v?(\d+)", device_kind)
    if found and int(found[1]) >= 4:
        return None
    return f"tpu needs a TPU v4 or newer, and this is {device_kind}"


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> str | None:
    """Return None, or the sentence that says why not.

    Args:
      pattern: any.
      q, k, v: anything with the shape and dtype of arrays that fit `sparse_attention`.
    """
    del pattern
    return supports_parts((), q, k, v)


def supports_parts(some_parts: Sequence[Part], q: Any, k: Any, v: Any) -> str | None:
    """Do as `supports`, for parts."""
    del some_parts, k, v
    if why := jax_refusal("tpu", OLDEST_JAX, TOO_NEW_JAX):
        return why
    if np.dtype(q.dtype).name not in DTYPES:
        return (
            f"tpu computes {' and '.join(DTYPES)}, not {q.dtype}; try q, k and v in "
            "bfloat16"
        )
    return None


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Return out_BTHV in v's dtype; `interpret` runs it on a CPU, for tests."""

    def run(q, k, v, head):
        what = Union.of(pattern.parts(head), q, v, scale, interpret)
        return attend_by(pieces.forward, pieces.backward, what, q, k, v)

    return heads.by_period(run, q_BTHK, k_BTHK, v_BTHV, pattern.head_period)


def attend_parts(q_BTHK, k_BTHK, v_BTHV, some_parts, scale, interpret=False):
    """Return (out_BTHV, lse_BTH) over the union of disjoint parts."""
    what = Union.of(some_parts, q_BTHK, v_BTHV, scale, interpret)
    return pieces.forward(what, q_BTHK, k_BTHK, v_BTHV)


def parts_gradients(
    q_BTHK, k_BTHK, v_BTHV, out, lse_BTH, d_out, some_parts, scale, interpret=False
):
    """Return (dq, dk, dv); out and lse_BTH may be of a union with other parts."""
    what = Union.of(some_parts, q_BTHK, v_BTHV, scale, interpret)
    return pieces.backward(what, q_BTHK, k_BTHK, v_BTHV, out, lse_BTH, d_out)


class Piece(NamedTuple):
    """A re-layout around one call of splash."""

    fold_q: Fold
    fold_kv: Fold
    seen: Seen


@dataclasses.dataclass(frozen=True)
class Union:
    """What is attended to, and how."""

    parts: tuple[Part, ...]
    scale: float
    fits: bool  # the width of heads fits splash
    interpret: bool

    @classmethod
    def of(cls, some_parts: Sequence[Part], q, v, scale, interpret) -> Union:
        """See whether splash takes heads of these widths."""
        fits = all(NARROWEST_HEAD <= x.shape[3] <= WIDEST_HEAD for x in (q, v))
        return cls(tuple(some_parts), scale, fits, interpret)

    def calls(self, q) -> Iterator[tuple[pieces.Piece, Core, tuple]]:
        """Each piece with its core and the core's last arguments."""
        for part in self.parts:
            rows = jax.eval_shape(part.fold_q, q).shape[1]
            few = rows < LANES
            if (
                self.fits
                and not few
                and isinstance(part.core, parts.Causal | parts.Window)
            ):
                for piece in _pieces(part, q.shape[1]):
                    yield piece, SPLASH, (self.scale, piece.seen, self.interpret)
            else:
                yield part, EINSUM, (self.scale, part.core)


def _pieces(part: Part, T: int) -> Iterator[Piece]:
    """Split a part into disjoint pieces."""
    if not isinstance(part, parts.Band):
        assert isinstance(part.core, parts.Causal)
        yield Piece(part.fold_q, part.fold_kv, Seen(-int(part.core.strict)))
        return
    width = min(part.width, T)
    behind = up(width - 1, BLOCK)
    chunks = -(-T // max(CHUNK, behind))
    size = up(-(-T // chunks), BLOCK)  # not below behind, which is a multiple

    def first(x):
        return x[:, :size]

    def others(x):
        """(B, T, H, K) -> (B*n, size, H, K), without the first chunk."""
        x = fit(x, up(T, size), 1)
        return x[:, size:].reshape(-1, size, *x.shape[2:])

    def others_and_before(x):
        x = fit(x, up(T, size), 1)
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        before = x[:, :-1, size - behind :]
        x = jnp.concatenate([before, x[:, 1:]], axis=2)
        return x.reshape(-1, behind + size, *x.shape[3:])

    # Apart, because no keys come before it and the others share one mask.
    yield Piece(first, first, Seen(0, width))
    if T > size:
        yield Piece(others, others_and_before, Seen(behind, width))


# ---- What splash does not take -----------------------------------------------------


def _einsum_forward(q, k, v, scale, core):
    return gathered.CORES[type(core)](core, q, k, v, scale)


def _einsum_backward(q, k, v, out, lse, d_out, scale, core):
    """Differentiate the merge by hand, and the core by jax."""

    def run(q, k, v):
        return _einsum_forward(q, k, v, scale, core)

    (own_out, own_lse), pull = jax.vjp(run, q, k, v)
    weight = jnp.exp(own_lse - lse)
    d_out = d_out.astype(jnp.float32)
    d_lse = weight * jnp.sum((own_out - out.astype(jnp.float32)) * d_out, axis=-1)
    return pull((weight[..., None] * d_out, d_lse))


EINSUM = Core(_einsum_forward, _einsum_backward)
