"""The band: the last `window` keys of every query, from 64 query rows a block.

The forward may start from another part's (out, log-sum-exp), and the backward add to
its gradients: so two parts make a union without a merge of their own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.softmax import Softmax
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M


def chunks_before(window: int) -> int:
    """64-row chunks of keys before a query tile's own that its window reaches."""
    return -(-(window - 1) // M)


def ends_share(window: int) -> bool:
    """Whether a query sees no key of its own chunk and of the farthest at one place.

    The triangles seen of the two then make one tile, with half the exponentials.
    """
    back = chunks_before(window)
    return 0 < back and window <= back * M


def own_end(tile: jax.Array) -> jax.Array:
    """Where such a tile, queries by keys, holds the own chunk; else the farthest."""
    return tiles.positions(tile, 0) >= tiles.positions(tile, 1)


def split_ends(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what such a tile holds of the own chunk and of the farthest, and zeros."""
    own = own_end(tile)
    return jnp.where(own, tile, 0.0), jnp.where(own, 0.0, tile)


def settings(window: int, K: int, V: int) -> tuple[int, int]:
    """Warpgroups of a forward block, and score tiles taken at a time (measured).

    Two warpgroups that share chunks pay where all rows are wide; one, of which four fit
    a multiprocessor, where they are not.
    """
    if min(K, V) > 64 and forward_memory(window, K, V, 2) <= tiles.SHARED_MEMORY:
        return 2, 2
    return 1, 1 if chunks_before(window) <= 2 else 2


def forward_memory(window: int, K: int, V: int, warpgroups: int) -> int:
    """Bytes of shared memory that a forward block takes, with some for barriers."""
    return (chunks_before(window) + 2 * warpgroups) * M * (K + V) * 2 + 1024


def within(s, distance, window: int, keys: int = 1):
    """Hide what is not 0 <= query - key < window.

    `distance` is the tile's first query less its first key, `keys` the dimension of s
    that keys lie along. Inner tiles need no mask.
    """
    low, high = distance - (M - 1), distance + (M - 1)
    if low >= 0 and high < window:
        return s
    d = tiles.positions(s, 1 - keys) - tiles.positions(s, keys) + distance
    if low >= 0:
        return jnp.where(d < window, s, -jnp.inf)
    if high < window:
        return jnp.where(d >= 0, s, -jnp.inf)
    return jnp.where((d >= 0) & (d < window), s, -jnp.inf)


def forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    scale: float,
    window: int,
    *,
    init: tuple[jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return (out_BTHV, lse_BHT) over the band, and over `init` if that is given.

    T is a multiple of 64 times the warpgroups of `settings`.
    """
    (B, T, H, K), V, dtype = q_BTHK.shape, v_BTHV.shape[-1], q_BTHK.dtype
    group = H // k_BTHK.shape[2]
    back = chunks_before(window)
    warpgroups, at_once = settings(window, K, V)
    softmax = Softmax(V, scale, dtype, interpret)
    loaded = back + warpgroups

    def body(q, k, v, *refs):
        out1, lse1 = refs[:2] if init else (None, None)
        out, lse, qs, os, ks, vs, q_bar, k_bar, v_bar = refs[-9:]
        b, h, w = (lax.axis_index(axis) for axis in ("b", "h", "warpgroup"))
        first = lax.axis_index("t") * (M * warpgroups)
        mine = first + w * M
        qs, os = qs.at[w], os.at[w]

        def load_keys():
            for i in range(loaded):
                # Chunks before the sequence are read from its start, and hidden.
                rows = pl.ds(jnp.maximum(first + (i - back) * M, 0), M)
                kv = lax.div(h, group)
                plgpu.copy_gmem_to_smem(k.at[b, rows, kv], ks.at[i], k_bar)
                plgpu.copy_gmem_to_smem(v.at[b, rows, kv], vs.at[i], v_bar)

        plgpu.copy_gmem_to_smem(q.at[b, pl.ds(mine, M), h], qs, q_bar.at[w])
        if warpgroups > 1:
            pl.when(w == 0)(load_keys)
        else:
            load_keys()
        if init:
            rows = pl.ds(mine, M)
            plgpu.copy_gmem_to_smem(out1.at[b, rows, h], os, q_bar.at[w])
            l = tiles.load_rows(lse1.at[b, h, rows])
            plgpu.barrier_wait(q_bar.at[w])
            x = plgpu.load(os, layout=LAYOUT).astype(jnp.float32)
            state = softmax.after(x, l)
        else:
            plgpu.barrier_wait(q_bar.at[w])
            state = None
        plgpu.barrier_wait(k_bar)

        def values(i):
            return lambda: vs.at[i + w]

        def hide(s, i):
            if i < back:
                inside = mine + (i - back) * M >= 0
                s = s + jnp.where(inside, 0.0, -jnp.inf).astype(jnp.float32)
            return within(s, (back - i) * M, window)

        def shared_scores(s_far, s_own):
            own = s_own if window >= M else hide(s_own, back)
            return jnp.where(own_end(s_own), own, hide(s_far, 0))

        def shared_products(p):
            own, far = split_ends(p)
            return [(own, values(back)), (far, values(0))]

        # A tile of scores: its chunks, farthest first (35 registers fewer than nearest
        # first), and what its scores and its products are.
        order = [
            ((i,), lambda s, i=i: hide(s, i), lambda p, i=i: [(p, values(i))])
            for i in range(back + 1)
        ]
        if ends_share(window):
            shared = (0, back), shared_scores, shared_products
            order = [shared, *order[1:back]]
        for at in range(0, len(order), at_once):
            some = order[at : at + at_once]
            chunks = [i for tile, _, _ in some for i in tile]
            found = iter(
                tiles.multiply(*((qs, ks.at[i + w].transpose((1, 0))) for i in chunks))
            )
            state = softmax.add(
                state,
                [score(*(next(found) for _ in tile)) for tile, score, _ in some],
                [products for _, _, products in some],
                (lambda: plgpu.barrier_wait(v_bar)) if at == 0 else None,
            )
        os[...], lse[b, h, pl.ds(mine, M)] = softmax.finish(state)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(os, out.at[b, pl.ds(mine, M), h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return tiles.launch(
        body,
        name="band_forward",
        out=(
            jax.ShapeDtypeStruct((B, T, H, V), dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        scratch=[
            tiles.swizzled((warpgroups, M, K), dtype),
            tiles.swizzled((warpgroups, M, V), dtype),
            tiles.swizzled((loaded, M, K), dtype),
            tiles.swizzled((loaded, M, V), dtype),
            plgpu.Barrier(num_arrivals=2 if init else 1, num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=loaded),
            plgpu.Barrier(num_arrivals=loaded),
        ],
        grid={"b": B, "t": T // (M * warpgroups), "h": H},
        threads=warpgroups,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHV, *(init or ()))


def backward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    d_out_BTHV: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    scale: float,
    window: int,
    *,
    into: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (dq, dk, dv), added to `into` if given; dk and dv one a query head.

    lse and delta = rowsum(out * d_out) are those of the union. A block owns 64 rows:
    dq from the keys before them, then dk and dv from the queries after them. No two
    blocks write the same place, so results repeat bit for bit.

    For windows from 2 to 128 and T a multiple of 64; `band_ring` takes wider ones.
    """
    (B, T, H, K), V, dtype = q_BTHK.shape, v_BTHV.shape[-1], q_BTHK.dtype
    group = H // k_BTHK.shape[2]
    n = chunks_before(window) + 1

    def body(q, k, v, d_out, lse, delta, *refs):
        dq1, dk1, dv1 = refs[:3] if into else (None,) * 3
        dq, dk, dv, *scratch = refs[3:] if into else refs
        qs, dos, ks, vs, gs, ls, es, key_bar, query_bar, dq_bar, dkv_bar = scratch
        b, h, t0 = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("t") * M
        kv = lax.div(h, group)

        def at(ref, t, head=h):
            return ref.at[b, pl.ds(t, M), head]

        # Chunk i lies 64 i rows before (k, v) or after (q, d_out) the block's own.
        plgpu.copy_gmem_to_smem(at(q, t0), qs.at[0], key_bar)
        plgpu.copy_gmem_to_smem(at(d_out, t0), dos.at[0], key_bar)
        for i in range(n):
            j = jnp.maximum(t0 - i * M, 0)
            plgpu.copy_gmem_to_smem(at(k, j, kv), ks.at[i], key_bar)
            plgpu.copy_gmem_to_smem(at(v, j, kv), vs.at[i], key_bar)
        if into:
            plgpu.copy_gmem_to_smem(at(dq1, t0), gs, dq_bar)
        for i in range(n):
            j = jnp.minimum(t0 + i * M, T - M)
            plgpu.copy_gmem_to_smem(lse.at[b, h, pl.ds(j, M)], ls.at[i], query_bar)
            plgpu.copy_gmem_to_smem(delta.at[b, h, pl.ds(j, M)], es.at[i], query_bar)
            if i:
                plgpu.copy_gmem_to_smem(at(q, j), qs.at[i], query_bar)
                plgpu.copy_gmem_to_smem(at(d_out, j), dos.at[i], query_bar)
        l, e = (tiles.load_rows(ref.at[b, h, pl.ds(t0, M)]) for ref in (lse, delta))
        l = l * LOG2E
        plgpu.barrier_wait(key_bar)

        def turn(i):
            def weights(s):
                x = l
                if i:
                    outside = jnp.where(t0 - i * M >= 0, 0.0, jnp.inf)
                    x = l + outside.astype(jnp.float32)
                s = s * (scale * LOG2E) - tiles.per_row(x, s)
                return jnp.exp2(within(s, i * M, window))

            def slopes(p, dp):
                return p * (dp - tiles.per_row(e, dp))

            return lambda: (qs.at[0], dos.at[0], ks.at[i], vs.at[i]), weights, slopes

        turns = [turn(i) for i in range(n)]
        x = tiles.add_query_gradients(tiles.zeros(M, K), turns, dtype, interpret)
        x = x * scale
        if into:
            plgpu.barrier_wait(dq_bar)
            x = x + plgpu.load(gs, layout=LAYOUT).astype(jnp.float32)
        gs[...] = x.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(gs, at(dq, t0))
        # k and v of the first earlier chunk are dead: room for what is added to.
        if into:
            plgpu.copy_gmem_to_smem(at(dk1, t0), ks.at[1], dkv_bar)
            plgpu.copy_gmem_to_smem(at(dv1, t0), vs.at[1], dkv_bar)
        plgpu.barrier_wait(query_bar)
        sums = (tiles.zeros(M, V), tiles.zeros(M, K))
        for i in range(n):
            l = plgpu.load(ls.at[i], layout=LAYOUT.reduce(0)) * LOG2E
            e = plgpu.load(es.at[i], layout=LAYOUT.reduce(0))
            if i:
                outside = jnp.where(t0 + i * M < T, 0.0, jnp.inf)
                l = l + outside.astype(jnp.float32)

            def weights(s, i=i, l=l):
                s = s * (scale * LOG2E) - tiles.per_column(l, s)
                return jnp.exp2(within(s, i * M, window, keys=0))

            sums = tiles.add_key_gradients(
                sums,
                lambda i=i: (ks.at[0], vs.at[0], qs.at[i], dos.at[i]),
                weights,
                lambda p, dp, e=e: p * (dp - tiles.per_column(e, dp)),
                dtype,
                interpret,
            )
        x, y = sums[0], sums[1] * scale
        if into:
            plgpu.barrier_wait(dkv_bar)
            x = x + plgpu.load(vs.at[1], layout=LAYOUT).astype(jnp.float32)
            y = y + plgpu.load(ks.at[1], layout=LAYOUT).astype(jnp.float32)
        vs[1], ks[1] = x.astype(dtype), y.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ks.at[1], at(dk, t0))
        plgpu.copy_smem_to_gmem(vs.at[1], at(dv, t0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    row_values = plgpu.SMEM((n, M), jnp.float32)
    like_q = jax.ShapeDtypeStruct((B, T, H, K), dtype)
    return tiles.launch(
        body,
        name="band_backward",
        out=(like_q, like_q, jax.ShapeDtypeStruct((B, T, H, V), dtype)),
        scratch=[
            tiles.swizzled((n, M, K), dtype),
            tiles.swizzled((n, M, V), dtype),
            tiles.swizzled((n, M, K), dtype),
            tiles.swizzled((n, M, V), dtype),
            tiles.swizzled((M, K), dtype),
            *(row_values, row_values),
            plgpu.Barrier(num_arrivals=2 + 2 * n),
            plgpu.Barrier(num_arrivals=4 * n - 2),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid={"b": B, "t": T // M, "h": H},
        threads=1,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHV, d_out_BTHV, lse_BHT, delta_BHT, *(into or ()))
