"""Decoding over a cache against the whole mask, and what a step keeps and reads."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import PATTERNS, inputs

from sparse_flax.attention import (
    Blocks,
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    Summaries,
    decode,
    parts,
    reference,
)

# B, T, H, H_kv, K, V: T no multiple of any block; grouped heads, V other than K.
SHAPES = [(2, 37, 6, 6, 8, 8), (1, 21, 4, 2, 8, 4)]
ONE_TOKEN = (1, 1, 2, 1, 4, 4)
PREFILLS = (0, 1, 7, 8, 20, 36)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="reach")
def decoded(pattern, T, q, k, v, length, reach=None):
    """Every row from `length` on, one after the other; those before it are 0."""
    group = q.shape[2] // k.shape[2]
    cache = decode.prefill(pattern, T, k, v, length, group=group)

    def one(position, carry):
        cache, out = carry
        rows = (jax.lax.dynamic_index_in_dim(x, position, 1, False) for x in (q, k, v))
        row, cache = decode.step(cache, *rows, position, reach=reach)
        return cache, out.at[:, position].set(row)

    out = jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
    return jax.lax.fori_loop(length, q.shape[1], one, (cache, out))[1]


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        *itertools.product(PATTERNS, SHAPES),
        *((pattern, ONE_TOKEN) for pattern in PATTERNS[-2:]),
    ],
    ids=str,
)
def test_equals_the_mask_at_every_position_after_any_prefill(pattern, shape):
    q, k, v, _ = inputs(shape)
    T, scale = shape[1], shape[4] ** -0.5
    expected = np.asarray(reference.attend(q, k, v, pattern, scale))
    for length in PREFILLS:
        if length < T:
            got = np.asarray(decoded(pattern, T, q, k, v, length))
            np.testing.assert_allclose(
                got[:, length:], expected[:, length:], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    "pattern", [Dense(), Strided(6), Fixed(8, 2, rotate=True)], ids=str
)
def test_reads_no_further_than_it_has_to(pattern):
    q, k, v, _ = inputs((1, 21, 4, 2, 8, 4))
    expected = reference.attend(q, k, v, pattern, 8**-0.5)
    got = decoded(pattern, 300, q, k, v, 3, reach=21)
    np.testing.assert_allclose(got[:, 3:], expected[:, 3:], atol=1e-5, rtol=1e-5)
    assert sum(read(pattern, T=3000, reach=21)) == sum(read(pattern, T=21))


def test_keeps_no_summary_that_no_query_sees():
    """The last block's own, where T is a whole number of blocks."""
    assert read(Fixed(8, 2), T=24) == read(Fixed(8, 2), T=3000, reach=24) == [8 + 2 * 2]


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.2])
def test_scale_is_used(scale):
    q, k, v, _ = inputs((2, 9, 4, 2, 8, 4))
    expected = reference.attend(q, k, v, Local(5), scale)[:, 8]
    cache = decode.prefill(Local(5), 9, k, v, 8, group=2)
    got, _ = decode.step(cache, q[:, 8], k[:, 8], v[:, 8], 8, scale=scale)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_reach_beyond_the_last_token_is_the_whole():
    q, k, v, _ = inputs((1, 21, 4, 2, 8, 4))
    for pattern in (Dense(), Strided(6), Fixed(8, 2)):
        expected = reference.attend(q, k, v, pattern, 8**-0.5)
        got = decoded(pattern, 21, q, k, v, 20, reach=100)
        np.testing.assert_allclose(got[:, 20], expected[:, 20], atol=1e-5)


@pytest.mark.parametrize("pattern", [Dense(), Strided(4), Fixed(8, 2)], ids=str)
def test_64_bit_types_may_be_on(pattern):
    q, k, v, _ = inputs(SHAPES[1])
    expected = reference.attend(q, k, v, pattern, q.shape[3] ** -0.5)
    jax.config.update("jax_enable_x64", True)
    try:
        out = decoded(pattern, q.shape[1], q, k, v, 5)
    finally:
        jax.config.update("jax_enable_x64", False)
    np.testing.assert_allclose(out[:, 5:], expected[:, 5:], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "union",
    [
        (parts.Self(), parts.Columns(4, strict=True)),
        (parts.Columns(4, strict=True), parts.Columns(6, strict=True)),
    ],
    ids=str,
)
def test_a_union_without_a_store_is_refused(union):
    class Own(Dense):
        def parts(self, head=0):
            return union

    k = jnp.ones((1, 8, 1, 4))
    with pytest.raises(NotImplementedError, match=r"nothing for .* add it to stores"):
        decode.prefill(Own(), 8, k, k, 3)


def test_a_cache_of_other_heads_is_refused():
    q, k, v, _ = inputs(SHAPES[1])  # two query heads to a key head
    row = q[:, 3], k[:, 3], v[:, 3]
    cache = decode.prefill(Fixed(4, 1, rotate=True), 21, k[:, :3], v[:, :3], 3)
    with pytest.raises(ValueError, match="group=2"):
        decode.step(cache, *row, 3)
    with pytest.raises(ValueError, match="try T=21"):
        decode.prefill(Dense(), 20, k, v, 3, group=2)
    with pytest.raises(ValueError, match="1 rows"):
        cache = decode.prefill(Dense(), 21, k, v, 3, group=2)
        decode.step(cache, *(jnp.concatenate([x, x]) for x in row), 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_are_float32_whatever_the_dtype(dtype):
    """Products of q and k beyond float16, and sums that bfloat16 would round away."""
    q, k, v, _ = inputs((1, 9, 2, 2, 8, 8), dtype=dtype)
    q, k = q * 300, k.at[:, :, :, 0].set(300)
    expected = reference.attend(q, k, v, Dense(), 8**-0.5)
    got = decoded(Dense(), 9, q, k, v, 0)
    assert got.dtype == dtype
    one_rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), atol=3 * one_rounding
    )


# ---- What is kept and what is read -------------------------------------------------

# Pattern, keys kept, keys read in a step; T is 1000, the window 64, summaries 8.
ALL, BLOCKS, ROWS = 1000, 15, 16
COSTS = [
    (Dense(), [ALL], [ALL]),
    (Local(64), [64], [64]),
    (Local(5000), [ALL], [ALL]),
    (Blocks(64), [64], [64]),
    (Summaries(64, 8), [1 + 8 * BLOCKS], [1 + 8 * BLOCKS]),
    (Fixed(64, 8), [64 + 8 * BLOCKS], [64 + 8 * BLOCKS]),
    (Fixed(64, 8, rotate=True), [64 + 8 * BLOCKS], [64 + 8 * BLOCKS]),
    (Columns(64), [64 * ROWS], [ROWS]),
    (Strided(64), [64 * ROWS], [64, ROWS]),
    (PerHead((Local(64), Columns(64))), [64, 64 * ROWS], [64, ROWS]),
]


def one_step(pattern, T, reach=None):
    """The cache of an empty prompt for 8 heads, and the jaxpr of a step over it."""
    q, k, v = (jax.ShapeDtypeStruct((2, 8, width), jnp.float32) for width in (4, 4, 6))
    none = (jax.ShapeDtypeStruct((2, 0, *x.shape[1:]), x.dtype) for x in (k, v))
    prefill = functools.partial(decode.prefill, pattern, T)
    cache = jax.eval_shape(prefill, *none, 0)
    jaxpr = jax.make_jaxpr(functools.partial(decode.step, reach=reach))(
        cache, q, k, v, 0
    )
    return cache, jaxpr.jaxpr


def read(pattern, T, reach=None):
    """How many places of a cache the products of queries and keys are over."""
    _, jaxpr = one_step(pattern, T, reach)
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "mul"]
    shapes = [eqn.outvars[0].aval.shape for eqn in products]
    return [shape[3] for shape in shapes if len(shape) == 5 and shape[-1] == 4]


@pytest.mark.parametrize(("pattern", "kept", "taken"), COSTS, ids=lambda x: str(x))
def test_keeps_and_reads_what_the_pattern_sees(pattern, kept, taken):
    cache, jaxpr = one_step(pattern, T=1000)
    assert [x.shape[2] for x in cache.kv] == kept
    assert all(x.shape[-1] == 4 + 6 for x in cache.kv)
    assert read(pattern, T=1000) == taken
    # Whatever else has the size of a cache is a view of it, or it with a row written.
    sizes = {x.size for x in cache.kv}
    others = {
        eqn.primitive.name
        for eqn in jaxpr.eqns
        for out in eqn.outvars
        if out.aval.size in sizes and out.aval.shape[-1] == 4 + 6
    }
    views = {"reshape", "slice", "squeeze", "broadcast_in_dim", "dynamic_slice"}
    assert others <= views | {"dynamic_update_slice", "scatter"}
