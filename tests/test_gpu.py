"""What only a GPU can show; run with `pytest -m gpu`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model

from configs import enwik8
from sparse_flax import config as config_lib
from sparse_flax import decoder, generate, optim, sharding, state
from sparse_flax.attention import (
    Columns,
    Dense,
    Fixed,
    Local,
    Strided,
    hopper,
    sparse_attention,
)
from sparse_flax.config_checks import finalize
from sparse_flax.data import batches
from sparse_flax.evaluate import cross_entropy
from sparse_flax.model import REMAT, START, ModelConfig, SparseTransformer
from sparse_flax.train_step import make_train_step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU and pytest -m gpu")


def vjp_of(pattern, implementation):
    @jax.jit
    def run(q, k, v, d_out):
        attend = functools.partial(
            sparse_attention, pattern=pattern, implementation=implementation
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return run


@pytest.mark.parametrize(
    "pattern",
    [Dense(), Local(128), Strided(64), Fixed(128, 32, rotate=True)],
    ids=str,
)
def test_bfloat16_equals_the_reference_and_repeats_bit_for_bit(pattern):
    shape = (2, 1500, 8, 64)
    args = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    ]
    exact = vjp_of(pattern, "reference")(*[x.astype(jnp.float32) for x in args])
    run = vjp_of(pattern, "gathered")
    first = run(*args)
    for got, want in zip(first, exact, strict=True):
        error = jnp.abs(got.astype(jnp.float32) - want).max()
        assert error < 2**-7 * jnp.abs(want).max()
    for _ in range(20):
        for a, b in zip(first, run(*args), strict=True):
            np.testing.assert_array_equal(a, b)


def test_enwik8_steps():
    """The 95M model at the paper's length: the loss falls from 8 bits."""
    config = enwik8.get_config()
    config.train.batch_size = 2
    config.train.steps = 20
    config.optim.warmup_steps = 2
    config, _ = finalize(config)
    data = np.random.default_rng(0).integers(97, 105, 10**6).astype(np.uint8)
    with jax.set_mesh(sharding.make_mesh()):
        init_key, dropout_key = jax.random.split(jax.random.key(0))
        model_config = config_lib.model_config(config)
        optimizer = optim.make_optimizer(config.optim)
        train_state = state.create(model_config, optimizer, init_key)
        train_step = make_train_step(config, dropout_key)
        scores = []
        for batch in batches.train_batches(
            data, batch_size=2, context=12288, seed=0, start=0, steps=20
        ):
            train_state, values = train_step(train_state, sharding.put_batch(batch))
            scores.append(float(values["bits_per_byte"]))
    assert abs(scores[0] - 8) < 1e-3
    assert np.isfinite(scores).all() and scores[-1] < 6


@functools.cache
def loss_and_gradients(implementation, remat, unroll):
    """Those of two layers in bfloat16 at random parameters, by name."""
    config = ModelConfig(
        context=1024,
        layers=2,
        width=128,
        heads=2,
        qk_width=128,
        feed_forward=512,
        patterns=(Fixed(128, 32, rotate=True),),
        position_shape=(32, 32),
        remat=remat,
        unroll=unroll,
        implementation=implementation,
    )
    rng = np.random.default_rng(0)
    model = jax.tree.map(  # noise, since zero logits would let no gradient through
        lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32),
        SparseTransformer(config, jax.random.key(0)),
    )
    bytes_BT = rng.integers(0, 256, (2, 1025))
    inputs_BT, targets_BT = bytes_BT[:, :-1].copy(), bytes_BT[:, 1:]
    inputs_BT[:, 0] = START

    @jax.jit
    def run(model):
        return jax.value_and_grad(
            lambda model: cross_entropy(model(inputs_BT), targets_BT).mean()
        )(model)

    loss, gradients = run(model)
    return {"loss": loss} | {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(gradients)
    }


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("remat", REMAT)
def test_hopper_in_a_model_equals_gathered(remat, unroll):
    if why := hopper.runs_on(jax.devices()[0].device_kind):
        pytest.skip(why)
    got = loss_and_gradients("hopper", remat, unroll)
    for name, want in loss_and_gradients("gathered", "none", 1).items():
        if "key_bias" in name:  # it moves all scores of a row alike: its gradient is 0
            continue
        error = np.linalg.norm(got[name] - want) / np.linalg.norm(want)
        assert error < 2e-2, (name, error)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "patterns",
    [(Fixed(64, 16, rotate=True),), (Columns(32), Local(32)), (Dense(),)],
    ids=str,
)
def test_decoding_equals_the_forward_pass_and_copies_no_cache(patterns, rows):
    T = 512
    config = ModelConfig(
        context=T,
        layers=2,
        width=128,
        heads=4,
        qk_width=128,
        feed_forward=256,
        patterns=patterns,
        position_shape=(16, 32),
        dtype="float32",
    )
    model = noisy_model(config)
    bytes_BT = np.random.default_rng(0).integers(0, 256, (rows, T)).astype(np.int32)
    inputs_BT = generate.inputs(bytes_BT)

    @jax.jit
    def decoded(caches, weights):
        def one(position, carry):
            caches, logits_BTN = carry
            input_B = jax.lax.dynamic_index_in_dim(inputs_BT, position, 1, False)
            row, caches = decoder.step(weights, caches, input_B, position, T)
            return caches, logits_BTN.at[:, position].set(row)

        return jax.lax.fori_loop(100, T, one, (caches, jnp.zeros((rows, T, 256))))[1]

    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(lambda model, x: model(x))(model, inputs_BT))
        caches = decoder.prefill(model, inputs_BT, 100, T=T)
        weights = decoder.decoder(model)
        compiled = decoded.lower(caches, weights).compile()
        got = np.asarray(compiled(caches, weights))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        got[:, 100:] / scale, expected[:, 100:] / scale, atol=1e-5
    )
    body = compiled.as_text().split("ENTRY")[0]
    for cache in caches:
        for kv in cache.kv:
            shape = ",".join(map(str, kv.shape))
            assert not re.search(rf"f32\[{shape}\]\S* copy\(", body)
