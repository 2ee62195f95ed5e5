"""Mosaic GPU kernels for Hopper: attention to the own block and to earlier summaries.

Forward: a block of threads takes 64 query rows a warpgroup and walks the summary keys
of all earlier blocks in tiles, which stream through a ring of buffers; then the own
block. Backward: `summary_gradients` walks the later queries of a tile of summary keys;
`block_gradients` walks as the forward does for dq, and makes dk and dv of the own
block, which no other block of threads touches, adding those of its summary rows. So
each gradient has one writer: no atomics, and the same bits every time.

Summary keys are numbered by slot: slot = block * summary + place in the slice. Tiles of
slots are copied straight out of k and v, a piece of a slice at a time.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparse_flax.attention.hopper import tiles
from sparse_flax.attention.hopper.tiles import LAYOUT, LOG2E, M

# Below every score and far above -inf: differences of it stay finite, so that no row
# sum, rescaling or contracted multiply-add makes a NaN.
LOWEST = -1e20


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which keys a query sees; `block` and `summary` as in the patterns.

    summary is 0 where no summaries are seen. Head h takes the slice `offset`, or
    h mod (block / summary) with rotate. With self_only, the own block is only the
    query's own token.
    """

    block: int
    summary: int = 0
    offset: int = 0
    rotate: bool = False
    self_only: bool = False

    def slice_start(self, head):
        """First row, inside a block, of the slice that a head sees."""
        offset = self.offset
        if self.rotate:
            offset = lax.rem(head, jnp.int32(self.block // self.summary))
        return self.block - (offset + 1) * self.summary

    def slot_row(self, slot, head):
        """Row of the sequence where the summary key of a slot lies."""
        block, place = lax.div(slot, self.summary), lax.rem(slot, self.summary)
        return block * self.block + self.slice_start(head) + place


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is tuned: warpgroups, keys (or queries) of a tile, buffers of the ring.

    A buffer is filled again `lag` steps after its use: the warpgroup that loads waits
    for the slowest one only when it is so many steps ahead.
    """

    warpgroups: int = 2
    columns: int = 64
    stages: int = 4
    lag: int = 2


def _turned(ref):
    return ref.transpose((1, 0))


def products(pairs, interpret):
    """Return a @ b^T in float32 for every (a, b); b lies in shared memory."""
    if interpret:
        return [_dot(a[...], b[...].T) for a, b in pairs]

    def run(accs):
        for acc, (a, b) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, a, _turned(b))
        return [acc[...] for acc in accs]

    shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
    return pl.run_scoped(run, [plgpu.ACC(shape, jnp.float32) for shape in shapes])


def add_products(sums, pairs, interpret):
    """Return x + a @ b for every x and (a, b): a in registers, b in shared memory."""
    if interpret:
        return [x + _dot(a, b()[...]) for x, (a, b) in zip(sums, pairs, strict=True)]

    def run(accs):
        for acc, (a, b) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, a, b())

    return pl.run_state(run)([plgpu.ACC.init(x) for x in sums])


def _dot(a, b):
    # The interpreter knows no wgmma with an operand in registers.
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))


def ring(issue, free, total, cut):
    """Return (start, refill, release) that keep a ring of `cut.stages` buffers full.

    issue(j, slot) copies what step j needs. start() goes first, in the warpgroup that
    loads; refill(j) at the start of its steps; release(j) at the end of everybody's.
    """

    def start():
        @pl.loop(0, jnp.minimum(total, cut.stages))
        def _(j):
            issue(j, j)

    def refill(j):
        used = j - cut.lag

        @pl.when((used >= 0) & (used + cut.stages < total))
        def _():
            slot = lax.rem(used, cut.stages)
            plgpu.barrier_wait(free.at[slot])
            issue(used + cut.stages, slot)

    def release(j):
        @pl.when(j + cut.stages < total)
        def _():
            plgpu.barrier_arrive(free.at[lax.rem(j, cut.stages)])

    return start, refill, release


def forward(q_BTHK, k_BTHK, v_BTHK, walk: Walk, scale, cut: Cut, interpret=False):
    """Return out_BTHK and lse_BHT (natural logarithm, float32); T in whole tiles."""
    B, T, H, K = q_BTHK.shape
    dtype, group = q_BTHK.dtype, H // k_BTHK.shape[2]
    W, N, S, C = cut.warpgroups, cut.columns, walk.block, walk.summary
    Q = W * M
    # Tiles of the own blocks of a thread block's rows, which may begin inside a block.
    own = max(S, Q) // M
    piece = min(C, N) or N
    factor = scale * LOG2E

    def body(q, k, v, out, lse, qs, own_k, own_v, ks, vs, q_bar, own_bar, full, free):
        b, h, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        kv = lax.div(h, group)
        t0 = (T // Q - 1 - lax.axis_index("tile")) * Q  # the longest walks go first
        row = t0 + w * M
        first, mine = lax.div(t0, S), lax.div(row, S)
        whole, total = lax.div(first * C, N), pl.cdiv(lax.div(t0 + Q - 1, S) * C, N)

        def issue(j, slot):
            for i in range(N // piece):
                at = walk.slot_row(j * N + i * piece, h)
                at = (b, pl.ds(jnp.minimum(at, T - piece), piece), kv)
                to = pl.ds(i * piece, piece)
                plgpu.copy_gmem_to_smem(k.at[at], ks.at[slot, to], full.at[slot])
                plgpu.copy_gmem_to_smem(v.at[at], vs.at[slot, to], full.at[slot])

        start, refill, release = ring(issue, free, total, cut)
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

        def attend(carry, keys, values, mask):
            acc, top, total = carry
            (s,) = products([(queries, keys)], interpret)
            s = mask(s)
            new = jnp.maximum(top, s.max(axis=1) * factor)
            shrink = jnp.exp2(top - new)
            p = jnp.exp2(s * factor - tiles.per_row(new, s))
            total = total * shrink + p.sum(axis=1)
            acc = acc * tiles.per_row(shrink, acc)
            (acc,) = add_products([acc], [(p.astype(dtype), values)], interpret)
            return acc, new, total

        def summaries(masked):
            def step(j, carry):
                slot = lax.rem(j, cut.stages)
                pl.when(w == 0)(lambda: refill(j))
                plgpu.barrier_wait(full.at[slot])

                def mask(s):
                    if not masked:
                        return s
                    return jnp.where(
                        tiles.positions(s, 1) < mine * C - j * N, s, -jnp.inf
                    )

                carry = attend(carry, ks.at[slot], lambda: vs.at[slot], mask)
                release(j)
                return carry

            return step

        def own_block(a, carry):
            def mask(s):
                i = tiles.positions(s, 0) + (row - first * S - a * M)
                j = tiles.positions(s, 1)
                return jnp.where(i == j if walk.self_only else i >= j, s, -jnp.inf)

            return attend(carry, own_k.at[a], lambda: own_v.at[a], mask)

        row_vector = functools.partial(jnp.full, (M,), dtype=jnp.float32)
        top, total_p = (
            plgpu.layout_cast(row_vector(x), LAYOUT.reduce(1)) for x in (LOWEST, 0.0)
        )
        carry = (tiles.zeros(M, K), top, total_p)
        if C:
            carry = lax.fori_loop(0, whole, summaries(masked=False), carry)
            carry = lax.fori_loop(whole, total, summaries(masked=True), carry)
        plgpu.barrier_wait(own_bar)
        place = lax.div(row - first * S, M)
        since = place if walk.self_only else lax.div((mine - first) * S, M)
        acc, top, total_p = lax.fori_loop(since, place + 1, own_block, carry)
        lse[b, h, pl.ds(row, M)] = (top + jnp.log2(total_p)) * (1 / LOG2E)
        qs[w] = (acc * tiles.per_row(1 / total_p, acc)).astype(dtype)
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
            plgpu.Barrier(num_arrivals=2 * (N // piece), num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
        ],
        grid={"batch": B, "tile": T // Q, "head": H},
        threads=W,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHK)


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
    piece, per_block, end = min(C, M), S // N, T // N
    rows = slots(T, walk, cut)
    factor = scale * LOG2E

    def body(q, k, v, d_out, lse, delta, dk, dv, *scratch):
        ks, vs, qs, d_outs, lses, deltas, kv_bar, full, free = scratch
        b, h, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        kv = lax.div(h, group)
        slot0 = lax.axis_index("tile") * (W * M)  # the longest walks go first
        mine = slot0 + w * M

        def later(slot):  # the first query tile that sees this many slots
            return jnp.minimum(slot * per_block, end)

        begin = later(lax.div(slot0, C) + 1)
        since, whole = later(lax.div(mine, C) + 1), later(pl.cdiv(mine + M, C))

        def issue(j, slot):
            t = pl.ds((begin + j) * N, N)
            bar = full.at[slot]
            plgpu.copy_gmem_to_smem(q.at[b, t, h], qs.at[slot], bar)
            plgpu.copy_gmem_to_smem(d_out.at[b, t, h], d_outs.at[slot], bar)
            plgpu.copy_gmem_to_smem(lse.at[b, h, t], lses.at[slot], bar)
            plgpu.copy_gmem_to_smem(delta.at[b, h, t], deltas.at[slot], bar)

        start, refill, release = ring(issue, free, end - begin, cut)
        for i in range(M // piece):
            at = walk.slot_row(mine + i * piece, h)
            at = (b, pl.ds(jnp.minimum(at, T - piece), piece), kv)
            to = pl.ds(i * piece, piece)
            plgpu.copy_gmem_to_smem(k.at[at], ks.at[w, to], kv_bar.at[w])
            plgpu.copy_gmem_to_smem(v.at[at], vs.at[w, to], kv_bar.at[w])
        pl.when(w == 0)(start)
        plgpu.barrier_wait(kv_bar.at[w])
        keys, values = ks.at[w], vs.at[w]

        def walked(needed, masked=False):
            def step(j, carry):
                slot = lax.rem(j, cut.stages)
                pl.when(w == 0)(lambda: refill(j))
                plgpu.barrier_wait(full.at[slot])
                if needed:

                    def mask(s):
                        if not masked:
                            return s
                        seen = lax.div(begin + j, per_block) * C - mine
                        return jnp.where(tiles.positions(s, 0) < seen, s, -jnp.inf)

                    carry = add_key_gradients(
                        carry,
                        (keys, values),
                        tuple(x.at[slot] for x in (qs, d_outs, lses, deltas)),
                        mask,
                        factor,
                        dtype,
                        interpret,
                    )
                release(j)
                return carry

            return step

        sums = (tiles.zeros(M, K), tiles.zeros(M, K))
        lax.fori_loop(0, since - begin, walked(needed=False), 0)
        sums = lax.fori_loop(since - begin, whole - begin, walked(True, True), sums)
        sums = lax.fori_loop(whole - begin, end - begin, walked(True), sums)
        ks[w] = (sums[0] * scale).astype(dtype)
        vs[w] = sums[1].astype(dtype)
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
            plgpu.Barrier(num_arrivals=2 * (M // piece), num_barriers=W),
            plgpu.Barrier(num_arrivals=4, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
        ],
        grid={"batch": B, "tile": (rows - 2 * M) // (W * M), "head": H},
        threads=W,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, lse_BHT, delta_BHT)


def add_key_gradients(sums, own, others, mask, factor, dtype, interpret):
    """Add to (dk / scale, dv) of the own keys what a tile of queries gives."""
    queries, d_out, lse, delta = others
    s, dp = products(list(zip(own, (queries, d_out), strict=True)), interpret)
    p = _column_weights(mask(s), lse, factor)
    ds = _column_slopes(p, dp, delta).astype(dtype)
    pairs = [(ds, lambda: queries), (p.astype(dtype), lambda: d_out)]
    return tuple(add_products(sums, pairs, interpret))


def _column_weights(s, lse, factor):
    lse = plgpu.load(lse, layout=LAYOUT.reduce(0)) * LOG2E
    return jnp.exp2(s * factor - tiles.per_column(lse, s))


def _column_slopes(p, dp, delta):
    delta = plgpu.load(delta, layout=LAYOUT.reduce(0))
    return p * (dp - tiles.per_column(delta, dp))


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
    piece = min(C, N) or N
    factor = scale * LOG2E

    def body(q, k, v, d_out, lse, delta, *refs):
        (sum_k, sum_v), refs = (refs[:2], refs[2:]) if C else ((None, None), refs)
        dq, dk, dv, qs, d_outs, own_k, own_v, lses, deltas, ks, vs, *refs = refs
        own_bar, full, free, done = refs
        b, h, w = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        kv = lax.div(h, group)
        t0 = (T // Q - 1 - lax.axis_index("tile")) * Q  # the longest walks go first
        row = t0 + w * M
        first, mine = lax.div(t0, S), lax.div(row, S)
        whole, total = lax.div(first * C, N), pl.cdiv(lax.div(t0 + Q - 1, S) * C, N)

        def issue(j, slot):
            for i in range(N // piece):
                at = walk.slot_row(j * N + i * piece, h)
                at = (b, pl.ds(jnp.minimum(at, T - piece), piece), kv)
                to = pl.ds(i * piece, piece)
                plgpu.copy_gmem_to_smem(k.at[at], ks.at[slot, to], full.at[slot])
                plgpu.copy_gmem_to_smem(v.at[at], vs.at[slot, to], full.at[slot])

        start, refill, release = ring(issue, free, total, cut)
        here = pl.ds(row, M)
        for ref, buffer, head in (
            (q, qs, h),
            (d_out, d_outs, h),
            (k, own_k, kv),
            (v, own_v, kv),
        ):
            plgpu.copy_gmem_to_smem(ref.at[b, here, head], buffer.at[w], own_bar)
        plgpu.copy_gmem_to_smem(lse.at[b, h, here], lses.at[w], own_bar)
        plgpu.copy_gmem_to_smem(delta.at[b, h, here], deltas.at[w], own_bar)
        if C:
            pl.when(w == 0)(start)
        plgpu.barrier_wait(own_bar)
        queries, d_outs_held = qs.at[w], d_outs.at[w]
        lse_row = plgpu.load(lses.at[w], layout=LAYOUT.reduce(1)) * LOG2E
        delta_row = plgpu.load(deltas.at[w], layout=LAYOUT.reduce(1))

        def add_query_gradients(acc, keys, values, mask):
            pairs = [(queries, keys()), (d_outs_held, values())]
            s, dp = products(pairs, interpret)
            p = jnp.exp2(mask(s) * factor - tiles.per_row(lse_row, s))
            ds = (p * (dp - tiles.per_row(delta_row, dp))).astype(dtype)
            return add_products([acc], [(ds, keys)], interpret)[0]

        def summaries(masked):
            def step(j, acc):
                slot = lax.rem(j, cut.stages)
                pl.when(w == 0)(lambda: refill(j))
                plgpu.barrier_wait(full.at[slot])

                def mask(s):
                    if not masked:
                        return s
                    return jnp.where(
                        tiles.positions(s, 1) < mine * C - j * N, s, -jnp.inf
                    )

                keys, values = lambda: ks.at[slot], lambda: vs.at[slot]
                acc = add_query_gradients(acc, keys, values, mask)
                release(j)
                return acc

            return step

        def causal(s, keys, queries, key_tile, query_tile):
            i = tiles.positions(s, queries) + query_tile * M
            j = tiles.positions(s, keys) + key_tile * M
            return jnp.where(i == j if walk.self_only else i >= j, s, -jnp.inf)

        def own_queries(a, acc):
            mask = functools.partial(
                causal, keys=1, queries=0, key_tile=a, query_tile=w
            )
            keys, values = lambda: own_k.at[a], lambda: own_v.at[a]
            return add_query_gradients(acc, keys, values, mask)

        def own_key_scores(t, with_values):
            pairs = [(own_k.at[w], qs.at[t]), (own_v.at[w], d_outs.at[t])]
            s, *dp = products(pairs[: 1 + with_values], interpret)
            s = causal(s, keys=0, queries=1, key_tile=w, query_tile=t)
            return _column_weights(s, lses.at[t], factor), *dp

        def own_dk(t, dk):
            p, dp = own_key_scores(t, True)
            ds = _column_slopes(p, dp, deltas.at[t]).astype(dtype)
            return add_products([dk], [(ds, lambda: qs.at[t])], interpret)[0]

        def own_dv(t, dv):
            (p,) = own_key_scores(t, False)
            pairs = [(p.astype(dtype), lambda: d_outs.at[t])]
            return add_products([dv], pairs, interpret)[0]

        def from_summaries(ref):
            # Row i of the tile lies in slot mine * C + ahead + i, if in the slice.
            ahead = row - mine * S - walk.slice_start(h)
            at = jnp.clip(M + mine * C + ahead, 0, ref.shape[1] - M)
            at = (b, pl.ds(at, M), h)
            x = plgpu.load(ref.at[at], layout=LAYOUT, optimized=False)
            i = tiles.positions(x, 0) + ahead
            return jnp.where((i >= 0) & (i < C), x.astype(jnp.float32), 0.0)

        def leave(x, buffer, ref):
            buffer[...] = x.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, ref.at[b, here, h])

        acc = tiles.zeros(M, K)
        if C:
            acc = lax.fori_loop(0, whole, summaries(masked=False), acc)
            acc = lax.fori_loop(whole, total, summaries(masked=True), acc)
        since = w if walk.self_only else lax.div((mine - first) * S, M)
        until = w + 1 if walk.self_only else since + S // M
        acc = lax.fori_loop(since, w + 1, own_queries, acc)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        # Nobody reads the ring any more, nor another's own keys: they carry results.
        # dk and dv are made one after the other, for want of registers.
        leave(acc * scale, ks.at[w, pl.ds(0, M)], dq)
        x = lax.fori_loop(w, until, own_dk, tiles.zeros(M, K)) * scale
        leave(x + from_summaries(sum_k) if C else x, own_v.at[w], dk)
        x = lax.fori_loop(w, until, own_dv, tiles.zeros(M, K))
        leave(x + from_summaries(sum_v) if C else x, own_k.at[w], dv)
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
            plgpu.Barrier(num_arrivals=6 * W),
            plgpu.Barrier(num_arrivals=2 * (N // piece), num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=cut.stages),
            plgpu.Barrier(num_arrivals=W),
        ],
        grid={"batch": B, "tile": T // Q, "head": H},
        threads=W,
        interpret=interpret,
    )(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, lse_BHT, delta_BHT, *(summed or ()))
