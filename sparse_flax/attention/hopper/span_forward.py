"""Attention to a stretch of keys of any length: they stream through a ring.

For what does not fit a block's memory: long columns, wide windows. Four warpgroups
share every tile of keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.ring import Cut
from sparse_flax.attention.hopper.softmax import Softmax
from sparse_flax.attention.hopper.spans import Grid, Span, Walk
from sparse_flax.attention.hopper.tiles import LAYOUT, M


def cut_of(K: int, V: int) -> Cut:
    """The fastest for the like walk of fixed_forward.py; what fits at width 128."""
    return Cut(2, 64, 2, 1) if max(K, V) > M else Cut(4, 128, 3, 1)


def forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    scale: float,
    span: Span,
    *,
    init: tuple[jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return (out_BTHV, lse_BHT) over the span, and over `init` if that is given.

    T is a multiple of 64, and scale above 0. A column view (B, R, C, K) will do too.
    """
    (B, T, H, K), V, dtype = q_BTHK.shape, v_BTHV.shape[-1], q_BTHK.dtype
    group = H // k_BTHK.shape[2]
    cut = cut_of(K, V)
    W, N = cut.warpgroups, cut.columns
    grid = Grid(B, T, H, cut)
    piece = N if T % N == 0 else M
    softmax = Softmax(V, scale, dtype, interpret)

    def body(q, k, v, *refs):
        (out1, lse1), refs = (refs[:2], refs[2:]) if init else ((None, None), refs)
        out, lse, qs, ks, vs, q_bar, full, free, *os = refs
        b, h, w, t0 = grid.place(last_first=True)
        kv = lax.div(h, group)

        def issue(tile, buffer):
            for i in range(0, N, piece):
                # Keys behind the last one are read again from its tile, and hidden.
                rows = pl.ds(jnp.minimum(tile * N + i, T - piece), piece)
                for ref, to in ((k, ks), (v, vs)):
                    to = to.at[buffer, pl.ds(i, piece)]
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, kv], to, full.at[buffer])

        walk = Walk(grid, span, True, (t0, w), issue, (full, free))
        here = pl.ds(walk.row, M)
        queries = qs.at[w]
        plgpu.copy_gmem_to_smem(q.at[b, here, h], queries, q_bar.at[w])
        pl.when(w == 0)(walk.start)
        os = os[0].at[w] if os else queries
        if init:
            plgpu.copy_gmem_to_smem(out1.at[b, here, h], os, q_bar.at[w])
            l = tiles.load_rows(lse1.at[b, h, here])
        plgpu.barrier_wait(q_bar.at[w])
        carry = softmax.start()
        if init:
            x = plgpu.load(os, layout=LAYOUT).astype(jnp.float32)
            carry = softmax.after(x, l)

        def use(buffer, mask, carry):
            keys, values = ks.at[buffer], lambda: vs.at[buffer]
            return softmax.add_tile(carry, queries, keys, values, mask)

        x, y = softmax.finish(walk.over(use, carry))
        os[...] = x
        plgpu.commit_smem()

        @pl.when(walk.live)
        def _():
            lse[b, h, here] = y
            plgpu.copy_smem_to_gmem(os, out.at[b, here, h])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return tiles.launch(
        body,
        name="span_forward",
        out=(
            jax.ShapeDtypeStruct((B, T, H, V), dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        scratch=[
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            tiles.swizzled((cut.stages, N, V), dtype),
            plgpu.Barrier(num_arrivals=2 if init else 1, num_barriers=W),
            plgpu.Barrier(num_arrivals=2 * (N // piece), num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
            *((tiles.swizzled((W, M, V), dtype),) if init or K != V else ()),
        ],
        grid=grid.axes,
        threads=W,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHV, *(init or ()))
