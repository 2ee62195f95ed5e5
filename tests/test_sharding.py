"""One model, however it lies on the devices."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from conftest import noisy_model
from jax.sharding import PartitionSpec as P

from sparse_flax import config as config_lib
from sparse_flax import optim, state
from sparse_flax.config_checks import finalize
from sparse_flax.data.batches import inputs_and_targets
from sparse_flax.errors import UserError
from sparse_flax.evaluate import bits_per_byte, cross_entropy
from sparse_flax.model import SparseTransformer
from sparse_flax.sharding import (
    activation,
    batch_shards,
    choose_mesh,
    make_mesh,
    parameter_shardings,
    put_batch,
    whole_sequences,
)
from sparse_flax.train_step import make_train_step

MESHES = [
    *((8, 1, 1, 1), (1, 4, 2, 1), (2, 1, 2, 2)),
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in (
            (1, 1, 1, 1),
            (2, 2, 2, 1),
            (1, 1, 1, 4),
            (1, 2, 1, 4),
            (1, 1, 2, 4),
        )
    ),
]


def configuration(
    patterns="PerHead((Strided(4), Fixed(4, 2, rotate=True)))", layers=2, T=16, heads=4
):
    config = config_lib.defaults()
    config.model.context = T
    config.model.layers = layers
    config.model.heads = heads
    config.model.width = 16
    config.model.patterns = patterns
    config.model.dropout = 0.25
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.train.steps = 20
    config.train.batch_size = 8
    return finalize(config)[0]


@pytest.mark.slow
def test_micro_batches_and_no_loop_on_a_mesh_give_the_same_step():
    scores = {}
    for sizes, parts in (((1, 1, 1), 1), ((2, 1, 2, 2), 2)):
        config = configuration("Local(4)")
        config.unlock()
        config.train.accumulate = parts
        config.model.unroll = parts
        optimizer = optim.make_optimizer(config.optim)
        with jax.set_mesh(make_mesh(*sizes)):
            now = state.create(
                config_lib.model_config(config), optimizer, jax.random.key(0)
            )
            step = make_train_step(config, jax.random.key(1))
            for _ in range(3):
                now, values = step(now, put_batch(batch()))
        scores[sizes] = float(values["bits_per_byte"]), float(values["grad_norm"])
    (a, b), (c, d) = scores.values()
    np.testing.assert_allclose([a, b], [c, d], rtol=1e-4)


def model_config():
    return config_lib.model_config(configuration())


def batch():
    windows_BT = np.random.default_rng(1).integers(0, 256, (8, 16)).astype(np.uint8)
    return inputs_and_targets(windows_BT)


@jax.jit
def loss_and_gradients(model, batch, key):
    def loss(model):
        logits_BTN = model(batch["inputs_BT"], key)
        return cross_entropy(logits_BTN, batch["targets_BT"]).mean()

    return jax.value_and_grad(loss)(model)


@functools.cache
def without_a_mesh():
    return loss_and_gradients(noisy_model(model_config()), batch(), jax.random.key(7))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_same_loss_and_gradients_with_dropout(sizes):
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        model = noisy_model(model_config())
        model = jax.device_put(model, parameter_shardings(model, mesh))
        results = loss_and_gradients(model, put_batch(batch()), jax.random.key(7))
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(results)[0],
        jax.tree.leaves(without_a_mesh()),
        strict=True,
    ):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(
            a, b, atol=1e-5 * scale, rtol=1e-5, err_msg=str(path)
        )


EIGHT = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4)
         if math.prod(sizes) == 8]  # fmt: skip


@pytest.mark.slow
def test_every_mesh_of_eight_devices_gives_the_same_loss():
    config = config_lib.model_config(
        configuration("Strided(4), Fixed(4, 2)", T=32, heads=8)
    )
    windows_BT = np.random.default_rng(2).integers(0, 256, (8, 32)).astype(np.uint8)

    def loss_on(*sizes):
        @jax.jit
        def loss(model, batch, key):
            logits_BTN = model(batch["inputs_BT"], key)
            return cross_entropy(logits_BTN, batch["targets_BT"]).mean()

        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            model = noisy_model(config)
            model = jax.device_put(model, parameter_shardings(model, mesh))
            batch = put_batch(inputs_and_targets(windows_BT))
            return float(loss(model, batch, jax.random.key(7)))

    alone = loss_on(1, 1, 1, 1)
    losses = {sizes: loss_on(*sizes) for sizes in EIGHT}
    assert len(losses) == 20
    assert losses == dict.fromkeys(EIGHT, pytest.approx(alone, rel=1e-5))


@pytest.mark.slow
def test_training_keeps_every_piece_in_its_place_and_compiles_once():
    config = configuration("Local(4)")
    optimizer = optim.make_optimizer(config.optim)
    args = config_lib.model_config(config), optimizer, jax.random.key(0)
    with jax.set_mesh(make_mesh(1, 2, 2, 2)):
        now = state.create(*args)
        for leaf, promised in zip(
            jax.tree.leaves(now), jax.tree.leaves(state.abstract(*args)), strict=True
        ):
            assert leaf.sharding == promised.sharding
            assert (leaf.shape, leaf.dtype) == (promised.shape, promised.dtype)
        for a, b in zip(
            jax.tree.leaves(now.model),
            jax.tree.leaves(jax.jit(SparseTransformer, static_argnums=0)(*args[::2])),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        step = make_train_step(config, jax.random.key(1))
        for _ in range(3):
            before = [x.sharding for x in jax.tree.leaves(now)]
            now, _ = step(now, put_batch(batch()))
            for leaf, place in zip(jax.tree.leaves(now), before, strict=True):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        assert step._cache_size() == 1
    places = jax.tree.leaves(jax.tree.map(lambda x: x.sharding.spec, now.model))
    adam = now.opt_state[1]
    for tree in (adam.mu, adam.nu, now.ema):
        assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding.spec, tree)) == places
    moment = adam.mu.blocks.up_DF[...]
    assert moment.sharding.spec == P(None, "fsdp", "tensor")
    assert moment.addressable_shards[0].data.size == moment.size // 4


def test_the_table_of_parameters():
    model = noisy_model(model_config())
    shardings = parameter_shardings(model, make_mesh(2, 2, 2))
    expected = {
        "token_ND": P(None, "fsdp"),
        "start_D": P(None),
        "positions_ND.0": P(None, "fsdp"),
        "blocks.norm1_scale_D": P(None, None),
        "blocks.query_DHK": P(None, "fsdp", "tensor", None),
        "blocks.query_bias_HK": P(None, "tensor", None),
        "blocks.out_HVD": P(None, "tensor", None, "fsdp"),
        "blocks.up_DF": P(None, "fsdp", "tensor"),
        "blocks.up_bias_F": P(None, "tensor"),
        "blocks.down_FD": P(None, "tensor", "fsdp"),
        "logits_DN": P("fsdp", None),
    }
    found = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(
            ".value"
        ): sharding.spec
        for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 2, 4), pytest.param((2, 2, 2), marks=pytest.mark.slow)],
    ids=str,
)
def test_samples_and_evaluates_on_a_mesh_as_without_one(sizes):
    def outcomes(model):
        rows = [batch() | {"weights_BT": np.ones((8, 16), np.float32)}]
        score = bits_per_byte(model, rows, count=1, stop=False, say=print)
        return model.generate([b"abc", b"", b"abcdef"], 10, seed=5), score

    alone, score = outcomes(noisy_model(model_config()))
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        model = noisy_model(model_config())
        model = jax.device_put(model, parameter_shardings(model, mesh))
        together, same_score = outcomes(model)
    np.testing.assert_array_equal(together, alone)
    assert abs(score - same_score) < 1e-5


def test_without_a_mesh_nothing_is_laid_out():
    assert activation("BTD") is None
    assert batch_shards() == 1
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert activation("BTHK") == P(("data", "fsdp"), "context", "tensor", None)
        assert activation("BTF") == P(("data", "fsdp"), "context", "tensor")
        assert batch_shards() == 4
        rows = put_batch({"x": np.zeros((8, 2))})["x"]
        with whole_sequences():
            assert activation("BT") == P(("data", "fsdp", "context"), None)
    assert rows.addressable_shards[0].data.shape == (2, 2)


def test_without_a_mesh_named_the_batch_goes_to_as_many_devices_as_divide_it():
    said = []
    config = config_lib.defaults()
    config.train.batch_size = 12
    assert choose_mesh(config, said.append).mesh.data == 6
    config.eval.batch_size = 8
    assert choose_mesh(config, said.append).mesh.data == 4
    config.train.accumulate = 2
    assert choose_mesh(config, said.append).mesh.data == 2
    assert "mesh.data=6 of 8 devices" in said[0]
    finalize(choose_mesh(config, said.append))
    config.mesh.tensor = 2
    assert choose_mesh(config, said.append) is config
    assert len(said) == 4


def test_says_when_there_are_too_few_devices():
    with pytest.raises(UserError, match=r"mesh.data=3, .* need 12 .* there are 8") as e:
        make_mesh(3, 2, 2)
    assert "try mesh.data=8" in str(e.value) and "\n" not in str(e.value)


def test_fewer_devices_than_there_are_will_do():
    assert make_mesh(2, 1, 2).size == 4
