"""The gradient of span_forward.py: dq from a walk over keys, dk and dv over queries.

Each row of a gradient has one writer: no atomics, and the same bits every time. lse and
delta = rowsum(out * d_out) are those of the union that the span is a part of.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import steps, tiles
from sparse_flax.attention.hopper.ring import Cut
from sparse_flax.attention.hopper.spans import Grid, Span, Walk
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M


def cuts_of(K: int, V: int) -> tuple[Cut, Cut]:
    """For dq, and for dk and dv: what is fastest for the like walks of `Fixed`."""
    if max(K, V) > M:
        return Cut(2, 64, 2, 1), Cut(2)
    return Cut(4, 64, 4, 2, True), Cut(3, 64, 3, 2, True)


def backward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    d_out_BTHV: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    scale: float,
    span: Span,
    *,
    into: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (dq, dk, dv), added to `into` if given; dk and dv one a query head.

    T is a multiple of 64, and scale above 0. A column view (B, R, C, K) will do too.
    """
    cuts = cuts_of(q_BTHK.shape[-1], v_BTHV.shape[-1])
    args = (q_BTHK, k_BTHK, v_BTHV, d_out_BTHV, lse_BHT, delta_BHT)
    dq_into, *dkv_into = into or (None,)
    common = {"scale": scale, "span": span, "interpret": interpret}
    dq = _query_gradients(*args, into=dq_into, cut=cuts[0], **common)
    dk, dv = _key_gradients(*args, into=dkv_into, cut=cuts[1], **common)
    return dq, dk, dv


def _query_gradients(q, k, v, d_out, lse, delta, *, scale, span, into, cut, interpret):
    (B, T, H, K), V, dtype = q.shape, v.shape[-1], q.dtype
    group = H // k.shape[2]
    W, N = cut.warpgroups, cut.columns
    grid = Grid(B, T, H, cut)

    def body(q, k, v, d_out, lse, delta, *refs):
        dq1 = refs[0]  # if given
        dq, qs, d_outs, ks, vs, own, old, full, free = refs[-9:]
        b, h, w, t0 = grid.place(last_first=True)
        kv = lax.div(h, group)

        def issue(tile, buffer):
            at, bar = (b, pl.ds(tile * N, N), kv), full.at[buffer]
            plgpu.copy_gmem_to_smem(k.at[at], ks.at[buffer], bar)
            plgpu.copy_gmem_to_smem(v.at[at], vs.at[buffer], bar)

        walk = Walk(grid, span, True, (t0, w), issue, (full, free))
        here = pl.ds(walk.row, M)
        plgpu.copy_gmem_to_smem(q.at[b, here, h], qs.at[w], own.at[w])
        plgpu.copy_gmem_to_smem(d_out.at[b, here, h], d_outs.at[w], own.at[w])
        pl.when(w == 0)(walk.start)
        l, e = (tiles.load_rows(ref.at[b, h, here]) for ref in (lse, delta))
        mine = qs.at[w], d_outs.at[w], l * LOG2E, e
        plgpu.barrier_wait(own.at[w])

        def use(buffer, mask, acc):
            return steps.from_keys(
                acc,
                mine,
                (lambda: ks.at[buffer], lambda: vs.at[buffer]),
                mask,
                scale * LOG2E,
                dtype,
                interpret,
            )

        x = walk.over(use, tiles.zeros(M, K)) * scale
        if into is not None:
            plgpu.commit_smem()  # every warp has finished reading q
            plgpu.copy_gmem_to_smem(dq1.at[b, here, h], qs.at[w], old.at[w])
            plgpu.barrier_wait(old.at[w])
            x = x + plgpu.load(qs.at[w], layout=LAYOUT).astype(jnp.float32)
        qs[w] = x.astype(dtype)
        plgpu.commit_smem()

        @pl.when(walk.live)
        def _():
            plgpu.copy_smem_to_gmem(qs.at[w], dq.at[b, here, h])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    (dq,) = tiles.launch(
        body,
        name="span_query_gradients",
        out=(jax.ShapeDtypeStruct((B, T, H, K), dtype),),
        scratch=[
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((W, M, V), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            tiles.swizzled((cut.stages, N, V), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=W),
            plgpu.Barrier(num_barriers=W),
            plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
        ],
        grid=grid.axes,
        threads=W,
        interpret=interpret,
    )(q, k, v, d_out, lse, delta, *(() if into is None else (into,)))
    return dq


def _key_gradients(q, k, v, d_out, lse, delta, *, scale, span, into, cut, interpret):
    (B, T, H, K), V, dtype = q.shape, v.shape[-1], q.dtype
    group = H // k.shape[2]
    W, N = cut.warpgroups, cut.columns
    grid = Grid(B, T, H, cut)

    def body(q, k, v, d_out, lse, delta, *refs):
        (dk1, dv1), refs = (refs[:2], refs[2:]) if into else ((None, None), refs)
        dk, dv, ks, vs, qs, d_outs, lses, deltas, own, full, free = refs
        b, h, w, t0 = grid.place(last_first=False)
        kv = lax.div(h, group)

        def issue(tile, buffer):
            rows, bar = pl.ds(tile * N, N), full.at[buffer]
            plgpu.copy_gmem_to_smem(q.at[b, rows, h], qs.at[buffer], bar)
            plgpu.copy_gmem_to_smem(d_out.at[b, rows, h], d_outs.at[buffer], bar)
            plgpu.copy_gmem_to_smem(lse.at[b, h, rows], lses.at[buffer], bar)
            plgpu.copy_gmem_to_smem(delta.at[b, h, rows], deltas.at[buffer], bar)

        walk = Walk(grid, span, False, (t0, w), issue, (full, free))
        here = pl.ds(walk.row, M)
        plgpu.copy_gmem_to_smem(k.at[b, here, kv], ks.at[w], own.at[w])
        plgpu.copy_gmem_to_smem(v.at[b, here, kv], vs.at[w], own.at[w])
        pl.when(w == 0)(walk.start)
        plgpu.barrier_wait(own.at[w])

        def use(buffer, mask, sums):
            return steps.from_queries(
                sums,
                lambda: (ks.at[w], vs.at[w], qs.at[buffer], d_outs.at[buffer]),
                lambda: (lses.at[buffer], deltas.at[buffer]),
                mask,
                scale * LOG2E,
                dtype,
                interpret,
            )

        y, x = walk.over(use, (tiles.zeros(M, V), tiles.zeros(M, K)))
        x = x * scale
        if into:
            plgpu.commit_smem()  # every warp has finished reading k and v
            plgpu.copy_gmem_to_smem(dk1.at[b, here, h], ks.at[w], own.at[w])
            plgpu.copy_gmem_to_smem(dv1.at[b, here, h], vs.at[w], own.at[w])
            plgpu.barrier_wait(own.at[w])
            x = x + plgpu.load(ks.at[w], layout=LAYOUT).astype(jnp.float32)
            y = y + plgpu.load(vs.at[w], layout=LAYOUT).astype(jnp.float32)
        ks[w] = x.astype(dtype)
        vs[w] = y.astype(dtype)
        plgpu.commit_smem()

        @pl.when(walk.live)
        def _():
            plgpu.copy_smem_to_gmem(ks.at[w], dk.at[b, here, h])
            plgpu.copy_smem_to_gmem(vs.at[w], dv.at[b, here, h])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    row_values = plgpu.SMEM((cut.stages, N), jnp.float32)
    return tiles.launch(
        body,
        name="span_key_gradients",
        out=(
            jax.ShapeDtypeStruct((B, T, H, K), dtype),
            jax.ShapeDtypeStruct((B, T, H, V), dtype),
        ),
        scratch=[
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((W, M, V), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            tiles.swizzled((cut.stages, N, V), dtype),
            *(row_values, row_values),
            plgpu.Barrier(num_arrivals=2, num_barriers=W),
            plgpu.Barrier(num_arrivals=4, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
        ],
        grid=grid.axes,
        threads=W,
        interpret=interpret,
    )(q, k, v, d_out, lse, delta, *(into or ()))
