"""NVIDIA from Ampere on: the parts of a pattern as calls of cuDNN's flash attention.

Every part becomes one or more "pieces": a re-layout of q, k and v around attention that
cuDNN knows (causal, a causal window, no mask). Nothing but pairs that are seen is
computed, up to cuDNN's own tiles and to padding of the last block.

    part       pieces
    All        causal on (B, T, H, K)
    Band       causal with a window on (B, T, H, K)
    Columns    causal on (B, R, S*H, K); strict: rows 1.. against rows ..R-1 (`_shift`)
    OwnBlock   causal on (B*R, S, H, K)
    Summaries  no mask, on log2(R) levels of a tree of blocks (`_level`)
    Self       plain JAX

The backward pass is that of pieces.py. Reverse mode only. cuDNN adds up dq in no fixed
order, so gradients may differ in the last bits from run to run. bfloat16 and float16,
with softmax and sums in float32.

Run on Hopper alone (tests/test_gpu_cudnn.py); on other GPUs compiled, never run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from sparse_flax.attention import heads, parts, pieces
from sparse_flax.attention.cudnn_calls import (
    CUDNN,
    OLDEST_JAX,
    SELF,
    TOO_NEW_JAX,
)
from sparse_flax.attention.layouts import (
    MOST_BLOCKS,
    attend_by,
    fit,
    jax_refusal,
    refusal,
    up,
)
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern
from sparse_flax.attention.pieces import Core, Fold

# Every NVIDIA GPU is from Ampere on, but for these. The old names are a closed list;
# that of the new ones grows, so a name nobody has heard of is taken for a new one.
NVIDIA = re.compile(r"\b(NVIDIA|Tesla|Quadro|GeForce)\b")
BEFORE_AMPERE = re.compile(
    r"Tesla|Quadro|TITAN|\bGTX|\bRTX 20[678]0|\bMX\d|\bGT \d"
    r"|\b(GV100|GP100|V100S?|[KMP]\d+[a-zA-Z]*|T\d+[a-zA-Z]*)\b"
)


def runs_on(device_kind: str) -> str | None:
    """Return None on an NVIDIA GPU from Ampere on, else a sentence: what this is."""
    if NVIDIA.search(device_kind) and not BEFORE_AMPERE.search(device_kind):
        return None
    return (
        "cudnn needs an NVIDIA GPU of compute capability 8 or newer (A100, RTX 3090, "
        f"L4, H100), and this is {device_kind}"
    )


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> str | None:
    """Return None, or the sentence that says why not.

    Args:
      pattern: any.
      q, k, v: anything with the shape and dtype of arrays that fit `sparse_attention`.
    """
    for head in range(min(q.shape[2], pattern.head_period)):
        if why := supports_parts(pattern.parts(head), q, k, v):
            return why
    return None


def supports_parts(some_parts: Sequence[Part], q: Any, k: Any, v: Any) -> str | None:
    """Do as `supports`, for parts."""
    del k
    if why := jax_refusal("cudnn", OLDEST_JAX, TOO_NEW_JAX):
        return why
    if why := refusal("cudnn", q, v):
        return why
    for part in some_parts:
        if isinstance(part, parts.Summaries) and part.width == 1:
            return "cudnn takes summaries of 2 tokens or more, not 1; try 2"
        if why := _too_many(part, *q.shape[:3]):
            return why
    return None


def _too_many(part: Part, B: int, T: int, H: int) -> str | None:
    if isinstance(part, parts.Columns):
        H *= min(part.stride, T)
    elif isinstance(part, parts.OwnBlock | parts.Summaries):
        B *= -(-T // part.size)
    if max(B, H) <= MOST_BLOCKS:  # assumed to be axes of cuDNN's grid
        return None
    return (
        f"cudnn gets {B} sequences of {H} heads to see as {part}, and takes up to "
        f"{MOST_BLOCKS} of either; try fewer sequences or heads at a time"
    )


# ---- Pieces ------------------------------------------------------------------------


class Piece(NamedTuple):
    """A re-layout around one call. Queries that `fold_q` leaves out see nothing."""

    fold_q: Fold
    fold_kv: Fold
    causal: bool = True
    window: int | None = None


def _pieces(some_parts: Sequence[Part], T: int) -> Iterator[Piece]:
    """Split disjoint parts into disjoint pieces."""
    for part in some_parts:
        if isinstance(part, parts.Summaries):
            blocks = -(-T // part.size)
            for level in range((blocks - 1).bit_length()):
                yield _level(part, 1 << level, blocks)
        elif isinstance(part, parts.Columns) and part.strict:
            if T > part.stride:
                yield _shift(part)
        elif isinstance(part, parts.Band | parts.Self):
            window = 1 if isinstance(part, parts.Self) else part.width
            yield Piece(part.fold_q, part.fold_kv, window=window)
        elif isinstance(part, parts.Everything):
            yield Piece(part.fold_q, part.fold_kv, causal=False)
        elif isinstance(part, parts.All | parts.Columns | parts.OwnBlock):
            yield Piece(part.fold_q, part.fold_kv)
        else:
            raise NotImplementedError(f"cudnn does not know {part}")


def _shift(part: parts.Columns) -> Piece:
    """Strictly causal: each row of queries against the rows of keys before its own.

    cuDNN's causal mask holds the diagonal, which the band holds too. To take it out of
    the result again would cost bits where a query looks mostly at itself; without it
    from the start the sum is as exact as a single call. The slices are copies.
    """
    return Piece(lambda x: part.fold_q(x)[:, 1:], lambda x: part.fold_kv(x)[:, :-1])


def _level(part: parts.Summaries, half: int, blocks: int) -> Piece:
    """Of every 2 * half blocks, the later half's queries and the earlier half's keys.

    Block i sees block j < i at the level of the highest bit in which i and j differ,
    and at no other, so levels 1, 2, 4, ... need no mask and compute no pair twice.
    """
    groups = up(blocks - half, 2 * half) // (2 * half)  # those with a later half
    # Where one group is left, padding its later half could double the work.
    last = min(blocks, 2 * half) if groups == 1 else 2 * half

    def split(x, size, first, last):
        x = fit(x[:, : groups * 2 * half * size], groups * 2 * half * size, 1)
        x = x.reshape(-1, 2 * half * size, *x.shape[2:])
        return x[:, first * size : last * size]

    return Piece(
        lambda x: split(x, part.size, half, last),
        lambda x: split(part.fold_kv(x), part.width, 0, half),
        causal=False,
    )


# ---- Their union -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Union:
    """What is attended to, and what computes it."""

    parts: tuple[Part, ...]
    scale: float
    core: Core

    def calls(self, q) -> Iterator[tuple[Piece, Core, tuple]]:
        """Each piece with its core and the core's last arguments."""
        for piece in _pieces(self.parts, q.shape[1]):
            rows = jax.eval_shape(piece.fold_q, q).shape[1]
            keys = min(rows, piece.window or rows)
            core = SELF if piece.causal and keys == 1 else self.core
            window = keys if keys < rows else None
            yield piece, core, (self.scale, piece.causal, window)


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
    core: Core = CUDNN,
) -> jax.Array:
    """Return out_BTHV in v's dtype; another `core` runs it on a CPU, for tests."""

    def run(q, k, v, head):
        what = Union(pattern.parts(head), scale, core)
        args = _of_one_width(q, k, v)
        out = attend_by(pieces.forward, pieces.backward, what, *args)
        return out[..., : v.shape[3]]

    return heads.by_period(run, q_BTHK, k_BTHK, v_BTHV, pattern.head_period)


def attend_parts(q_BTHK, k_BTHK, v_BTHV, some_parts, scale, core: Core = CUDNN):
    """Return (out_BTHV, lse_BTH) over the union of disjoint parts."""
    args = _of_one_width(q_BTHK, k_BTHK, v_BTHV)
    out, lse = pieces.forward(Union(tuple(some_parts), scale, core), *args)
    return out[..., : v_BTHV.shape[3]], lse


def parts_gradients(
    q_BTHK, k_BTHK, v_BTHV, out, lse_BTH, d_out, some_parts, scale, core: Core = CUDNN
):
    """Return (dq, dk, dv); out and lse_BTH may be of a union with other parts."""
    q, k, v = _of_one_width(q_BTHK, k_BTHK, v_BTHV)
    out, d_out = (fit(x, q.shape[3], 3) for x in (out, d_out))
    what = Union(tuple(some_parts), scale, core)
    gradients = pieces.backward(what, q, k, v, out, lse_BTH, d_out)
    widths = (x.shape[3] for x in (q_BTHK, k_BTHK, v_BTHV))
    return tuple(x[..., :n] for x, n in zip(gradients, widths, strict=True))


def _of_one_width(q, k, v) -> list[jax.Array]:
    """Widen heads to what cuDNN takes: one width, as Ampere wants it.

    Zeros behind the last column change no product.
    """
    width = up(max(q.shape[3], v.shape[3]), 8)
    return [fit(x, width, 3) for x in (q, k, v)]
