"""Attention to the own block and to earlier summaries: the kernel for Hopper.

A block of threads takes 64 query rows a warpgroup and walks the summary keys of all
earlier blocks in tiles; then the own block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.fixed_walk import Walk, copy_summaries
from sparse_flax.attention.hopper.ring import Cut, ring
from sparse_flax.attention.hopper.softmax import Softmax
from sparse_flax.attention.hopper.tiles import M


def forward(q_BTHK, k_BTHK, v_BTHK, walk: Walk, scale, cut: Cut, interpret=False):
    """Return out_BTHK and lse_BHT (natural logarithm, float32); T in whole tiles."""
    B, T, H, K = q_BTHK.shape
    dtype, group = q_BTHK.dtype, H // k_BTHK.shape[2]
    W, N, S, C = cut.warpgroups, cut.columns, walk.block, walk.summary
    Q = W * M
    # Tiles of the own blocks of a thread block's rows, which may begin inside a block.
    own = max(S, Q) // M
    pieces = N // walk.piece(N)
    softmax = Softmax(K, scale, dtype, interpret)

    def body(q, k, v, out, lse, qs, own_k, own_v, ks, vs, q_bar, own_bar, full, free):
        b, h, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        kv = lax.div(h, group)
        t0 = (T // Q - 1 - lax.axis_index("tile")) * Q  # the longest walks go first
        row = t0 + w * M
        first, mine = lax.div(t0, S), lax.div(row, S)
        whole, total = lax.div(first * C, N), pl.cdiv(lax.div(t0 + Q - 1, S) * C, N)

        def issue(j, buffer):
            copy_summaries(walk, (k, v), (ks, vs), full, buffer, j * N, (b, h, kv))

        start, over_slots = ring(issue, full, free, total, cut, w)
        plgpu.copy_gmem_to_smem(q.at[b, pl.ds(row, M), h], qs.at[w], q_bar.at[w])

        @pl.when(w == 0)
        def _():
            if C:
                start()
            for i in range(own):
                at = (b, pl.ds(jnp.minimum(first * S + i * M, T - M), M), kv)
                plgpu.copy_gmem_to_smem(k.at[at], own_k.at[i], own_bar)
                plgpu.copy_gmem_to_smem(v.at[at], own_v.at[i], own_bar)

        plgpu.barrier_wait(q_bar.at[w])
        queries = qs.at[w]

        def summaries(masked):
            def use(j, buffer, carry):
                def mask(s):
                    if not masked:
                        return s
                    return jnp.where(
                        tiles.positions(s, 1) < mine * C - j * N, s, -jnp.inf
                    )

                keys, values = ks.at[buffer], lambda: vs.at[buffer]
                return softmax.add_tile(carry, queries, keys, values, mask)

            return use

        def own_block(a, carry):
            def mask(s):
                i = tiles.positions(s, 0) + (row - first * S - a * M)
                j = tiles.positions(s, 1)
                return jnp.where(i == j if walk.self_only else i >= j, s, -jnp.inf)

            keys, values = own_k.at[a], lambda: own_v.at[a]
            return softmax.add_tile(carry, queries, keys, values, mask)

        carry = softmax.start()
        if C:
            carry = over_slots(0, whole, summaries(masked=False), carry)
            carry = over_slots(whole, total, summaries(masked=True), carry)
        plgpu.barrier_wait(own_bar)
        place = lax.div(row - first * S, M)
        since = place if walk.self_only else lax.div((mine - first) * S, M)
        carry = lax.fori_loop(since, place + 1, own_block, carry)
        qs[w], lse[b, h, pl.ds(row, M)] = softmax.finish(carry)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(qs.at[w], out.at[b, pl.ds(row, M), h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return tiles.launch(
        body,
        name="fixed_forward",
        out=(
            jax.ShapeDtypeStruct((B, T, H, K), dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        scratch=[
            tiles.swizzled((W, M, K), dtype),
            tiles.swizzled((own, M, K), dtype),
            tiles.swizzled((own, M, K), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            tiles.swizzled((cut.stages, N, K), dtype),
            plgpu.Barrier(num_barriers=W),
            plgpu.Barrier(num_arrivals=2 * own),
            plgpu.Barrier(num_arrivals=2 * pieces, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
        ],
        grid={"batch": B, "tile": T // Q, "head": H},
        threads=W,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHK)
