"""The band's gradient with rolled loops and a ring of two buffers.

Shared memory hardly grows with the window (512 bytes for 64 keys), so that wide ones
fit; for windows of up to 128, `band.backward`, which holds everything at once, is
faster (measured).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import band, tiles
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M

SLOTS = 2


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
    """Do what `band.backward` does, for windows from 2 on that fit; scale is above 0.

    The other rows stream through the ring: first (k, v), farthest first, then
    (q, d_out), nearest first, last the gradients that are added to.
    """
    (B, T, H, K), V, dtype = q_BTHK.shape, v_BTHV.shape[-1], q_BTHK.dtype
    group = H // k_BTHK.shape[2]
    back = band.chunks_before(window)
    n = back + 1
    last = 2 * back  # the step that brings dk1 and dv1

    def body(q, k, v, d_out, lse, delta, *refs):
        dq1, dk1, dv1 = refs[:3] if into else (None,) * 3
        dq, dk, dv, *scratch = refs[3:] if into else refs
        qs, dos, ks, vs, gs, ring_k, ring_v, ls, es, own, ring, vectors, old = scratch
        b, h, t0 = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("t") * M
        kv = lax.div(h, group)

        def at(ref, t, head=h):
            return ref.at[b, pl.ds(t, M), head]

        def issue(step):
            slot = lax.rem(step, SLOTS)

            def copy(x, y, t, head=h):
                plgpu.copy_gmem_to_smem(at(x, t, head), ring_k.at[slot], ring.at[slot])
                plgpu.copy_gmem_to_smem(at(y, t, head), ring_v.at[slot], ring.at[slot])

            @pl.when(step < back)
            def _():
                copy(k, v, jnp.maximum(t0 - (back - step) * M, 0), kv)

            @pl.when((step >= back) & (step < 2 * back))
            def _():
                copy(q, d_out, jnp.minimum(t0 + (step - back + 1) * M, T - M))

            if into:
                pl.when(step == last)(lambda: copy(dk1, dv1, t0))

        def finish(step):
            plgpu.commit_smem()  # every warp has finished reading the slot
            issue(step + SLOTS)

        plgpu.copy_gmem_to_smem(at(q, t0), qs, own)
        plgpu.copy_gmem_to_smem(at(d_out, t0), dos, own)
        plgpu.copy_gmem_to_smem(at(k, t0, kv), ks, own)
        plgpu.copy_gmem_to_smem(at(v, t0, kv), vs, own)
        for step in range(SLOTS):
            issue(jnp.int32(step))
        for i in range(n):
            j = jnp.minimum(t0 + i * M, T - M)
            plgpu.copy_gmem_to_smem(lse.at[b, h, pl.ds(j, M)], ls.at[i], vectors)
            plgpu.copy_gmem_to_smem(delta.at[b, h, pl.ds(j, M)], es.at[i], vectors)
        if into:
            plgpu.copy_gmem_to_smem(at(dq1, t0), gs, old)
        plgpu.barrier_wait(vectors)
        l = plgpu.load(ls.at[0], layout=LAYOUT.reduce(1)) * LOG2E
        e = plgpu.load(es.at[0], layout=LAYOUT.reduce(1))
        plgpu.barrier_wait(own)

        def upper(s, i, keys=1):  # earlier chunks need only query - key < window
            d = tiles.positions(s, 1 - keys) - tiles.positions(s, keys)
            return jnp.where(d < window - i * M, s, -jnp.inf)

        def query_side(total, keys, values, x, masked):
            def weights(s):
                return jnp.exp2(masked(s * (scale * LOG2E) - tiles.per_row(x, s)))

            p, dp = tiles.weigh([(qs, keys()), (dos, values())], weights, interpret)
            ds = (p * (dp - tiles.per_row(e, dp))).astype(dtype)
            return tiles.accumulate((total,), [(0, ds, keys)], interpret)[0]

        def before(step, total):
            i, slot = back - step, lax.rem(step, SLOTS)
            plgpu.barrier_wait(ring.at[slot])
            outside = jnp.where(t0 - i * M >= 0, 0.0, jnp.inf).astype(jnp.float32)
            total = query_side(
                total,
                lambda: ring_k.at[slot],
                lambda: ring_v.at[slot],
                l + outside,
                lambda s: upper(s, i),
            )
            finish(step)
            return total

        def ends():
            """Return dq from the triangles seen of the farthest and the own chunk."""
            plgpu.barrier_wait(ring.at[0])
            outside = jnp.where(t0 - back * M >= 0, 0.0, jnp.inf).astype(jnp.float32)

            def weights(far, own):
                s = jnp.where(band.own_end(own), own, upper(far - outside, back))
                return jnp.exp2(s * (scale * LOG2E) - tiles.per_row(l, s))

            pairs = [(qs, ring_k.at[0]), (qs, ks), (dos, ring_v.at[0]), (dos, vs)]
            p, far, own = tiles.weigh(pairs, weights, interpret)
            dp = jnp.where(band.own_end(own), own, far)
            ds = p * (dp - tiles.per_row(e, dp))
            own, far = band.split_ends(ds)
            products = [
                (0, own.astype(dtype), lambda: ks),
                (0, far.astype(dtype), lambda: ring_k.at[0]),
            ]
            return tiles.accumulate((tiles.zeros(M, K),), products, interpret)[0]

        together = band.ends_share(window)
        if together:
            total = ends()
            finish(jnp.int32(0))
        else:
            total = query_side(
                tiles.zeros(M, K),
                lambda: ks,
                lambda: vs,
                l,
                lambda s: band.within(s, 0, window),
            )
        x = lax.fori_loop(int(together), back, before, total) * scale
        if into:
            plgpu.barrier_wait(old)
            x = x + plgpu.load(gs, layout=LAYOUT).astype(jnp.float32)
        gs[...] = x.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(gs, at(dq, t0))

        def key_side(sums, queries, d_outs, i, outside, masked):
            l = plgpu.load(ls.at[i], layout=LAYOUT.reduce(0)) * LOG2E + outside
            e = plgpu.load(es.at[i], layout=LAYOUT.reduce(0))
            return tiles.add_key_gradients(
                sums,
                lambda: (ks, vs, queries(), d_outs()),
                lambda s: jnp.exp2(
                    masked(s * (scale * LOG2E) - tiles.per_column(l, s))
                ),
                lambda p, dp: p * (dp - tiles.per_column(e, dp)),
                dtype,
                interpret,
            )

        def after(i, sums):
            step = back + i - 1
            slot = lax.rem(step, SLOTS)
            plgpu.barrier_wait(ring.at[slot])
            outside = jnp.where(t0 + i * M < T, 0.0, jnp.inf).astype(jnp.float32)
            sums = key_side(
                sums,
                lambda: ring_k.at[slot],
                lambda: ring_v.at[slot],
                i,
                outside,
                lambda s: upper(s, i, keys=0),
            )
            finish(step)
            return sums

        sums = key_side(
            (tiles.zeros(M, V), tiles.zeros(M, K)),
            lambda: qs,
            lambda: dos,
            0,
            0.0,
            lambda s: band.within(s, 0, window, keys=0),
        )
        d_value, d_key = lax.fori_loop(1, n, after, sums)
        d_key = d_key * scale
        out_k, out_v = ring_k.at[last % SLOTS], ring_v.at[last % SLOTS]
        if into:
            plgpu.barrier_wait(ring.at[last % SLOTS])
            d_key = d_key + plgpu.load(out_k, layout=LAYOUT).astype(jnp.float32)
            d_value = d_value + plgpu.load(out_v, layout=LAYOUT).astype(jnp.float32)
        out_k[...], out_v[...] = d_key.astype(dtype), d_value.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_k, at(dk, t0))
        plgpu.copy_smem_to_gmem(out_v, at(dv, t0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    row_values = plgpu.SMEM((n, M), jnp.float32)
    own_k, own_v = tiles.swizzled((M, K), dtype), tiles.swizzled((M, V), dtype)
    like_q = jax.ShapeDtypeStruct((B, T, H, K), dtype)
    return tiles.launch(
        body,
        name="band_ring_backward",
        out=(like_q, like_q, jax.ShapeDtypeStruct((B, T, H, V), dtype)),
        scratch=[
            *(own_k, own_v, own_k, own_v, own_k),
            tiles.swizzled((SLOTS, M, K), dtype),
            tiles.swizzled((SLOTS, M, V), dtype),
            *(row_values, row_values),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2 * n),
            plgpu.Barrier(),
        ],
        grid={"b": B, "t": T // M, "h": H},
        threads=1,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHV, d_out_BTHV, lse_BHT, delta_BHT, *(into or ()))
