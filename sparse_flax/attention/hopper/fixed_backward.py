"""The gradient of fixed_forward.py.

`summary_gradients` walks the later queries of a tile of summary keys; `block_gradients`
walks as the forward does for dq, and makes dk and dv of the own block, which no other
block of threads touches, adding those of its summary rows. So each gradient has one
writer: no atomics, and the same bits every time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import steps, tiles
from sparse_flax.attention.hopper.fixed_walk import Walk, copy_summaries
from sparse_flax.attention.hopper.ring import Cut, ring
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M


def slots(T: int, walk: Walk, cut: Cut) -> int:
    """Rows of the arrays that hold gradients of summary keys.

    One tile in front and one behind let any 64 rows around a slice be read at once.
    """
    step = cut.warpgroups * M
    return pl.cdiv(pl.cdiv(T, walk.block) * walk.summary, step) * step + 2 * M


def summary_gradients(
    q_BTHK,
    k_BTHK,
    v_BTHK,
    d_out_BTHK,
    lse_BHT,
    delta_BHT,
    walk,
    scale,
    cut,
    interpret=False,
):
    """Return dk and dv of the summary keys, [B, slots, H, width], slot 0 in row 64.

    Every query head has its own; they are not summed over groups.
    """
    B, T, H, K = q_BTHK.shape
    dtype, group = q_BTHK.dtype, H // k_BTHK.shape[2]
    W, N, S, C = cut.warpgroups, cut.columns, walk.block, walk.summary
    per_block, end = S // N, T // N
    rows = slots(T, walk, cut)
    factor = scale * LOG2E

    def body(q, k, v, d_out, lse, delta, dk, dv, *scratch):
        ks, vs, qs, d_outs, lses, deltas, kv_bar, full, free = scratch
        b, h, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        kv = lax.div(h, group)
        slot0 = lax.axis_index("tile") * (W * M)  # the longest walks go first
        mine = slot0 + w * M

        def later(blocks):  # the first query tile behind so many blocks
            return jnp.minimum(blocks * per_block, end)

        begin = later(lax.div(slot0, C) + 1)
        since, whole = later(lax.div(mine, C) + 1), later(pl.cdiv(mine + M, C))

        def issue(j, buffer):
            t = pl.ds((begin + j) * N, N)
            bar = full.at[buffer]
            plgpu.copy_gmem_to_smem(q.at[b, t, h], qs.at[buffer], bar)
            plgpu.copy_gmem_to_smem(d_out.at[b, t, h], d_outs.at[buffer], bar)
            plgpu.copy_gmem_to_smem(lse.at[b, h, t], lses.at[buffer], bar)
            plgpu.copy_gmem_to_smem(delta.at[b, h, t], deltas.at[buffer], bar)

        start, over_queries = ring(issue, full, free, end - begin, cut, w)
        copy_summaries(walk, (k, v), (ks, vs), kv_bar, w, mine, (b, h, kv))
        pl.when(w == 0)(start)
        plgpu.barrier_wait(kv_bar.at[w])

        def take(masked):
            def use(j, buffer, sums):
                def mask(s):
                    if not masked:
                        return s
                    seen = lax.div(begin + j, per_block) * C - mine
                    return jnp.where(tiles.positions(s, 0) < seen, s, -jnp.inf)

                return steps.from_queries(
                    sums,
                    lambda: (ks.at[w], vs.at[w], qs.at[buffer], d_outs.at[buffer]),
                    lambda: (lses.at[buffer], deltas.at[buffer]),
                    mask,
                    factor,
                    dtype,
                    interpret,
                )

            return use

        def skip(j, buffer, sums):
            return sums

        sums = (tiles.zeros(M, K), tiles.zeros(M, K))
        over_queries(0, since - begin, skip, 0)
        sums = over_queries(since - begin, whole - begin, take(masked=True), sums)
        sums = over_queries(whole - begin, end - begin, take(masked=False), sums)
        vs[w] = sums[0].astype(dtype)
        ks[w] = (sums[1] * scale).astype(dtype)
        plgpu.commit_smem()
        at = (b, pl.ds(M + mine, M), h)
        plgpu.copy_smem_to_gmem(ks.at[w], dk.at[at])
        plgpu.copy_smem_to_gmem(vs.at[w], dv.at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    vector = plgpu.SMEM((cut.stages, N), jnp.float32)
    return tiles.launch(
        body,
        name="fixed_summary_gradients",
        out=(jax.ShapeDtypeStruct((B, rows, H, K), dtype),) * 2,
        scratch=[
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            vector,
            vector,
            plgpu.Barrier(num_arrivals=2 * (M // walk.piece(M)), num_barriers=W),
            plgpu.Barrier(num_arrivals=4, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
        ],
        grid={"batch": B, "tile": (rows - 2 * M) // (W * M), "head": H},
        threads=W,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, lse_BHT, delta_BHT)


def block_gradients(
    q_BTHK,
    k_BTHK,
    v_BTHK,
    d_out_BTHK,
    lse_BHT,
    delta_BHT,
    summed,
    walk,
    scale,
    cut,
    interpret=False,
):
    """Return dq, dk and dv; `summed` is what summary_gradients returned, or None.

    A block of threads holds whole blocks of the pattern. dk and dv have a head for
    every query head.
    """
    B, T, H, K = q_BTHK.shape
    dtype, group = q_BTHK.dtype, H // k_BTHK.shape[2]
    W, N, S, C = cut.warpgroups, cut.columns, walk.block, walk.summary
    Q = W * M
    pieces = N // walk.piece(N)
    factor = scale * LOG2E

    def body(q, k, v, d_out, lse, delta, *refs):
        (sum_k, sum_v), refs = (refs[:2], refs[2:]) if C else ((None, None), refs)
        dq, dk, dv, qs, d_outs, own_k, own_v, lses, deltas, ks, vs, *refs = refs
        query_bar, own_bar, sum_bar, full, free, done = refs
        b, h, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        kv = lax.div(h, group)
        t0 = (T // Q - 1 - lax.axis_index("tile")) * Q  # the longest walks go first
        row = t0 + w * M
        first, mine = lax.div(t0, S), lax.div(row, S)
        whole, total = lax.div(first * C, N), pl.cdiv(lax.div(t0 + Q - 1, S) * C, N)

        def issue(j, buffer):
            copy_summaries(walk, (k, v), (ks, vs), full, buffer, j * N, (b, h, kv))

        start, over_slots = ring(issue, full, free, total, cut, w)
        here = pl.ds(row, M)
        for ref, buffer in ((q, qs), (d_out, d_outs)):
            plgpu.copy_gmem_to_smem(ref.at[b, here, h], buffer.at[w], query_bar.at[w])
        for ref, buffer in ((lse, lses), (delta, deltas)):
            plgpu.copy_gmem_to_smem(ref.at[b, h, here], buffer.at[w], query_bar.at[w])
        if C:
            pl.when(w == 0)(start)
        for ref, buffer in ((k, own_k), (v, own_v)):  # not needed before the end
            plgpu.copy_gmem_to_smem(ref.at[b, here, kv], buffer.at[w], own_bar)
        plgpu.barrier_wait(query_bar.at[w])
        queries, d_outs_held = qs.at[w], d_outs.at[w]
        lse_row = plgpu.load(lses.at[w], layout=LAYOUT.reduce(1)) * LOG2E
        delta_row = plgpu.load(deltas.at[w], layout=LAYOUT.reduce(1))

        add_query_gradients = functools.partial(
            steps.from_keys,
            own=(queries, d_outs_held, lse_row, delta_row),
            factor=factor,
            dtype=dtype,
            interpret=interpret,
        )

        def summaries(masked):
            def use(j, buffer, acc):
                def mask(s):
                    if not masked:
                        return s
                    return jnp.where(
                        tiles.positions(s, 1) < mine * C - j * N, s, -jnp.inf
                    )

                keys, values = lambda: ks.at[buffer], lambda: vs.at[buffer]
                return add_query_gradients(acc, others=(keys, values), mask=mask)

            return use

        def causal(s, keys, queries, key_tile, query_tile):
            i = tiles.positions(s, queries) + query_tile * M
            j = tiles.positions(s, keys) + key_tile * M
            return jnp.where(i == j if walk.self_only else i >= j, s, -jnp.inf)

        def own_queries(a, acc):
            mask = functools.partial(
                causal, keys=1, queries=0, key_tile=a, query_tile=w
            )
            keys, values = lambda: own_k.at[a], lambda: own_v.at[a]
            return add_query_gradients(acc, others=(keys, values), mask=mask)

        def own_key_weights(t):
            def weights(s):
                s = causal(s, keys=0, queries=1, key_tile=w, query_tile=t)
                return steps.column_weights(s, lses.at[t], factor)

            return weights

        def own_dk(t, dk):
            pairs = [(own_k.at[w], qs.at[t]), (own_v.at[w], d_outs.at[t])]
            p, dp = tiles.weigh(pairs, own_key_weights(t), interpret)
            ds = steps.column_slopes(p, dp, deltas.at[t]).astype(dtype)
            products = [(0, ds, lambda: qs.at[t])]
            return tiles.accumulate((dk,), products, interpret)[0]

        def own_dv(t, dv):
            (s,) = tiles.multiply((own_k.at[w], qs.at[t].transpose((1, 0))))
            p = own_key_weights(t)(s).astype(dtype)
            products = [(0, p, lambda: d_outs.at[t])]
            return tiles.accumulate((dv,), products, interpret)[0]

        # Row i of the tile lies in slot mine * C + ahead + i, if in the slice.
        ahead = row - mine * S - walk.slice_start(h) if C else None
        summed_rows = vs.at[w, pl.ds(0, M)]

        def fetch_summed(ref):
            if C:
                at = jnp.clip(M + mine * C + ahead, 0, ref.shape[1] - M)
                rows = ref.at[b, pl.ds(at, M), h]
                plgpu.copy_gmem_to_smem(rows, summed_rows, sum_bar.at[w])

        def add_summed(x):
            if not C:
                return x
            plgpu.barrier_wait(sum_bar.at[w])
            y = plgpu.load(summed_rows, layout=LAYOUT).astype(jnp.float32)
            i = tiles.positions(y, 0) + ahead
            return x + jnp.where((i >= 0) & (i < C), y, 0.0)

        def leave(x, buffer, ref):
            buffer[...] = x.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, ref.at[b, here, h])

        acc = tiles.zeros(M, K)
        if C:
            acc = over_slots(0, whole, summaries(masked=False), acc)
            acc = over_slots(whole, total, summaries(masked=True), acc)
        since = w if walk.self_only else lax.div((mine - first) * S, M)
        until = w + 1 if walk.self_only else since + S // M
        plgpu.barrier_wait(own_bar)
        acc = lax.fori_loop(since, w + 1, own_queries, acc)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        # Nobody reads the ring any more, nor another's own keys: they carry results.
        # dk and dv are made one after the other, for want of registers.
        leave(acc * scale, ks.at[w, pl.ds(0, M)], dq)
        fetch_summed(sum_k)
        x = lax.fori_loop(w, until, own_dk, tiles.zeros(M, K)) * scale
        leave(add_summed(x), own_v.at[w], dk)
        fetch_summed(sum_v)
        x = lax.fori_loop(w, until, own_dv, tiles.zeros(M, K))
        leave(add_summed(x), own_k.at[w], dv)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    vector = plgpu.SMEM((W, M), jnp.float32)
    return tiles.launch(
        body,
        name="fixed_block_gradients",
        out=(jax.ShapeDtypeStruct((B, T, H, K), dtype),) * 3,
        scratch=[
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((W, M, K), dtype),
            vector,
            vector,
            tiles.swizzled((cut.stages, N, K), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            plgpu.Barrier(num_arrivals=4, num_barriers=W),
            plgpu.Barrier(num_arrivals=2 * W),
            plgpu.Barrier(num_barriers=W),
            plgpu.Barrier(num_arrivals=2 * pieces, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W),
        ],
        grid={"batch": B, "tile": T // Q, "head": H},
        threads=W,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, lse_BHT, delta_BHT, *(summed or ()))
