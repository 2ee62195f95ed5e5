"""What the kernels share: 64-row tiles, matrix products, masks, and the launch.

A kernel's block is one to four warpgroups. Operands come by TMA copies into swizzled
shared memory, and products are `wgmma`s over tiles of 64 rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.layouts import MOST_BLOCKS, up
from sparse_flax.attention.patterns import Pattern

LOG2E = math.log2(math.e)
M = 64  # rows of one wgmma, and the least contraction under a 128-byte swizzle
NARROW = 32  # the least width of a head: the contraction under a 64-byte swizzle
SHARED_MEMORY = 227 * 1024  # bytes that one block may have on Hopper

LAYOUT = plgpu.Layout.WGMMA


def width_of(width: int) -> int:
    """The width of heads that the kernels take for `width`: 32, or a multiple of 64."""
    return NARROW if width <= NARROW else up(width, M)


def too_many(pattern: Pattern, q: Any, most: int = 0) -> str | None:
    """Return None, or why CUDA could not launch the kernels of a pattern.

    Batch and tiles of rows are axes of their grids, and what has `most` blocks may be.
    """
    B, T, H = q.shape[:3]
    if max(most, B, -(-T // M)) <= MOST_BLOCKS:
        return None
    return (
        f"hopper cannot launch {pattern} over {B} sequences of {T} tokens and {H} "
        "heads; try fewer at a time"
    )


def swizzled(shape: tuple[int, ...], dtype, beside: int = 0):
    """Shared memory as wgmma and TMA want it; the last dimension 32, or in 64s.

    Both operands of a product must be swizzled alike: `beside` is the width of the
    other if that may be 32.
    """
    n = NARROW if NARROW in (shape[-1], beside) else M
    transforms = (
        plgpu.TilingTransform((8, n)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(2 * n),  # type: ignore[abstract]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(rows: int, columns: int) -> jax.Array:
    """A float32 accumulator in registers."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), LAYOUT)


def per_row(x: jax.Array, tile: jax.Array) -> jax.Array:
    """Repeat a value a row over the columns of a tile."""
    return lax.broadcast_in_dim(x, tile.shape, [0])


def per_column(x: jax.Array, tile: jax.Array) -> jax.Array:
    """Repeat a value a column over the rows of a tile."""
    return lax.broadcast_in_dim(x, tile.shape, [1])


def positions(tile: jax.Array, dimension: int) -> jax.Array:
    """The row (0) or column (1) number of every entry."""
    return plgpu.broadcasted_iota(jnp.int32, tile.shape, dimension, layout=LAYOUT)


def multiply(*pairs) -> list[jax.Array]:
    """Return a @ b for each pair of shared-memory operands, issued together.

    A pair may be a list of pairs, whose products are summed.
    """
    sums = [pair if isinstance(pair, list) else [pair] for pair in pairs]

    def body(refs):
        for ref, products in zip(refs, sums, strict=True):
            for a, b in products:
                plgpu.wgmma(ref, a, b)
        return [ref[...] for ref in refs]

    shapes = [(M, products[0][1].shape[1]) for products in sums]
    return pl.run_scoped(body, [plgpu.ACC(shape, jnp.float32) for shape in shapes])


def accumulate(
    sums: Sequence[jax.Array],
    products: Sequence[tuple[int, jax.Array, Callable]],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Return the sums, a @ b() added to the i-th for each (i, a, b) of `products`.

    a is in registers, b() in shared memory: a function, since a reference that is
    indexed outside of the state it is used in does not lower.
    """
    if interpret:  # the interpreter knows no wgmma with a in registers
        sums = list(sums)
        for i, a, b in products:
            b = b()[...].astype(jnp.float32)
            sums[i] = sums[i] + jnp.dot(a.astype(jnp.float32), b)
        return tuple(sums)

    def body(refs):
        for i, a, b in products:
            plgpu.wgmma(refs[i], a, b())

    return pl.run_state(body)(tuple(plgpu.ACC.init(x) for x in sums))


def load_rows(ref) -> jax.Array:
    """Load a value a row of a tile from device memory."""
    return plgpu.load(ref, layout=LAYOUT.reduce(1), optimized=False)


def _start(refs, pairs) -> None:
    """Start a @ b.T for each pair of shared-memory operands."""
    for ref, (a, b) in zip(refs, pairs, strict=True):
        plgpu.wgmma(ref, a, b.transpose((1, 0)))


def weigh(pairs, weights: Callable, interpret: bool) -> list[jax.Array]:
    """Return [weights(*first), *second]: the halves of the products a @ b.T of `pairs`.

    The second half is computed while `weights` works on the first.
    """
    n = len(pairs) // 2
    if interpret:
        products = multiply(*((a, b.transpose((1, 0))) for a, b in pairs))
        return [weights(*products[:n]), *products[n:]]

    def body(refs):
        _start(refs, pairs)
        first = [plgpu.wgmma_accumulator_load(ref, wait_n=n) for ref in refs[:n]]
        p = weights(*first)
        return [p, *(ref[...] for ref in refs[n:])]

    return pl.run_scoped(body, [plgpu.ACC((M, M), jnp.float32)] * (2 * n))


def add_key_gradients(
    sums: tuple[jax.Array, jax.Array],
    operands: Callable,
    weights: Callable,
    slopes: Callable,
    dtype,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Return (dv + p @ d_out, dk + ds @ q) of 64 keys by 64 queries.

    operands() is (k, v, q, d_out) in shared memory: a function, as in `accumulate`.
    p = weights(k @ q.T) is made while dp = v @ d_out.T is computed, and
    ds = slopes(p, dp) while dv is.
    """
    if interpret:
        k, v, q, d_out = operands()
        p, dp = weigh([(k, q), (v, d_out)], weights, interpret)
        products = [
            (0, p.astype(dtype), lambda: d_out),
            (1, slopes(p, dp).astype(dtype), lambda: q),
        ]
        return accumulate(sums, products, interpret)

    def body(totals):
        def inner(refs):
            k, v, q, d_out = operands()
            _start(refs, [(k, q), (v, d_out)])
            p = weights(plgpu.wgmma_accumulator_load(refs[0], wait_n=1))
            plgpu.wgmma(totals[0], p.astype(dtype), d_out)
            dp = plgpu.wgmma_accumulator_load(refs[1], wait_n=1)
            plgpu.wgmma(totals[1], slopes(p, dp).astype(dtype), q)

        pl.run_scoped(inner, [plgpu.ACC((M, M), jnp.float32)] * 2)

    return pl.run_state(body)(tuple(plgpu.ACC.init(x) for x in sums))


def add_query_gradients(
    total: jax.Array, turns: Sequence[tuple], dtype, interpret: bool
) -> jax.Array:
    """Return dq + ds @ k, for 64 queries and several tiles of keys.

    A turn is (operands, weights, slopes) as in add_key_gradients, but operands() is
    (q, d_out, k, v). The scores of the next turn are computed while this one ends.
    """
    if interpret:
        for operands, weights, slopes in turns:
            q, d_out, k, v = operands()
            p, dp = weigh([(q, k), (d_out, v)], weights, interpret)
            products = [(0, slopes(p, dp).astype(dtype), lambda k=k: k)]
            (total,) = accumulate((total,), products, interpret)
        return total

    def body(sums):
        def take(i, before):
            """Take turn i; `before` starts the last one's product, after the scores."""
            operands, weights, slopes = turns[i]

            def inner(refs):
                q, d_out, k, v = operands()
                _start(refs, [(q, k), (d_out, v)])
                if before:
                    before()
                under_way = int(before is not None)
                p = weights(plgpu.wgmma_accumulator_load(refs[0], wait_n=1 + under_way))
                dp = plgpu.wgmma_accumulator_load(refs[1], wait_n=under_way)
                ds = slopes(p, dp).astype(dtype)

                def add():
                    plgpu.wgmma(sums, ds, operands()[2])

                take(i + 1, add) if i + 1 < len(turns) else add()

            pl.run_scoped(inner, [plgpu.ACC((M, M), jnp.float32)] * 2)

        take(0, None)

    return pl.run_state(body)(plgpu.ACC.init(total))


def tiles_of(rows: int) -> list[tuple[int, int]]:
    """(first row, first row no tile before has) of the 64-row tiles that cover `rows`.

    Where rows is no multiple of 64, the last tile overlaps its neighbour: no padding,
    and no shared memory for it.
    """
    return [(min(row, rows - M), row) for row in range(0, rows, M)]


def launch(body, *, out, scratch, grid, threads, interpret, name):
    """A Mosaic GPU kernel over `grid`; its last axis runs fastest.

    Raises ValueError where CUDA would refuse it.
    """
    *slow, _ = grid.values()
    if slow and max(math.prod(slow[:-1]), slow[-1]) > MOST_BLOCKS:
        raise ValueError(
            f"the kernel {name} would run over {grid}, and CUDA takes up to "
            f"{MOST_BLOCKS} but for the last; take fewer sequences at a time, or "
            "implementation='gathered'"
        )
    kernel = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )
    return keeps_axes(kernel)


def keeps_axes(kernel: Callable) -> Callable:
    """Give a kernel's results back what it forgets: the axes of a shard_map that its
    first operand varies over.
    """

    def run(*operands):
        kind = jax.typeof(operands[0])
        # `vma` is its name in jax 0.11.0.
        varying = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
        return jax.lax.pcast(kernel(*operands), tuple(sorted(varying)), to="varying")

    return run
