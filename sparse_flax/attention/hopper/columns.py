"""Columns: queries and keys a multiple of the stride apart, a whole column on chip.

On the free view (B, R, S*H, K) a column is a causal problem of R rows. A block loads
one column, or as many neighbouring ones as fill 64 rows under a block-diagonal mask,
and keeps it until all is done: each tensor crosses device memory once, both ways.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.softmax import Softmax
from sparse_flax.attention.hopper.tiles import M
from sparse_flax.attention.layouts import fit


@dataclasses.dataclass(frozen=True)
class Packing:
    """How columns of `rows` rows are put on blocks."""

    rows: int  # R, a multiple of 8, the rows that a swizzle repeats after
    stride: int  # S: there are S * H columns, those of the same token side by side
    pack: int  # columns in one tile, of neighbouring heads
    packs: int  # H / pack
    warpgroups: int  # packs in one block
    blocks: int
    by_token: bool  # how a value a row lies in device memory

    @classmethod
    def of(
        cls, rows: int, columns: int, heads: int, most_warpgroups: int, by_token: bool
    ) -> Packing:
        """Pack short columns; two packs a block where registers are few (measured).

        `by_token`, a value a row is (B, H, T), which a band's kernels take; else it is
        (B, S*H, R), of which each column reads and writes adjacent values: faster.
        """
        pack = max(p for p in range(1, max(M // rows, 1) + 1) if heads % p == 0)
        groups = columns // pack
        warpgroups = most_warpgroups if groups % most_warpgroups == 0 else 1
        stride, blocks = columns // heads, groups // warpgroups
        return cls(rows, stride, pack, heads // pack, warpgroups, blocks, by_token)

    @property
    def tile_rows(self) -> int:
        """Rows in shared memory: at least 64."""
        return max(self.pack * self.rows, M)

    @property
    def filled(self) -> int:
        """Rows of them that hold a column; the rest is zeroed."""
        return self.pack * self.rows

    def sees(self, i, j, i_new: int, j_new: int, strict: bool):
        """Whether query row i sees key row j, and no tile pair before had the two."""
        sees = i > j if strict else i >= j
        if i_new:
            sees = sees & (i >= i_new)
        if j_new:
            sees = sees & (j >= j_new)
        if self.rows < M:
            sees = sees & (i // self.rows == j // self.rows)
        return sees

    def of_rows(self, ref, b, group):
        """Return the function from a row of a pack to the 64 values from there on, in
        what fold_rows or row_values makes.
        """
        first = lax.rem(group, self.packs) * self.tile_rows
        s = lax.div(group, self.packs)
        if self.by_token:
            return lambda row: ref.at[b, pl.ds(first + row, M), s]
        return lambda row: ref.at[b, s, pl.ds(first + row, M)]

    def row_values(self, B: int) -> jax.ShapeDtypeStruct:
        """What a kernel returns of a value a row, for unfold_rows."""
        rows = self.packs * self.tile_rows
        shape = (rows, self.stride) if self.by_token else (self.stride, rows)
        return jax.ShapeDtypeStruct((B, *shape), jnp.float32)

    def fold_rows(self, x: jax.Array) -> jax.Array:
        """Bring a value a row into the kernels' form: mostly a free view."""
        B = x.shape[0]
        if self.by_token:
            x = fit(x, self.rows * self.stride, 2)
            x = x.reshape(B, self.packs, self.filled, self.stride)
            return fit(x, self.tile_rows, 2).reshape(B, -1, self.stride)
        x = x.reshape(B, self.stride, self.packs, self.filled)
        return fit(x, self.tile_rows, 3).reshape(B, self.stride, -1)

    def unfold_rows(self, x: jax.Array) -> jax.Array:
        """Undo `fold_rows`, but for the tokens beyond T."""
        B, H = x.shape[0], self.packs * self.pack
        if self.by_token:
            x = x.reshape(B, self.packs, self.tile_rows, self.stride)
            return x[:, :, : self.filled].reshape(B, H, self.rows * self.stride)
        x = x.reshape(B, self.stride, self.packs, self.tile_rows)
        return x[..., : self.filled].reshape(B, self.stride * H, self.rows)


def forward(
    q_BRCK: jax.Array,
    k_BRCK: jax.Array,
    v_BRCV: jax.Array,
    scale: float,
    *,
    heads: int,
    strict: bool,
    by_token: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return (out_BRCV, lse); strict leaves out the query's own key.

    lse, `by_token`, is (B, H, R*S); else it is (B, C, R).
    """
    (B, R, C, K), V, dtype = q_BRCK.shape, v_BRCV.shape[-1], q_BRCK.dtype
    group = C // k_BRCK.shape[2]
    packing = Packing.of(R, C, heads, 2 if R < M else 1, by_token)
    rows, pack = packing.tile_rows, packing.pack
    last_first = tiles.tiles_of(rows)[::-1]
    # Then a finished tile leaves at once, through its own rows of q's buffer.
    early = rows % M == 0 and K == V and packing.filled == rows
    softmax = Softmax(V, scale, dtype, interpret)

    def body(q, k, v, out, lse, qs, ks, vs, qk_bar, v_bar):
        b, w = lax.axis_index("b"), lax.axis_index("warpgroup")
        block = lax.axis_index("block") * packing.warpgroups + w
        first, lse_rows = block * pack, packing.of_rows(lse, b, block)
        qs, ks, vs = qs.at[w], ks.at[w], vs.at[w]
        if packing.filled < rows:
            # Zeros, since a weight of 0 times what lies in memory may be NaN.
            vs[...] = tiles.zeros(rows, V).astype(dtype)
            plgpu.commit_smem()
        for ref, buffer, bar, share in (
            (q, qs, qk_bar, 1),
            (k, ks, qk_bar, group),
            (v, vs, v_bar, group),
        ):
            for p in range(pack):
                column = ref.at[b, :, lax.div(first + p, share)]
                plgpu.copy_gmem_to_smem(column, buffer.at[pl.ds(p * R, R)], bar.at[w])
        plgpu.barrier_wait(qk_bar.at[w])

        def attend(row, wait_for_v):
            # Key tiles from 0 on, the last one at the query tile's own rows.
            pairs, new = [], 0
            while new < row + M:
                pairs.append((min(new, row), new))
                new = pairs[-1][0] + M
            state = None
            for at in range(0, len(pairs), 2):
                some = pairs[at : at + 2]
                queries = qs.at[pl.ds(row, M)]
                scores = tiles.multiply(
                    *((queries, ks.at[pl.ds(j, M)].transpose((1, 0))) for j, _ in some)
                )
                scores = [
                    _mask(packing, s, row, *pair, strict)
                    for s, pair in zip(scores, some, strict=True)
                ]
                products = [
                    lambda p, j=j: [(p, lambda: vs.at[pl.ds(j, M)])] for j, _ in some
                ]
                wait = wait_for_v and at == 0
                state = softmax.add(
                    state,
                    scores,
                    products,
                    (lambda: plgpu.barrier_wait(v_bar.at[w])) if wait else None,
                )
            return softmax.finish(state)

        if early:
            for n, (row, _) in enumerate(last_first):
                x, y = attend(row, n == 0)
                qs[pl.ds(row, M)] = x
                lse_rows(row)[...] = y
                plgpu.commit_smem()
                size = min(M, R)
                for p in range(pack):
                    rows_out = out.at[b, pl.ds(row, size), first + p]
                    tile = qs.at[pl.ds(row + p * R, size)]
                    plgpu.copy_smem_to_gmem(tile, rows_out)
        else:
            done = [(row, attend(row, n == 0)) for n, (row, _) in enumerate(last_first)]
            # The overlapping tile is written first, the whole one over it.
            for row, (x, y) in done:
                vs[pl.ds(row, M)] = x
                lse_rows(row)[...] = y
            plgpu.commit_smem()
            for p in range(pack):
                column = out.at[b, :, first + p]
                plgpu.copy_smem_to_gmem(vs.at[pl.ds(p * R, R)], column)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_BRCV, lse = tiles.launch(
        body,
        name="columns_forward",
        out=(
            jax.ShapeDtypeStruct((B, R, C, V), dtype),
            packing.row_values(B),
        ),
        scratch=[
            tiles.swizzled((packing.warpgroups, rows, K), dtype),
            tiles.swizzled((packing.warpgroups, rows, K), dtype),
            tiles.swizzled((packing.warpgroups, rows, V), dtype),
            plgpu.Barrier(num_arrivals=2 * pack, num_barriers=packing.warpgroups),
            plgpu.Barrier(num_arrivals=pack, num_barriers=packing.warpgroups),
        ],
        grid={"b": B, "block": packing.blocks},
        threads=packing.warpgroups,
        interpret=interpret,
    )(q_BRCK, k_BRCK, v_BRCV)
    return out_BRCV, packing.unfold_rows(lse)


def _mask(packing: Packing, s, row: int, key: int, key_new: int, strict: bool):
    """Hide what lies after the query, was seen before, or is of another column."""
    if key_new == key and key + M <= row and packing.rows >= M:
        return s
    i, j = tiles.positions(s, 0) + row, tiles.positions(s, 1) + key
    j_new = key_new if key_new > key else 0
    return jnp.where(packing.sees(i, j, 0, j_new, strict), s, -jnp.inf)
