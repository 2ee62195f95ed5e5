"""The band's gradient by blocks that walk along the sequence: every tile comes once.

A warpgroup for every key chunk that a query tile reaches. Each takes every such chunk
in turn, with dk and dv in registers, and meets the query tiles one after the other;
dS goes through shared memory, from where one of them makes dq.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import band, steps, tiles
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M

# Query tiles in shared memory. Fewer than the warpgroups, and a block would wait for
# ever for its last queries: they are loaded by who begins a chunk that it lacks.
STAGES = 3
DELTAS = 4  # rows of delta: one more, as they are made before a step is over for all
# Blocks that run at a time, one a multiprocessor: H100 SXM and H200 have as many. On
# others (H100 PCIe: 114, H20: 78) the last wave is less full.
BLOCKS = 132


def supports(window: int, K: int, V: int, adds: bool = False) -> bool:
    """Whether the window is one for three warpgroups, and the memory enough.

    Two, for windows up to 65, have not been measured against `band.backward`. What
    `adds` to other gradients is worth it for heads of 32 alone: with 64, buffers for
    them leave spilled registers no cache.
    """
    widest = M // 2 if adds else M
    return M + 1 < window <= 2 * M + 1 and max(K, V) <= widest


def makes_delta(K: int, V: int) -> bool:
    """Whether delta is best made in the kernel: narrow heads leave it the time."""
    return max(K, V) <= M // 2


def tiles_of_block(heads: int, length: int, back: int) -> int:
    """Query tiles that a block walks over, so that all end at the same time.

    Args:
      heads: those of the whole batch.
      length: tiles of a sequence.
      back: tiles that a block walks over beside its own.
    """

    def steps_of(parts):
        waves = pl.cdiv(heads * parts, BLOCKS)
        return waves * (pl.cdiv(length, parts) + back + 1)

    most = min(length, max(1, 4 * BLOCKS // heads))
    return pl.cdiv(length, min(range(1, most + 1), key=steps_of))


def backward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    d_out_BTHV: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array | None,
    scale: float,
    window: int,
    *,
    out_BTHV: jax.Array | None = None,
    into: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    each: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Do what `band.backward` does, for windows up to 129 and heads up to 64 wide.

    scale is above 0. Without delta, it is made from `out_BTHV`. `each` is the number of
    query tiles that a block walks over.
    """
    (B, T, H, K), V, dtype = q_BTHK.shape, v_BTHV.shape[-1], q_BTHK.dtype
    group = H // k_BTHK.shape[2]
    back = band.chunks_before(window)
    W = back + 1
    room = 2 * W - 1  # key chunks in shared memory
    length = T // M
    each = each or tiles_of_block(B * H, length, back)
    fused = delta_BHT is None
    factor = scale * LOG2E

    # Tiles are counted from the block's first: step u is query tile u, and its keys are
    # chunks u - back to u. Those of n own tiles get dq, dk and dv; chunks before only
    # help dq, queries after only dk and dv.
    def body(q, k, v, d_out, lse, out_or_delta, *refs):
        old, refs = (refs[:3], refs[3:]) if into else ((), refs)
        dq, dk, dv, qs, dos, ks, vs, dss, ls, es, *refs = refs
        key_bar, step_bar, ready, slopes, used, *refs = refs
        outs, refs = (refs[0], refs[1:]) if fused else (None, refs)
        *olds, old_bar = refs if into else (None,)
        b, h, w = (lax.axis_index(axis) for axis in ("b", "h", "warpgroup"))
        kv = lax.div(h, group)
        first = lax.axis_index("segment") * each
        n = jnp.minimum(each, length - first)
        end = jnp.minimum(n + back, length - first)

        def rows(tile):  # those before the sequence are read from its start, and hidden
            return pl.ds(jnp.maximum(first + tile, 0) * M, M)

        def at(ref, tile, head=h):
            return ref.at[b, rows(tile), head]

        def chunk_buffer(i):
            return lax.rem(i + back, room)

        def chunk_barrier(i):
            return key_bar.at[lax.rem(i + back, 2 * W)]

        def issue_chunk(i):
            buffer, bar = chunk_buffer(i), chunk_barrier(i)
            plgpu.copy_gmem_to_smem(at(k, i, kv), ks.at[buffer], bar)
            plgpu.copy_gmem_to_smem(at(v, i, kv), vs.at[buffer], bar)

        def issue_step(u):
            stage = lax.rem(u, STAGES)
            bar = step_bar.at[lax.rem(u, 2 * W)] if fused else ready.at[stage]
            plgpu.copy_gmem_to_smem(at(q, u), qs.at[stage], bar)
            plgpu.copy_gmem_to_smem(at(d_out, u), dos.at[stage], bar)
            plgpu.copy_gmem_to_smem(lse.at[b, h, rows(u)], ls.at[stage], bar)
            if fused:
                plgpu.copy_gmem_to_smem(at(out_or_delta, u), outs.at[stage], bar)
            else:
                delta = out_or_delta.at[b, h, rows(u)]
                plgpu.copy_gmem_to_smem(delta, es.at[lax.rem(u, DELTAS)], bar)

        def issue_old(which, tile):
            """Load a tile of a gradient that is added to."""
            step = tile if which == 0 else tile + back
            bar = old_bar.at[which * W + lax.rem(step, W)]
            plgpu.copy_gmem_to_smem(at(old[which], tile), olds[which], bar)

        def make_delta(u):
            stage = lax.rem(u, STAGES)
            plgpu.barrier_wait(step_bar.at[lax.rem(u, 2 * W)])
            x, y = (
                plgpu.load(ref.at[stage], layout=LAYOUT).astype(jnp.float32)
                for ref in (outs, dos)
            )
            es[lax.rem(u, DELTAS)] = (x * y).sum(axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready.at[stage])

        @pl.when(w == 0)
        def _():
            for i in range(max(room, STAGES)):
                if i < STAGES:
                    pl.when(i < end)(functools.partial(issue_step, jnp.int32(i)))
                if i < room:
                    chunk = functools.partial(issue_chunk, jnp.int32(i - back))
                    pl.when(i - back < n)(chunk)
            if into:
                for which in range(3):
                    issue_old(which, jnp.int32(0))

        if fused:  # of later steps: by who has come to the end of its chunk
            pl.when(w == back)(lambda: make_delta(jnp.int32(0)))

        def refill(i):
            """Load what comes where chunk i and the last query tile it met were."""
            u = i + back
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when((u < n) & (u + STAGES < end))(lambda: issue_step(u + STAGES))
            pl.when(i + room < n)(lambda: issue_chunk(i + room))

        def pair(i, d, sums):
            """Take query tile i + d into dk and dv of chunk i."""
            u, buffer = i + d, chunk_buffer(i)
            stage, half = lax.rem(u, STAGES), lax.rem(u, 2)
            outside = jnp.where(first + i >= 0, 0.0, jnp.inf).astype(jnp.float32)
            plgpu.barrier_wait(ready.at[stage])
            # No weights while dp is computed (tiles.weigh): it was slower here.
            s, dp = tiles.multiply(
                (ks.at[buffer], qs.at[stage].transpose((1, 0))),
                (vs.at[buffer], dos.at[stage].transpose((1, 0))),
            )
            # Not sooner: the others wait for this warpgroup's first pair.
            pl.when((d == 0) & (i >= W - back))(lambda: refill(i - W))
            key, query = tiles.positions(s, 0) - d * M, tiles.positions(s, 1)
            s = jnp.where((query >= key) & (query < key + window), s, -jnp.inf)
            l = plgpu.load(ls.at[stage], layout=LAYOUT.reduce(0)) * LOG2E + outside
            p = jnp.exp2(s * factor - tiles.per_column(l, s))
            ds = steps.column_slopes(p, dp, es.at[lax.rem(u, DELTAS)]).astype(dtype)

            @pl.when((u >= 2) & (u < n))
            def _():
                plgpu.barrier_wait(used.at[half])

            @pl.when(u < n)
            def _():
                dss[half * W + d] = ds

            products = [
                (0, p.astype(dtype), lambda: dos.at[stage]),
                (1, ds, lambda: qs.at[stage]),
            ]
            sums = tiles.accumulate(sums, products, interpret)
            plgpu.commit_smem()

            @pl.when(u < n)
            def _():  # dS is there, and q and d_out are no longer needed
                plgpu.barrier_arrive(slopes.at[lax.rem(u, W)])

            return sums

        def leave(x, buffer, which, tile):
            """Write a tile of dq, dk or dv, by way of a buffer that nobody needs."""
            if into:
                plgpu.barrier_wait(old_bar.at[which * W + w])
                x = x + plgpu.load(olds[which], layout=LAYOUT).astype(jnp.float32)
            buffer[...] = x.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, at((dq, dk, dv)[which], tile))
            if into:
                pl.when(tile + 1 < n)(lambda: issue_old(which, tile + 1))

        def finish(i, d_value, d_key):
            """Write dk and dv of chunk i, and dq of the last query tile it met."""
            u, buffer = i + back, chunk_buffer(i)
            stage, half = lax.rem(u, STAGES), lax.rem(u, 2)
            own_key, own_query = i >= 0, u < n
            if fused:  # while others may still be at their last pair
                pl.when(u + 1 < end)(lambda: make_delta(u + 1))

            @pl.when(own_key)
            def _():  # v, then q and k carry results: nobody reads them any more
                leave(d_value, vs.at[buffer], 2, i)

            @pl.when(own_query)
            def _():
                plgpu.barrier_wait(slopes.at[lax.rem(u, W)])
                products = [
                    (
                        dss.at[half * W + d].transpose((1, 0)),
                        ks.at[chunk_buffer(u - d)],
                    )
                    for d in range(W)
                ]
                x = tiles.multiply(products)[0] * scale
                plgpu.barrier_arrive(used.at[half])
                leave(x, qs.at[stage], 0, u)

            @pl.when(u >= n - 1)
            def _():  # the last dq needs k
                for last in (2, 1):
                    half = used.at[lax.rem(jnp.maximum(n - last, 0), 2)]
                    pl.when(n >= last)(functools.partial(plgpu.barrier_wait, half))

            # dq of other warpgroups has read this chunk of keys: they arrived at
            # `slopes` after it, and all arrivals there have just been waited for;
            # behind the last query tile, those at `used`.
            @pl.when(own_key)
            def _():
                leave(d_key * scale, ks.at[buffer], 1, i)

        turns = pl.cdiv(n + back - w, W)

        @pl.loop(0, turns)
        def _(turn):
            i = w - back + turn * W
            plgpu.barrier_wait(chunk_barrier(i))
            since, until = jnp.maximum(-i, 0), jnp.minimum(W, end - i)
            sums = tiles.zeros(M, V), tiles.zeros(M, K)
            finish(i, *lax.fori_loop(since, until, functools.partial(pair, i), sums))

        @pl.loop(w - back + turns * W, end)
        def _(u):  # steps of others: a barrier is left when all have seen it
            plgpu.barrier_wait(ready.at[lax.rem(u, STAGES)])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    like_q = jax.ShapeDtypeStruct((B, T, H, K), dtype)
    wide, value = (tiles.swizzled((STAGES, M, width), dtype) for width in (K, V))
    scratch = [
        *(wide, value),
        tiles.swizzled((room, M, K), dtype),
        tiles.swizzled((room, M, V), dtype),
        tiles.swizzled((2 * W, M, M), dtype, beside=K),
        *(plgpu.SMEM((n, M), jnp.float32) for n in (STAGES, DELTAS)),
        # Of chunks, `room` of them under way at once: no barrier may complete twice
        # unseen. A multiple of W, so that a warpgroup comes back to its own.
        plgpu.Barrier(num_arrivals=2, num_barriers=2 * W),
        plgpu.Barrier(num_arrivals=4, num_barriers=2 * W),
        plgpu.Barrier(num_arrivals=1 if fused else 4, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=W, num_barriers=W),
        plgpu.Barrier(num_barriers=2),
    ]
    if fused:
        scratch += [value]
    if into:
        scratch += [tiles.swizzled((M, width), dtype) for width in (K, K, V)]
        scratch += [plgpu.Barrier(num_barriers=3 * W)]
    return tiles.launch(
        body,
        name="band_walk_backward",
        out=(like_q, like_q, jax.ShapeDtypeStruct((B, T, H, V), dtype)),
        scratch=scratch,
        grid={"b": B, "segment": pl.cdiv(length, each), "h": H},
        threads=W,
        interpret=interpret,
    )(
        *(q_BTHK, k_BTHK, v_BTHV, d_out_BTHV, lse_BHT),
        out_BTHV if fused else delta_BHT,
        *(into or ()),
    )
