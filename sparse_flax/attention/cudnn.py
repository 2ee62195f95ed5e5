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

Backward, every piece gets the merged (out, log-sum-exp) and the gradients add up:
exact, since a probability of the union is exp(logit - lse of the union) in each.
Reverse mode only. cuDNN adds up dq in no fixed order, so gradients may differ in the
last bits from run to run. bfloat16 and float16, with softmax and sums in float32.

Compiled, never run on: Ampere, Ada and Blackwell.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_flax.attention import gathered, heads, parts, union
from sparse_flax.attention.hopper.layouts import fit, kept, over_batch, sum_groups, up
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import Pattern

# What is called is private to jax, so only the versions it was tried with.
OLDEST_JAX, TOO_NEW_JAX = (0, 10, 2), (0, 13)
DTYPES = ("bfloat16", "float16")
WIDEST_HEAD = 128  # on Ampere; `supports` does not know the device
MOST_BLOCKS = 65535  # of a CUDA grid along the axes that batch and heads lie on
# Every NVIDIA GPU is from Ampere on, but for these. The old names are a closed list;
# that of the new ones grows, so a name nobody has heard of is taken for a new one.
NVIDIA = re.compile(r"\b(NVIDIA|Tesla|Quadro|GeForce)\b")
BEFORE_AMPERE = re.compile(
    r"Tesla|Quadro|TITAN|\bGTX|\bRTX 20\d\d|\bMX\d|\bGT \d"
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
    if not OLDEST_JAX <= jax.__version_info__ < TOO_NEW_JAX:
        oldest, too_new = (".".join(map(str, x)) for x in (OLDEST_JAX, TOO_NEW_JAX))
        return (
            f"cudnn needs a jax from {oldest} to before {too_new}, whose private calls "
            f"it knows, and this is {jax.__version__}"
        )
    if np.dtype(q.dtype).name not in DTYPES:
        return (
            f"cudnn computes {' and '.join(DTYPES)}, not {q.dtype}; try q, k and v in "
            "bfloat16"
        )
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST_HEAD:
        return f"cudnn takes heads up to {WIDEST_HEAD} wide, not {widest}"
    for head in range(min(q.shape[2], pattern.head_period)):
        for part in pattern.parts(head):
            if isinstance(part, parts.Summaries) and part.width == 1:
                return "cudnn takes summaries of 2 tokens or more, not 1; try 2"
            if why := _too_many(part, *q.shape[:3]):
                return why
    return None


def _too_many(part: Part, B: int, T: int, H: int) -> str | None:
    if isinstance(part, parts.Columns):
        H *= part.stride
    elif isinstance(part, parts.OwnBlock | parts.Summaries):
        B *= -(-T // part.size)
    if max(B, H) <= MOST_BLOCKS:
        return None
    return (
        f"cudnn gets {B} sequences of {H} heads to see as {part}, and takes up to "
        f"{MOST_BLOCKS} of either; try fewer sequences or heads at a time"
    )


# ---- What cuDNN computes -----------------------------------------------------------


class Core(NamedTuple):
    """Attention of q [B, Q, H, W] over k and v [B, S, H_kv, W].

    forward(q, k, v, scale, causal, window) -> (out [B, Q, H, W], lse [B, Q, H])
    backward(q, k, v, out, lse, d_out, scale, causal, window) -> (dq, dk, dv)
    causal: query i sees keys j <= i; of these with a window the last `window`.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def _bind(which: str, args, scale, causal, window, **more):
    """Call the primitives themselves: what is public rounds lse to q's dtype."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    if jax.__version_info__ >= (0, 12):
        more["score_mod"] = None
    q, k, v, *rest = args
    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    # Bias, lengths, offsets and page tables: an empty array means none.
    return getattr(fused, f"_dot_product_attention_{which}_p_wrapper").bind(
        *(q, k, v, *[jnp.zeros(0, q.dtype)] * 7, *rest),
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=window,
        **more,
    )


def _cudnn_forward(q, k, v, scale, causal, window):
    args = scale, causal, window
    out, lse_BHQ = _bind("fwd", (q, k, v), *args, is_training=True)
    return out, lse_BHQ.swapaxes(1, 2)


def _cudnn_backward(q, k, v, out, lse, d_out, *args):
    return _bind("bwd", (q, k, v, lse.swapaxes(1, 2), out, d_out), *args)


CUDNN = Core(_cudnn_forward, _cudnn_backward)


def _self_forward(q, k, v, scale, causal, window):
    """Query i sees key i alone."""
    del causal, window
    out, lse = gathered.CORES[parts.Diagonal](parts.Diagonal(), q, k, v, scale)
    return out.astype(v.dtype), lse


def _self_backward(q, k, v, out, lse, d_out, scale, causal, window):
    del causal, window
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    q, k, v, out, d_out = (x.astype(jnp.float32) for x in (q, k, v, out, d_out))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    p = jnp.exp(scale * jnp.sum(q * k, -1) - lse)[..., None]
    d_logit = p * jnp.sum(d_out * (v - out), -1, keepdims=True) * scale
    dk, dv = (sum_groups(x, heads) for x in (d_logit * q, p * d_out))
    return d_logit * k, dk, dv


SELF = Core(_self_forward, _self_backward)


# ---- Pieces ------------------------------------------------------------------------

Fold = Callable[[jax.Array], jax.Array]


class Piece(NamedTuple):
    """A re-layout around one call. Queries that `fold_q` leaves out see nothing."""

    fold_q: Fold
    fold_kv: Fold
    causal: bool = True
    window: int | None = None
    alone: bool = False  # each query sees one key, its own: cuDNN wants two


def _pieces(some_parts: Sequence[Part], T: int) -> Iterator[Piece]:
    """Split disjoint parts into disjoint pieces."""
    for part in some_parts:
        fold_q, fold_kv = part.fold_q, part.fold_kv
        if isinstance(part, parts.Summaries):
            blocks = -(-T // part.size)
            for level in range((blocks - 1).bit_length()):
                yield _level(part, 1 << level, blocks)
        elif isinstance(part, parts.Columns) and part.strict:
            rows = -(-T // part.stride) - 1
            if rows:
                yield _shift(part)._replace(alone=rows == 1)
        elif isinstance(part, parts.Band):
            window = part.width if part.width < T else None
            yield Piece(fold_q, fold_kv, window=window, alone=min(part.width, T) == 1)
        else:
            rows = {parts.Self: 1, parts.All: T}.get(type(part))
            if isinstance(part, parts.OwnBlock):
                rows = min(part.size, T)
            elif isinstance(part, parts.Columns):
                rows = -(-T // part.stride)
            yield Piece(fold_q, fold_kv, alone=rows == 1)


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
    # The only group ends where the queries do: its padding could be half of all.
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

    def pieces(self, T: int) -> Iterator[tuple[Piece, Core, tuple]]:
        """Each piece with its core and the core's last arguments."""
        for piece in _pieces(self.parts, T):
            core = SELF if piece.alone else self.core
            yield piece, core, (self.scale, piece.causal, piece.window)


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    pattern: Pattern,
    scale: float,
    core: Core = CUDNN,
) -> jax.Array:
    """Return out_BTHV in v's dtype; another `core` runs it on a CPU, for tests."""
    V = v_BTHV.shape[3]
    # Zeros behind the last column change no product. Ampere wants one width.
    width = up(max(q_BTHK.shape[3], V), 8)

    def run(q, k, v, head):
        args = (fit(x, width, 3) for x in (q, k, v))
        return _attend(Union(pattern.parts(head), scale, core), *args)[..., :V]

    return heads.by_period(run, q_BTHK, k_BTHK, v_BTHV, pattern.head_period)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(what: Union, q, k, v):
    return over_batch(functools.partial(_forward, what), q, k, v)[0]


def _attend_forward(what, q, k, v):
    out, lse = kept(*over_batch(functools.partial(_forward, what), q, k, v))
    return out, (q, k, v, out, lse)


def _attend_backward(what, residuals, d_out):
    return over_batch(functools.partial(_backward, what), *residuals, d_out)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(what: Union, q, k, v):
    """Return (out_BTHW, lse_BTH) of the union."""
    done = []
    for piece, core, args in what.pieces(q.shape[1]):
        # Folds are linear and only move numbers, so their transpose unfolds.
        folded, unfold = jax.vjp(piece.fold_q, q)
        out, lse = core.forward(folded, piece.fold_kv(k), piece.fold_kv(v), *args)
        done.append((unfold(out)[0].astype(jnp.float32), _unfold_lse(piece, q, lse)))
    out, lse = union.merge_all(done)
    return out.astype(v.dtype), lse


def _unfold_lse(piece: Piece, q, lse):
    """Put lse at its queries and -inf at those that the piece leaves out."""
    _, unfold = jax.vjp(piece.fold_q, q[..., :1].astype(jnp.float32))
    lse, seen = (unfold(x[..., None])[0][..., 0] for x in (lse, jnp.ones_like(lse)))
    return jnp.where(seen > 0, lse, -jnp.inf)


def _backward(what: Union, q, k, v, out, lse, d_out):
    """Return (dq, dk, dv), given what `_forward` returned."""
    total = [0.0, 0.0, 0.0]
    for piece, core, args in what.pieces(q.shape[1]):
        folds = piece.fold_q, piece.fold_kv, piece.fold_kv
        folded = [jax.vjp(f, x) for f, x in zip(folds, (q, k, v), strict=True)]
        lse_piece = piece.fold_q(lse[..., None])[..., 0]
        rest = piece.fold_q(out), lse_piece, piece.fold_q(d_out)
        grads = core.backward(*(x for x, _ in folded), *rest, *args)
        for i, ((x, unfold), grad) in enumerate(zip(folded, grads, strict=True)):
            total[i] += unfold(grad.astype(x.dtype))[0].astype(jnp.float32)
    return tuple(x.astype(q.dtype) for x in total)
