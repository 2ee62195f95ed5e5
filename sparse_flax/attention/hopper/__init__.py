"""NVIDIA Hopper: Pallas Mosaic GPU kernels for the parts of a pattern.

Deterministic: no two blocks add to the same place. bfloat16 and float16, with softmax
and sums in float32. Needs jax 0.11 or newer; nothing of Pallas is imported before the
first call.

    strided.py           columns, the band, or both under one softmax
    columns.py           a whole column on chip, up to 256 rows
    columns_backward.py  its gradient, up to 128 rows
    long_columns.py      its gradient, up to 256 rows
    band.py              the last `window` keys, and the gradient up to 128
    band_walk.py         the gradient of windows from 66 to 129; after columns, only
                         of heads of 32
    band_ring.py         the gradient for wider windows
    span_forward.py      longer columns and wider windows: keys stream through a ring
    span_backward.py     their gradient
    spans.py             which keys they see, and the walk of a block over them
    fixed.py             own blocks, summaries of earlier ones, or both
    fixed_forward.py     their kernel
    fixed_backward.py    its gradient: of the summaries, then of the blocks
    fixed_walk.py        the walk over the summaries
    ring.py              the ring of buffers that those of fixed and spans go through
    softmax.py           what a tile of keys adds to 64 queries
    steps.py             what a tile adds to gradients on a walk
    tiles.py             what all kernels share
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from sparse_flax.attention import cudnn, heads, parts
from sparse_flax.attention.layouts import refusal
from sparse_flax.attention.parts import Part
from sparse_flax.attention.patterns import (
    Blocks,
    Columns,
    Fixed,
    Local,
    Pattern,
    PerHead,
    Summaries,
)

OLDEST_JAX = (0, 11)
# Device kinds of compute capability 9: 'NVIDIA H200', 'NVIDIA H100 80GB HBM3', ...
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


def runs_on(device_kind: str) -> str | None:
    """Return None on a Hopper GPU, else the sentence that says what this is."""
    if HOPPER.search(device_kind):
        return None
    return (
        "hopper needs an NVIDIA GPU of compute capability 9 (H100, H200), and this is "
        f"{device_kind}"
    )


def supports(pattern: Pattern, q: Any, k: Any, v: Any) -> str | None:
    """Return None, or the sentence that says why not.

    Args:
      pattern: any.
      q, k, v: anything with the shape and dtype of arrays that fit `sparse_attention`.
    """
    if jax.__version_info__ < OLDEST_JAX:
        return (
            f"hopper needs jax {'.'.join(map(str, OLDEST_JAX))} or newer, and this is "
            f"{jax.__version__}"
        )
    try:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError as problem:
        return f"hopper needs Pallas for Mosaic GPU, which does not load: {problem}"
    if why := refusal("hopper", q, v):
        return why
    if not isinstance(pattern, PerHead):
        return _kernels(pattern).supports(pattern, q, k, v)
    for head in range(min(q.shape[2], pattern.head_period)):
        if why := supports(_of_head(pattern, head), q, k, v):
            return why
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

    if not isinstance(pattern, PerHead):
        return _kernels(pattern).attend(
            q_BTHK, k_BTHK, v_BTHV, pattern, scale, interpret
        )

    def run(q, k, v, head):
        return attend(q, k, v, _of_head(pattern, head), scale, interpret)

    return heads.by_period(run, q_BTHK, k_BTHK, v_BTHV, pattern.head_period)


def supports_parts(some_parts: Sequence[Part], q: Any, k: Any, v: Any) -> str | None:
    """Do as `supports`, for parts; cuDNN computes what has no kernels here."""
    whole = _pattern_of(some_parts)
    if whole is None:
        return cudnn.supports_parts(some_parts, q, k, v)
    return supports(whole, q, k, v)


def attend_parts(q_BTHK, k_BTHK, v_BTHV, some_parts, scale, **interpret):
    """Return (out_BTHV, lse_BTH) over the union of disjoint parts."""
    from sparse_flax.attention.hopper import fixed, strided

    args = q_BTHK, k_BTHK, v_BTHV
    whole = _pattern_of(some_parts)
    if whole is None:
        return cudnn.attend_parts(*args, some_parts, scale)
    if _kernels(whole) is fixed:
        return fixed.attend_pattern(*args, whole, scale, **interpret)
    return strided.attend_parts(*args, some_parts, scale, **interpret)


def parts_gradients(
    q_BTHK, k_BTHK, v_BTHV, out, lse_BTH, d_out, some_parts, scale, **interpret
):
    """Return (dq, dk, dv); out and lse_BTH may be of a union with other parts."""
    from sparse_flax.attention.hopper import fixed, strided

    args = q_BTHK, k_BTHK, v_BTHV, out, lse_BTH, d_out
    whole = _pattern_of(some_parts)
    if whole is None:
        return cudnn.parts_gradients(*args, some_parts, scale)
    if _kernels(whole) is fixed:
        return fixed.pattern_gradients(*args, whole, scale, **interpret)
    return strided.parts_gradients(*args, some_parts, scale, **interpret)


def _pattern_of(some_parts: Sequence[Part]) -> Pattern | None:
    """The pattern that has kernels for these parts; None if there is none."""
    match tuple(some_parts):
        case (parts.Band(width),):
            return Local(width)
        case (parts.Columns(stride),):
            return Columns(stride)
        case (parts.OwnBlock(size),):
            return Blocks(size)
        case (parts.OwnBlock(size), parts.Summaries(size_too, width, offset)):
            return Fixed(size, width, offset) if size == size_too else None
        case (parts.Summaries(size, width, offset), parts.Self()):
            return Summaries(size, width, offset)
    return None


def _kernels(pattern: Pattern):
    """The module with the kernels of a pattern; each has `supports` and `attend`."""
    from sparse_flax.attention.hopper import fixed, strided

    return fixed if isinstance(pattern, Fixed | Blocks | Summaries) else strided


def _of_head(pattern: PerHead, head: int) -> Pattern:
    """The pattern of one head, so that all heads of a call see the same."""
    one = pattern.of_head(head)
    if isinstance(one, PerHead):
        return _of_head(one, head)
    if isinstance(one, Fixed) and one.rotate:
        return dataclasses.replace(one, offset=head % one.head_period, rotate=False)
    return one
