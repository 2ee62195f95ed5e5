"""Attention kernels on the GPU they are for; run with `pytest -m gpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax.attention import (
    Blocks,
    Columns,
    Fixed,
    Local,
    PerHead,
    Strided,
    Summaries,
    hopper,
    reference,
)

pytestmark = pytest.mark.gpu

# B, T, H, H_kv, K, V: few shapes, since each costs a cuDNN and two dense compilations.
SHAPE = (2, 3072, 2, 2, 64, 64)
WIDE = (2, 3072, 2, 2, 128, 128)
HALF = (2, 3072, 2, 2, 64, 128)
NARROW = (2, 3072, 2, 2, 32, 32)
ODD = (2, 3070, 4, 2, 64, 64)  # grouped queries, and padding
NARROW_ODD = (2, 3070, 4, 2, 32, 32)

CASES = [
    (Strided(32), SHAPE, "bfloat16"),  # 96 rows: tiles overlap
    (Strided(32), SHAPE, "float16"),
    (Strided(192), SHAPE, "bfloat16"),  # 16 rows, four columns a tile; the ring
    (Columns(12), SHAPE, "bfloat16"),  # 256 rows: long columns
    (Columns(12), SHAPE, "float16"),
    (Columns(64), SHAPE, "bfloat16"),  # 48 rows: a tile filled up with zeros
    (Columns(128), SHAPE, "bfloat16"),  # 24 rows: the same, two columns a tile
    (Local(100), SHAPE, "bfloat16"),
    (Local(512), SHAPE, "bfloat16"),
    (Strided(96), WIDE, "bfloat16"),  # 32 rows, two warpgroups
    (Columns(24), WIDE, "bfloat16"),  # 128 rows
    (Local(256), WIDE, "bfloat16"),
    (Strided(96), HALF, "bfloat16"),
    (Strided(128), NARROW, "bfloat16"),
    (Strided(32), NARROW, "float16"),  # 96 rows
    (Strided(192), NARROW, "bfloat16"),  # 16 rows; the ring
    (Columns(128), NARROW, "bfloat16"),  # 24 rows
    (Columns(17), NARROW_ODD, "bfloat16"),  # 181 rows: backward, they walk
    (Fixed(128, 32, rotate=True), NARROW, "bfloat16"),
    (Strided(60), ODD, "bfloat16"),  # 52 rows, padded to 56
    (Columns(17), ODD, "bfloat16"),  # 181 rows, padded to 192
    (Columns(6), SHAPE, "bfloat16"),  # 512 rows: they walk through a ring
    (Columns(5), ODD, "float16"),  # 614 rows, padded to 640
    (Columns(8), NARROW_ODD, "bfloat16"),  # 384 rows
    (Columns(12), WIDE, "bfloat16"),  # 256 rows
    (Columns(12), HALF, "bfloat16"),
    (Local(1024), SHAPE, "bfloat16"),
    (Local(1000), ODD, "float16"),
    (Local(700), WIDE, "bfloat16"),
    (Local(600), NARROW, "bfloat16"),
    (Strided(3), SHAPE, "bfloat16"),  # 1024 rows
    (Strided(1), ODD, "bfloat16"),  # both halves walk: 3070 rows, a window of 1
    (Strided(2048), ODD, "bfloat16"),  # 2 rows; only the window walks
    (PerHead((Local(64), Columns(64))), ODD, "bfloat16"),
    (Fixed(128, 32), SHAPE, "bfloat16"),
    (Fixed(128, 32, rotate=True), ODD, "bfloat16"),
    (Fixed(128, 32), WIDE, "bfloat16"),
    (Blocks(128), SHAPE, "float16"),
    (Summaries(128, 8, offset=1), SHAPE, "bfloat16"),
]


@pytest.fixture(autouse=True)
def _on_a_hopper_gpu():
    why = hopper.runs_on(jax.devices()[0].device_kind)
    if why:
        pytest.skip(why)


@pytest.fixture(scope="module")
def seed():
    """Fresh inputs every time; a failure prints it."""
    return int(np.random.default_rng().integers(2**31))


def inputs(shape, dtype, seed):
    B, T, H, H_kv, K, V = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, H, K), (B, T, H_kv, K), (B, T, H_kv, V), (B, T, H, V)]
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def value_and_gradients(run):
    def call(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(d_out)

    return jax.jit(call)


def exact(run, args):
    """The same in float32."""
    args = [x.astype(jnp.float32) for x in args]
    with jax.default_matmul_precision("highest"):
        lowered = value_and_gradients(run).lower(*args)
    # Looking for the fastest way takes far longer than the slowest.
    return lowered.compile({"xla_gpu_autotune_level": 0})(*args)


def errors(got, want):
    """Relative 2-norms of the errors of out, dq, dk and dv."""
    pairs = [
        (np.asarray(a, np.float32), np.asarray(b))
        for a, b in zip(got, want, strict=True)
    ]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@functools.cache
def cudnn_errors(shape, dtype, seed):
    """What cuDNN's dense attention makes of the same q, k, v and gradient."""
    width = min(shape[4:])  # cuDNN wants one
    args = [x[..., :width] for x in inputs(shape, dtype, seed)]
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    got = value_and_gradients(functools.partial(dense, implementation="cudnn"))(*args)
    return errors(got, exact(functools.partial(dense, implementation="xla"), args))


def poison(args):
    """Leave NaN in freed memory, where the next outputs will lie."""
    nans = [jnp.full(x.shape, jnp.nan, x.dtype) for x in args for _ in range(20)]
    jax.block_until_ready(nans)


@pytest.mark.parametrize(("pattern", "shape", "dtype"), CASES, ids=str)
def test_hopper_is_as_exact_as_cudnn_and_repeats_bit_for_bit(
    pattern, shape, dtype, seed
):
    args = inputs(shape, dtype, seed)
    kwargs = {"pattern": pattern, "scale": shape[4] ** -0.5}
    run = value_and_gradients(functools.partial(hopper.attend, **kwargs))
    poison(args)
    first = run(*args)
    got = errors(first, exact(functools.partial(reference.attend, **kwargs), args))
    ratios = np.array(got) / np.array(cudnn_errors(shape, dtype, seed))
    print(f"{pattern} {shape} {dtype}: errors {got}, {ratios} of cuDNN's")
    assert ratios.max() <= 1.5, (seed, got, ratios)
    for _ in range(20):
        poison(args[:1])
        for a, b in zip(first, run(*args), strict=True):
            np.testing.assert_array_equal(a, b)


def check_in_checkpoint_scan_and_vmap(attend, T):
    """That transformations of attend(q, k, v) give what calls one by one give."""
    args = inputs((2, T, 2, 2, 64, 64), "bfloat16", 0)
    keep = jax.checkpoint_policies.save_only_these_names(
        "attention_out", "attention_lse"
    )

    def scanned(q, k, v):
        def layer(q, _):
            return jax.checkpoint(attend, policy=keep)(q, k, v), None

        return jax.lax.scan(layer, q, None, length=3)[0]

    def unrolled(q, k, v):
        return attend(attend(attend(q, k, v), k, v), k, v)

    def mapped(q, k, v):
        return jax.vmap(lambda *x: attend(*(y[None] for y in x))[0])(q, k, v)

    for one, other in ((scanned, unrolled), (mapped, attend)):
        pairs = zip(
            value_and_gradients(one)(*args),
            value_and_gradients(other)(*args),
            strict=True,
        )
        for a, b in pairs:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            assert jnp.linalg.norm(a - b) <= 2e-2 * jnp.linalg.norm(b)


def test_hopper_in_checkpoint_scan_and_vmap():
    attend = functools.partial(hopper.attend, pattern=Strided(64), scale=0.125)
    check_in_checkpoint_scan_and_vmap(attend, T=2048)
