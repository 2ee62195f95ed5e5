"""Attention kernels on the GPU they are for; run with `pytest -m gpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax.attention import Columns, Local, PerHead, Strided, hopper, reference

pytestmark = pytest.mark.gpu

# Pattern, (B, T, H, H_kv, K, V): each kernel, tile rows of every kind, odd lengths.
CASES = [
    (Strided(128), (1, 12288, 1, 1, 64, 64)),  # rows 96
    (Strided(96), (2, 3072, 2, 2, 128, 128)),  # rows 32, two warpgroups
    (Strided(96), (2, 3072, 2, 2, 64, 128)),
    (Strided(256), (1, 4096, 2, 2, 64, 64)),  # rows 16, four columns a tile, ring
    (Columns(16), (1, 4096, 2, 2, 64, 64)),  # rows 256, long columns
    (Columns(8), (2, 1500, 2, 2, 64, 64)),  # rows 188, padded to 192
    (Columns(50), (2, 2400, 1, 1, 64, 64)),  # rows 48, zeroed tile
    (Columns(100), (2, 2400, 3, 3, 64, 64)),  # rows 24
    (Columns(32), (1, 4096, 2, 2, 128, 128)),  # rows 128
    (Local(100), (2, 1500, 4, 4, 64, 64)),
    (Local(256), (1, 2000, 2, 2, 128, 128)),
    (Local(512), (1, 2048, 2, 2, 64, 64)),
    (Strided(60), (2, 1500, 8, 2, 64, 64)),  # grouped queries, padding both ways
    (Strided(128), (1, 4096, 4, 4, 32, 32)),
    (PerHead((Local(64), Columns(64))), (1, 4096, 4, 2, 64, 64)),
]


@pytest.fixture(autouse=True)
def _on_a_hopper_gpu():
    why = hopper.runs_on(jax.devices()[0].device_kind)
    if why:
        pytest.skip(why)


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


def errors(got, exact_run, args):
    """Relative 2-norms of the errors of out, dq, dk and dv."""
    with jax.default_matmul_precision("highest"):
        exact = value_and_gradients(exact_run)(*(x.astype(jnp.float32) for x in args))
    return [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(got, exact, strict=True)
    ]


def cudnn_errors(args):
    """What cuDNN's dense attention makes of the same q, k, v and gradient."""
    width = min(x.shape[-1] for x in args)  # cuDNN wants one
    args = [x[..., :width] for x in args]
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    got = value_and_gradients(functools.partial(dense, implementation="cudnn"))(*args)
    return errors(got, functools.partial(dense, implementation="xla"), args)


def poison(args):
    """Leave NaN in freed memory, where the next outputs will lie."""
    nans = [jnp.full(x.shape, jnp.nan, x.dtype) for x in args for _ in range(20)]
    jax.block_until_ready(nans)


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype"),
    [(*case, "bfloat16") for case in CASES] + [(*CASES[i], "float16") for i in (0, 4)],
    ids=str,
)
def test_hopper_is_as_exact_as_cudnn_and_repeats_bit_for_bit(pattern, shape, dtype):
    seed = int(np.random.default_rng().integers(2**31))
    args = inputs(shape, dtype, seed)
    kwargs = {"pattern": pattern, "scale": shape[4] ** -0.5}
    run = value_and_gradients(functools.partial(hopper.attend, **kwargs))
    poison(args)
    first = run(*args)
    got = errors(first, functools.partial(reference.attend, **kwargs), args)
    ratios = [a / b for a, b in zip(got, cudnn_errors(args), strict=True)]
    print(pattern, shape, dtype, *(f"{a:.1e} ({b:.2f})" for a, b in zip(got, ratios)))
    assert max(ratios) <= 1.5, (seed, got, ratios)
    for _ in range(20):
        poison(args[:1])
        same = [jnp.array_equal(a, b) for a, b in zip(first, run(*args), strict=True)]
        assert all(same)


def test_hopper_in_checkpoint_scan_and_vmap():
    args = inputs((2, 2048, 2, 2, 64, 64), "bfloat16", 0)
    attend = functools.partial(hopper.attend, pattern=Strided(64), scale=0.125)
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
