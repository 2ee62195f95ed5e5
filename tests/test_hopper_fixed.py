"""Hopper's kernels for fixed patterns, interpreted on a CPU, against the dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax.attention import Blocks, Fixed, Summaries, hopper, reference

if jax.__version_info__ < (0, 11):
    pytest.skip(
        "Pallas has no Mosaic GPU interpreter before jax 0.11", allow_module_level=True
    )

from sparse_flax.attention.hopper import fixed


def _relative_errors(
    pattern, T, H=1, key_heads=1, K=64, V=64, dtype=jnp.bfloat16, scale=None
):
    keys = jax.random.split(jax.random.key(T), 4)
    shapes = (1, T, H, K), (1, T, key_heads, K), (1, T, key_heads, V), (1, T, H, V)
    q, k, v, d_out = (
        jax.random.normal(*x, dtype) for x in zip(keys, shapes, strict=True)
    )
    scale = K**-0.5 if scale is None else scale

    def run(q, k, v):
        return fixed.attend(q, k, v, pattern, scale, interpret=True)

    def truth(q, k, v):
        return reference.attend(q, k, v, pattern, scale)

    out, gradient = jax.vjp(run, q, k, v)
    assert out.dtype == dtype
    exact, exact_gradient = jax.vjp(truth, *(x.astype(jnp.float32) for x in (q, k, v)))
    pairs = [
        (out, exact),
        *zip(gradient(d_out), exact_gradient(d_out.astype(jnp.float32)), strict=True),
    ]
    norm = np.linalg.norm
    return [norm(np.float32(x) - y) / (norm(y) or 1) for x, y in pairs]


@pytest.mark.parametrize(
    "pattern, T, more",
    [
        # More tiles of keys and of queries than a ring has buffers.
        (Fixed(128, 128), 768, {}),
        (
            Fixed(128, 32, rotate=True),
            300,
            {"H": 4, "key_heads": 2, "dtype": jnp.float16},
        ),
        (Fixed(64, 16, offset=2), 200, {"K": 32, "V": 32}),
        (Fixed(256, 64), 512, {}),
        (Fixed(128, 32), 256, {"K": 128, "V": 96}),
        (Blocks(128), 200, {}),
        (Summaries(64, 16, offset=1), 256, {}),
        (Fixed(64, 16), 128, {"scale": -0.1}),
        (Fixed(64, 16), 128, {"scale": 0.0}),  # no gradient reaches q and k
    ],
    ids=str,
)
def test_values_and_gradients(pattern, T, more):
    assert max(_relative_errors(pattern, T, **more)) < 4e-3


def test_vmap():
    q = jax.random.normal(jax.random.key(0), (2, 1, 128, 1, 64), jnp.bfloat16)

    def run(q):
        return fixed.attend(q, q, q, Fixed(128, 32), 0.125, interpret=True)

    one_by_one = jnp.stack([run(x) for x in q])
    np.testing.assert_array_equal(jax.vmap(run)(q), one_by_one)


@pytest.mark.parametrize(
    "pattern, width, dtype, said",
    [
        (Fixed(128, 32), 64, "bfloat16", None),
        (Blocks(256), 64, "float16", None),
        (Summaries(64, 8), 128, "bfloat16", None),
        (Fixed(128, 32), 64, "float32", "in bfloat16"),
        (Fixed(128, 32), 256, "bfloat16", "up to 128 wide"),
        (Fixed(100, 32), 64, "bfloat16", "not 100; try 128"),
        (Fixed(256, 32), 128, "bfloat16", "at width 128, not 256; try 128"),
        (Fixed(128, 48), 64, "bfloat16", "not 48; try 32"),
    ],
    ids=str,
)
def test_supports(pattern, width, dtype, said):
    q = jax.ShapeDtypeStruct((1, 512, 2, width), dtype)
    why = hopper.supports(pattern, q, q, q)
    assert why is None if said is None else said in why
