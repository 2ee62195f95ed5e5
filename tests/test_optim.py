"""Schedule, decay, averaging, and a train step by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax import config as config_lib
from sparse_flax import optim, state
from sparse_flax.config_checks import finalize
from sparse_flax.data.batches import inputs_and_targets
from sparse_flax.loss_scale import LossScale
from sparse_flax.model import SparseTransformer
from sparse_flax.sharding import MESH_AXES
from sparse_flax.train_step import make_train_step


def configuration():
    config = config_lib.defaults()
    config.model.context = 8
    config.model.layers = 2
    config.model.width = 16
    config.model.heads = 2
    config.model.patterns = "Strided(3)"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.dropout = 0.25
    config.optim.learning_rate = 0.02
    config.optim.warmup_steps = 2
    config.optim.embedding_rate = 1.5
    config.optim.epsilon = 1e-3  # so that clipping shows
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 0.05
    config.optim.beta2 = 0.95
    config.optim.ema_decay = 0.15
    config.train.steps = 5
    config.train.batch_size = 4
    return finalize(config)[0]


CONFIG = configuration()
DROPOUT_KEY = jax.random.key(11)


@functools.cache
def train_step():
    return make_train_step(CONFIG, DROPOUT_KEY)


def noisy_state(step=0):
    rng = np.random.default_rng(0)
    args = config_lib.model_config(CONFIG), optim.make_optimizer(CONFIG.optim)
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES)
    with jax.set_mesh(mesh):
        shapes = state.abstract(*args, jax.random.key(0))

    def leaf(x, std):
        values = np.asarray(std * rng.normal(size=x.shape))
        return jnp.asarray(values.astype(x.dtype))

    zero = functools.partial(leaf, std=0)
    model = jax.tree.map(functools.partial(leaf, std=0.4), shapes.model)
    return state.TrainState(
        step=jnp.int32(step),
        model=model,
        opt_state=jax.tree.map(zero, shapes.opt_state),
        ema=jax.tree.map(jnp.copy, model),
        loss_scale=LossScale.start(2.0**16),
    )


def batch(step=0):
    rng = np.random.default_rng(step)
    return inputs_and_targets(rng.integers(0, 256, (4, 8)).astype(np.uint8))


def to_numpy(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


# ---- Pieces ------------------------------------------------------------------------


def test_the_rate_warms_up_then_falls_to_just_above_zero():
    schedule = optim.make_schedule(1.0, warmup_steps=4, steps=20)
    rates = np.array([schedule(step) for step in range(20)])
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6)
    cosine = 0.5 + 0.5 * np.cos(np.pi * np.arange(1, 17) / 17)
    np.testing.assert_allclose(rates[4:], cosine, rtol=1e-5)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize(("warmup", "steps"), [(0, 3), (1, 1), (3, 3)])
def test_no_step_has_a_rate_of_zero(warmup, steps):
    schedule = optim.make_schedule(0.5, warmup, steps)
    rates = np.array([schedule(jnp.int32(step)) for step in range(steps)])
    assert (0 < rates).all() and (rates <= 0.5).all()
    if warmup:
        assert rates[warmup - 1] == 0.5


def test_matrices_and_tables_decay_and_vectors_do_not():
    decaying = optim.decays(noisy_state().model)
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, decays in jax.tree_util.tree_flatten_with_path(decaying)[0]
        if decays
    }
    weights = ("query_DHK", "key_DHK", "value_DHV", "out_HVD", "up_DF", "down_FD")
    assert names == {f"blocks.{name}" for name in weights} | {
        "token_ND",
        "positions_ND.0",
        "positions_ND.1",
        "logits_DN",
    }


def test_the_average_forgets_the_start_then_slows_down():
    def after(step):
        moved = optim.update_average({"w": 1.0}, {"w": 0.0}, jnp.int32(step), 0.99)
        return float(moved["w"])

    np.testing.assert_allclose(
        [after(0), after(1), after(8), after(10_000)],
        [1 / 10, 2 / 11, 9 / 18, 0.99],
        rtol=1e-6,
    )
    mixed = optim.update_average([jnp.array(2.0)], [jnp.array(12.0)], 0, 0.999)
    np.testing.assert_allclose(mixed[0], 0.1 * 2 + 0.9 * 12, rtol=1e-6)


def test_the_parameters_start_from_their_key_and_the_average_as_they_do():
    args = config_lib.model_config(CONFIG), optim.make_optimizer(CONFIG.optim)
    with jax.set_mesh(jax.make_mesh((1, 1, 1, 1), MESH_AXES)):
        made = state.create(*args, jax.random.key(5))
    assert made.step == 0
    drawn = jax.jit(SparseTransformer, static_argnums=0)(args[0], jax.random.key(5))
    model, average = to_numpy(made.model), to_numpy(made.ema)
    for name, x in to_numpy(drawn).items():
        np.testing.assert_allclose(model[name], x, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(average[name], model[name], err_msg=name)


# ---- The train step ----------------------------------------------------------------


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def loss_and_gradients(model, batch, key):
    def loss(model):
        log_p_BTN = jax.nn.log_softmax(model(batch["inputs_BT"], key))
        targets_BT1 = batch["targets_BT"][..., None]
        return -jnp.take_along_axis(log_p_BTN, targets_BT1, axis=-1).mean()

    return jax.value_and_grad(loss)(model)


@pytest.mark.usefixtures("optimised")
def test_three_steps_equal_adam_by_hand():
    """Clip, Adam (algorithm 1 of its paper), decoupled decay, rate, average."""
    o, now = CONFIG.optim, noisy_state()
    structure = jax.tree.structure(now.model)
    p = {name: x.astype(np.float64) for name, x in to_numpy(now.model).items()}
    decays = dict(zip(p, jax.tree.leaves(optim.decays(now.model)), strict=True))
    average = dict(p)
    m = v = dict.fromkeys(p, 0.0)
    rates = [0.01, 0.02, 0.02 * (0.5 + 0.5 * np.cos(np.pi / 4))]
    for step, rate in enumerate(rates):
        rows = batch(step)
        model = jax.tree.unflatten(
            structure, [x.astype(np.float32) for x in p.values()]
        )
        key = jax.random.fold_in(DROPOUT_KEY, step)
        nats, grads = loss_and_gradients(model, rows, key)
        g = {name: x.astype(np.float64) for name, x in to_numpy(grads).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert norm > 4 * o.clip_norm
        g = {name: x * o.clip_norm / norm for name, x in g.items()}
        m = {n: o.beta1 * m[n] + (1 - o.beta1) * g[n] for n in p}
        v = {n: o.beta2 * v[n] + (1 - o.beta2) * g[n] ** 2 for n in p}
        for n in p:
            m_hat = m[n] / (1 - o.beta1 ** (step + 1))
            v_hat = v[n] / (1 - o.beta2 ** (step + 1))
            update = m_hat / (np.sqrt(v_hat) + o.epsilon)
            own_rate = rate if n.startswith((".blocks", ".norm")) else 1.5 * rate
            p[n] = p[n] - own_rate * (update + o.weight_decay * decays[n] * p[n])
        past = min(o.ema_decay, (1 + step) / (10 + step))
        average = {n: past * average[n] + (1 - past) * p[n] for n in p}

        now, metrics = train_step()(now, rows)
        np.testing.assert_allclose(
            metrics["bits_per_byte"], nats / np.log(2), rtol=1e-5
        )
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5)
        assert metrics["finite"] and now.step == step + 1
        for tree, expected in ((now.model, p), (now.ema, average)):
            for n, x in to_numpy(tree).items():
                np.testing.assert_allclose(x, expected[n], atol=2e-6, err_msg=n)
    assert train_step()._cache_size() == 1


def test_each_step_drops_other_entries():
    def bits(step):
        return float(train_step()(noisy_state(step), batch())[1]["bits_per_byte"])

    assert bits(0) == bits(0)
    assert abs(bits(0) - bits(1)) > 1e-3


def infinite_logits(model):
    model.logits_DN[...] = model.logits_DN[...].at[0, 0].set(jnp.inf)


def huge_logits(model):
    """A finite loss, but the squares of its gradients are not."""
    model.logits_DN[...] = model.logits_DN[...] * 1e20


@pytest.mark.parametrize("spoil", [infinite_logits, huge_logits])
def test_a_step_that_is_not_finite_changes_no_bit(spoil):
    spoiled = noisy_state(step=2)
    spoil(spoiled.model)
    before = {n: x.tobytes() for n, x in to_numpy(spoiled).items()}
    after, metrics = train_step()(spoiled, batch())
    assert not metrics["finite"]
    assert np.isfinite(metrics["bits_per_byte"]) == (spoil is huge_logits)
    assert {n: x.tobytes() for n, x in to_numpy(after).items()} == before


def test_flags_the_gradients_that_are_good():
    spoiled = noisy_state()
    infinite_logits(spoiled.model)
    model = spoiled.model
    count = len(jax.tree.leaves(model))
    _, metrics = train_step()(spoiled, batch())
    assert len(metrics["good_gradients"]) == count
    assert not all(metrics["good_gradients"])
    _, metrics = train_step()(noisy_state(), batch())
    assert all(metrics["good_gradients"])


@pytest.mark.parametrize("parts", [2, 4])  # of 4 rows: two each, and one
def test_micro_batches_add_up_to_the_same_step(parts):
    """Dropout included: a row's masks depend on the row alone."""
    config = config_lib.ConfigDict(CONFIG.to_dict())
    config.train.accumulate = parts
    accumulated = make_train_step(config, DROPOUT_KEY)
    whole, split = noisy_state(), noisy_state()
    for step in range(2):
        whole, expected = train_step()(whole, batch(step))
        split, metrics = accumulated(split, batch(step))
        for name in ("bits_per_byte", "grad_norm"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    for name, x in to_numpy(split).items():
        np.testing.assert_allclose(x, to_numpy(whole)[name], atol=2e-6, err_msg=name)
