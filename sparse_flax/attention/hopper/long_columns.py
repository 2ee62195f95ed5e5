"""The gradient of long columns (192 or 256 rows): two warpgroups share a column.

One warpgroup cannot hold dk and dv of more than two tiles in registers. Everything of
a column fills a block's shared memory, so the two meet at two barriers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.columns import Packing
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M


def backward(
    q_BRCK: jax.Array,
    k_BRCK: jax.Array,
    v_BRCK: jax.Array,
    out_BRCK: jax.Array,
    lse: jax.Array,
    d_out_BRCK: jax.Array,
    scale: float,
    *,
    heads: int,
    strict: bool,
    by_token: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Do what `columns_backward` does, for R = 192 or 256 and K = V = 64."""
    (B, R, C, K), dtype = q_BRCK.shape, q_BRCK.dtype
    group = C // k_BRCK.shape[2]
    n, packing = R // M, Packing.of(R, C, heads, 1, by_token)
    pairs = [(a, t) for a in range(n) for t in range(a, n)]  # key tile, query tile
    # Tiles {0, 3} and {1, 2}: the same work for scores and for dq.
    mine = [[a for a in range(n) if w in (a % 4, 3 - a % 4)] for w in range(2)]

    def body(q, k, v, out, lse, d_out, dq, dk, dv, *rest):
        delta, *rest = rest if by_token else (None, *rest)
        qs, ks, vs, dos, dss, ls, es, out_bar, q_bar, both = rest
        b, c = lax.axis_index("b"), lax.axis_index("column")
        w = lax.axis_index("warpgroup")

        def rows(t):
            return pl.ds(t * M, M)

        def slot(a, t):
            return dss.at[rows(pairs.index((a, t)))]

        @pl.when(w == 0)
        def _():
            kv = lax.div(c, group)
            plgpu.copy_gmem_to_smem(out.at[b, :, c], dss.at[pl.ds(0, R)], out_bar)
            plgpu.copy_gmem_to_smem(d_out.at[b, :, c], dos, out_bar)
            plgpu.copy_gmem_to_smem(q.at[b, :, c], qs, q_bar)
            plgpu.copy_gmem_to_smem(k.at[b, :, kv], ks, q_bar)
            plgpu.copy_gmem_to_smem(v.at[b, :, kv], vs, q_bar)

        def meet(i):
            plgpu.barrier_arrive(both.at[i])
            plgpu.barrier_wait(both.at[i])

        def pair(a, t, sums):
            l = plgpu.load(ls.at[rows(t)], layout=LAYOUT.reduce(0)) * LOG2E
            e = plgpu.load(es.at[rows(t)], layout=LAYOUT.reduce(0))

            def weights(s):
                s = s * (scale * LOG2E) - tiles.per_column(l, s)
                if a == t:
                    j, i = tiles.positions(s, 0), tiles.positions(s, 1)
                    s = jnp.where(i > j if strict else i >= j, s, -jnp.inf)
                return jnp.exp2(s)

            def slopes(p, dp):
                ds = (p * (dp - tiles.per_column(e, dp))).astype(dtype)
                slot(a, t)[...] = ds
                return ds

            return tiles.add_key_gradients(
                sums,
                lambda: (
                    ks.at[rows(a)],
                    vs.at[rows(a)],
                    qs.at[rows(t)],
                    dos.at[rows(t)],
                ),
                weights,
                slopes,
                dtype,
                interpret,
            )

        def keys_of(a):
            sums = (tiles.zeros(M, K), tiles.zeros(M, K))
            for t in range(a, n):
                sums = pair(a, t, sums)
            return sums

        def work(my_tiles):
            lse_rows = packing.of_rows(lse, b, c)
            for t in my_tiles:
                ls[rows(t)] = tiles.load_rows(lse_rows(t * M))
            plgpu.barrier_wait(out_bar)
            for t in my_tiles:
                x = plgpu.load(dss.at[rows(t)], layout=LAYOUT).astype(jnp.float32)
                y = plgpu.load(dos.at[rows(t)], layout=LAYOUT).astype(jnp.float32)
                d = (x * y).sum(axis=1)
                es[rows(t)] = d
                if by_token:
                    packing.of_rows(delta, b, c)(t * M)[...] = d
            plgpu.commit_smem()
            meet(0)  # lse and delta are whole and out is dead: dS takes its place
            plgpu.barrier_wait(q_bar)
            held = []
            for a in my_tiles:
                x, y = keys_of(a)
                vs[rows(a)] = x.astype(dtype)  # only key tile a reads these rows of v
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(vs.at[rows(a)], dv.at[b, rows(a), c])
                held.append((y * scale).astype(dtype))
            plgpu.commit_smem()
            meet(1)  # all of dS is written; q and d_out are dead
            for a, x in zip(my_tiles, held, strict=True):
                qs[rows(a)] = x
            plgpu.commit_smem()
            for a in my_tiles:
                plgpu.copy_smem_to_gmem(qs.at[rows(a)], dk.at[b, rows(a), c])
            for t in my_tiles:
                (x,) = tiles.multiply(
                    [
                        (slot(a, t).transpose((1, 0)), ks.at[rows(a)])
                        for a in range(t + 1)
                    ]
                )
                dos[rows(t)] = (x * scale).astype(dtype)
            plgpu.commit_smem()
            for t in my_tiles:
                plgpu.copy_smem_to_gmem(dos.at[rows(t)], dq.at[b, rows(t), c])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        for i in range(2):
            pl.when(w == i)(functools.partial(work, mine[i]))

    column = tiles.swizzled((R, K), dtype)
    row_values = plgpu.SMEM((R,), jnp.float32)
    gradient = jax.ShapeDtypeStruct((B, R, C, K), dtype)
    dq, dk, dv, *delta = tiles.launch(
        body,
        name="long_columns_backward",
        out=(
            *(gradient, gradient, gradient),
            *((packing.row_values(B),) if by_token else ()),
        ),
        scratch=[
            *(column, column, column, column),
            tiles.swizzled((len(pairs) * M, M), dtype),
            *(row_values, row_values),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        grid={"b": B, "column": C},
        threads=2,
        interpret=interpret,
    )(q_BRCK, k_BRCK, v_BRCK, out_BRCK, packing.fold_rows(lse), d_out_BRCK)
    return dq, dk, dv, packing.unfold_rows(*delta) if by_token else None
