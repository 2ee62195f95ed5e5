"""The gradient of columns of up to 128 rows: five products, all on chip at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import steps, tiles
from sparse_flax.attention.hopper.columns import Packing
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M


def backward(
    q_BRCK: jax.Array,
    k_BRCK: jax.Array,
    v_BRCV: jax.Array,
    out_BRCV: jax.Array,
    lse: jax.Array,
    d_out_BRCV: jax.Array,
    scale: float,
    *,
    heads: int,
    strict: bool,
    by_token: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return (dq, dk, dv, delta or None); dk and dv are one a query head.

    out and lse may be those of a union that the columns are a part of. Then lse is
    `by_token`, and so is delta, rowsum(out * d_out), which the other part needs too;
    else lse is (B, C, R) and delta is None. Scores are transposed, keys by
    queries, so that P and dS are register operands for dv and dk; dS goes to shared
    memory for dq, at the end.
    """
    (B, R, C, K), V, dtype = q_BRCK.shape, v_BRCV.shape[-1], q_BRCK.dtype
    group = C // k_BRCK.shape[2]
    packing = Packing.of(R, C, heads, 1, by_token)
    rows, pack = packing.tile_rows, packing.pack
    each = tiles.tiles_of(rows)
    pairs = [(a, t) for a in range(len(each)) for t in range(a, len(each))]
    shared = _shares_memory(rows, K, V)

    def body(*refs):
        q, k, v, out, lse, d_out, dq, dk, dv, *rest = refs
        delta, *rest = rest if by_token else (None, *rest)
        qs, ks, vs, dos, dss, *rest = rest
        os = dss if shared else rest.pop(0)
        ls, es, out_bar, q_bar = rest
        b, block = lax.axis_index("b"), lax.axis_index("block")
        first = block * pack
        if packing.filled < rows:
            for buffer in (os, dos, qs, ks, vs):
                width = buffer.shape[-1]
                buffer[pl.ds(0, rows)] = tiles.zeros(rows, width).astype(dtype)
            plgpu.commit_smem()
        for ref, buffer, bar, share in (
            (out, os, out_bar, 1),
            (d_out, dos, out_bar, 1),
            (q, qs, q_bar, 1),
            (k, ks, q_bar, group),
            (v, vs, q_bar, group),
        ):
            for p in range(pack):
                column = ref.at[b, :, lax.div(first + p, share)]
                plgpu.copy_gmem_to_smem(column, buffer.at[pl.ds(p * R, R)], bar)
        lse_rows = packing.of_rows(lse, b, block)
        for row, _ in each:
            ls[pl.ds(row, M)] = tiles.load_rows(lse_rows(row))
        plgpu.barrier_wait(out_bar)
        for row, _ in each:
            x = plgpu.load(os.at[pl.ds(row, M)], layout=LAYOUT).astype(jnp.float32)
            y = plgpu.load(dos.at[pl.ds(row, M)], layout=LAYOUT).astype(jnp.float32)
            d = (x * y).sum(axis=1)
            es[pl.ds(row, M)] = d
            if by_token:
                packing.of_rows(delta, b, block)(row)[...] = d
        plgpu.barrier_wait(q_bar)

        def slot(a, t):
            return dss.at[pl.ds(pairs.index((a, t)) * M, M)]

        def pair(a, t, sums):
            """Add to (dv, dk) of key tile a what query tile t gives."""
            (key, key_new), (query, query_new) = each[a], each[t]
            i_new = query_new if query_new > query else 0
            j_new = key_new if key_new > key else 0
            keys, queries = pl.ds(key, M), pl.ds(query, M)

            def weights(s):
                l = plgpu.load(ls.at[queries], layout=LAYOUT.reduce(0)) * LOG2E
                s = s * (scale * LOG2E) - tiles.per_column(l, s)
                if a == t or i_new or j_new:
                    i = tiles.positions(s, 1) + query
                    j = tiles.positions(s, 0) + key
                    sees = packing.sees(i, j, i_new, j_new, strict)
                    s = jnp.where(sees, s, -jnp.inf)
                return jnp.exp2(s)

            def slopes(p, dp):
                ds = steps.column_slopes(p, dp, es.at[queries]).astype(dtype)
                slot(a, t)[...] = ds
                return ds

            return tiles.add_key_gradients(
                sums,
                lambda: (ks.at[keys], vs.at[keys], qs.at[queries], dos.at[queries]),
                weights,
                slopes,
                dtype,
                interpret,
            )

        def keys_of(a):
            """Sum up dk and dv of key tile a, from the query tiles at or after it."""
            sums = (tiles.zeros(M, V), tiles.zeros(M, K))
            for t in range(a, len(each)):
                sums = pair(a, t, sums)
            return each[a][0], sums[0].astype(dtype), (sums[1] * scale).astype(dtype)

        done = [keys_of(a) for a in range(len(each))]
        # Nothing reads v and q any more: they carry dv and dk out. The last tile first:
        # of rows that it shares with its neighbour, that one has the whole sums.
        for key, x, y in reversed(done):
            vs[pl.ds(key, M)] = x
            qs[pl.ds(key, M)] = y
        plgpu.commit_smem()
        for p in range(pack):
            mine = pl.ds(p * R, R)
            plgpu.copy_smem_to_gmem(vs.at[mine], dv.at[b, :, first + p])
            plgpu.copy_smem_to_gmem(qs.at[mine], dk.at[b, :, first + p])
        done = []
        for t, (query, _) in enumerate(each):
            (x,) = tiles.multiply(
                [
                    (slot(a, t).transpose((1, 0)), ks.at[pl.ds(each[a][0], M)])
                    for a in range(t + 1)
                ]
            )
            done.append((query, (x * scale).astype(dtype)))
        for query, x in reversed(done):
            ks[pl.ds(query, M)] = x
        plgpu.commit_smem()
        for p in range(pack):
            plgpu.copy_smem_to_gmem(ks.at[pl.ds(p * R, R)], dq.at[b, :, first + p])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    wide, value = tiles.swizzled((rows, K), dtype), tiles.swizzled((rows, V), dtype)
    row_values = plgpu.SMEM((rows,), jnp.float32)
    like_k = jax.ShapeDtypeStruct((B, R, C, K), dtype)
    dq, dk, dv, *delta = tiles.launch(
        body,
        name="columns_backward",
        out=(
            like_k,
            like_k,
            jax.ShapeDtypeStruct((B, R, C, V), dtype),
            *((packing.row_values(B),) if by_token else ()),
        ),
        scratch=[
            *(wide, wide, value, value),
            tiles.swizzled((len(pairs) * M, M), dtype, beside=K),
            *(() if shared else (value,)),
            *(row_values, row_values),
            plgpu.Barrier(num_arrivals=2 * pack),
            plgpu.Barrier(num_arrivals=3 * pack),
        ],
        grid={"b": B, "block": packing.blocks},
        threads=1,
        interpret=interpret,
    )(q_BRCK, k_BRCK, v_BRCV, out_BRCV, packing.fold_rows(lse), d_out_BRCV)
    return dq, dk, dv, packing.unfold_rows(*delta) if by_token else None


def _shares_memory(rows: int, K: int, V: int) -> bool:
    """Whether out fits where dS will be: it is dead before the first dS is made."""
    n = len(tiles.tiles_of(rows))
    return V == M and K != tiles.NARROW and rows <= n * (n + 1) // 2 * M
