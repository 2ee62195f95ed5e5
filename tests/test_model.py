"""The model against the paper: sizes, initialisation, one pass by hand, causality."""

import dataclasses
import functools
import importlib
import time

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax import config as config_lib
from sparse_flax import optim, state
from sparse_flax.attention import Columns, Dense, Fixed, Local, Strided, parse
from sparse_flax.block import _biased, biased_gelu, norm
from sparse_flax.config_checks import finalize
from sparse_flax.evaluate import cross_entropy
from sparse_flax.model import (
    REMAT,
    START,
    ModelConfig,
    SparseTransformer,
    parameter_count,
)
from sparse_flax.sharding import MESH_AXES
from sparse_flax.train_step import make_train_step

TINY = ModelConfig(
    context=16,
    layers=2,
    width=16,
    heads=2,
    qk_width=8,
    feed_forward=24,
    patterns=(Columns(3), Fixed(4, 2, rotate=True)),
    position_shape=(4, 2, 2),
    dtype="float32",
)


def finalized(name, preset=""):
    config = importlib.import_module(f"configs.{name}").get_config(preset)
    return finalize(config)[0]


def draw(config, std=lambda name: 0.3, seed=1):
    """A model with random biases, scales and logits too, so that everything matters."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        noise = std(name) * rng.normal(size=x.shape)
        return jnp.asarray(noise + ("scale" in name), jnp.float32)

    make = functools.partial(SparseTransformer, config)
    abstract = jax.eval_shape(make, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def tiny(**changes):
    return draw(dataclasses.replace(TINY, **changes))


def some_inputs(B=2, T=16, seed=0):
    inputs_BT = np.random.default_rng(seed).integers(0, 256, (B, T))
    inputs_BT[:, 0] = START
    return inputs_BT.astype(np.int32)


run = jax.jit(lambda model, inputs_BT, key=None: model(inputs_BT, key))


def assert_close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


# ---- Sizes and initialisation ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset", "count"),
    [
        ("cifar10", "", 59_196_928),
        ("enwik8", "", 94_949_888),
        ("enwik8", "shared", 94_949_888),
        ("imagenet64", "", 151_645_184),
        ("imagenet64", "302m", 302_959_616),
        ("cifar10", "merged", 59_196_928),
        # Of audio the paper has 152M, 25M and 3M (table 4).
        ("music", "", 151_840_256),
        ("music", "262144", 25_151_680),
        ("music", "1048576", 3_103_872),
    ],
)
def test_has_as_many_parameters_as_the_paper(name, preset, count):
    config = config_lib.model_config(finalized(name, preset))
    make = lambda key: SparseTransformer(config, key)  # noqa: E731
    assert parameter_count(jax.eval_shape(make, jax.random.key(0))) == count


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 15}, "width=15 is no multiple of heads=2; try 16"),
        ({"qk_width": 7}, "qk_width=7 is no multiple of heads=2; try 8"),
        ({"layers": 3}, "layers=3 is no multiple of the 2 patterns; try 4"),
        ({"position_shape": (5, 3)}, r"has 15 places for context=16 .* try \(16,\)"),
    ],
)
def test_an_architecture_that_does_not_fit_is_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(TINY, **change)


@functools.cache
def untrained(init):
    config = ModelConfig(
        context=1024,
        layers=3,
        width=128,
        heads=4,
        qk_width=64,
        feed_forward=384,
        patterns=(Dense(),),
        position_shape=(32, 32),
        init=init,
    )
    return jax.jit(SparseTransformer, static_argnums=0)(config, jax.random.key(0))


@pytest.mark.parametrize("init", ["code", "paper"])
def test_costs_eight_bits_before_training(init):
    inputs_BT = some_inputs()
    logits_BTN = run(untrained(init), inputs_BT)
    assert logits_BTN.dtype == jnp.float32
    bits_BT = cross_entropy(logits_BTN, inputs_BT % 256) / np.log(2)
    assert_close(bits_BT, np.full(inputs_BT.shape, 8.0), 1e-6)


def test_embeddings_take_the_standard_deviation_that_is_given():
    config = dataclasses.replace(untrained("code").config, embedding_std=0.5)
    make = jax.jit(SparseTransformer, static_argnums=0)
    model = make(config, jax.random.key(0))
    assert abs(float(jnp.std(model.token_ND[...])) - 0.5) < 0.02
    assert abs(float(jnp.std(model.positions_ND[0][...])) - 0.5 / 2**0.5) < 0.05
    blocks = untrained("code").blocks
    np.testing.assert_array_equal(model.blocks.up_DF[...], blocks.up_DF[...])


@pytest.mark.parametrize("init", ["code", "paper"])
def test_initialises_as_its_table_says(init):
    D, F, L = 128, 384, 3
    if init == "code":
        embedding, linear = 0.01, lambda d_in: (0.125 / d_in) ** 0.5
    else:
        embedding, linear = 0.125 / D**0.5, lambda d_in: 0.125 / d_in**0.5
    expected = {
        "token_ND": embedding,
        "start_D": embedding,
        "positions_ND": embedding / 2**0.5,
        "query_DHK": linear(D),
        "key_DHK": linear(D),
        "value_DHV": linear(D),
        "out_HVD": linear(D) / (2 * L) ** 0.5,
        "up_DF": linear(D),
        "down_FD": linear(F) / (2 * L) ** 0.5,
        "logits_DN": 0,
    }
    model, seen = untrained(init), set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        name = next(part for part in where.split(".")[::-1] if "_" in part)
        seen.add(name)
        assert leaf.dtype == jnp.float32, where
        leaf = np.asarray(leaf, np.float64)
        if "scale" in name:
            assert (leaf == 1).all(), where
        elif "bias" in name or expected[name] == 0:
            assert (leaf == 0).all(), where
        else:
            std, error = expected[name], 4 / leaf.size**0.5
            assert abs(leaf.std() / std - 1) < error, where
            assert abs(leaf.mean() / std) < error, where
            if where.startswith("blocks."):
                assert not (leaf[0] == leaf[1]).any(), f"{where}: layers are alike"
    assert expected.keys() <= seen


def test_no_two_parameters_start_alike():
    config = dataclasses.replace(TINY, qk_width=16, feed_forward=16)
    model = jax.jit(SparseTransformer, static_argnums=0)(config, jax.random.key(0))
    starts = [leaf.ravel()[:16] for leaf in jax.tree.leaves(model) if leaf.std() > 0]
    assert len(starts) == 2 + 3 + 6
    unit = np.stack([start / np.linalg.norm(start) for start in starts])
    assert np.abs(unit @ unit.T - np.eye(len(unit))).max() < 0.9


# ---- One pass by hand --------------------------------------------------------------


def by_hand(model, inputs_BT):
    """Sections 5.2 to 5.4 of the paper in float64, a token and a head at a time."""

    def f64(parameter):
        return np.asarray(parameter[...], np.float64)

    def norm(x, scale, bias, epsilon):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + epsilon) * scale + bias

    def sees(layer, head, i, j):
        if layer % 2 == 0:
            return (i - j) % 3 == 0
        low = 2 - 2 * (head % 2)  # head 0 the last two of a block, head 1 the first
        return i // 4 == j // 4 or low <= j % 4 < low + 2

    config, b = model.config, model.blocks
    B, T = inputs_BT.shape
    H, K = config.heads, config.qk_width // config.heads
    token, tables = f64(model.token_ND), [f64(p) for p in model.positions_ND]
    x = np.zeros((B, T, config.width))
    for row in range(B):
        for t in range(T):
            if inputs_BT[row, t] == START:
                x[row, t] = f64(model.start_D)
                continue
            # What is read at t is the byte at t - 1, and comes with t - 1's place.
            place = np.unravel_index(t - 1, config.position_shape)
            x[row, t] = token[inputs_BT[row, t]]
            x[row, t] += sum(table[n] for table, n in zip(tables, place, strict=True))
    for layer in range(config.layers):
        w = {name: f64(p)[layer] for name, p in vars(b).items() if hasattr(p, "shape")}
        h = norm(x, w["norm1_scale_D"], w["norm1_bias_D"], 1e-5)
        for head in range(H):
            q = h @ w["query_DHK"][:, head] + w["query_bias_HK"][head]
            k = h @ w["key_DHK"][:, head] + w["key_bias_HK"][head]
            v = h @ w["value_DHV"][:, head] + w["value_bias_HV"][head]
            for t in range(T):
                keys = [j for j in range(t + 1) if sees(layer, head, t, j)]
                e = np.exp(np.einsum("bk,bjk->bj", q[:, t], k[:, keys]) / K**0.5)
                weights = e / e.sum(-1, keepdims=True)
                a = np.einsum("bj,bjv->bv", weights, v[:, keys])
                x[:, t] += a @ w["out_HVD"][head]
        x = x + w["out_bias_D"]
        h = norm(x, w["norm2_scale_D"], w["norm2_bias_D"], 1e-5)
        f = h @ w["up_DF"] + w["up_bias_F"]
        f = f / (1 + np.exp(-1.702 * f))
        x = x + f @ w["down_FD"] + w["down_bias_D"]
    h = norm(x, f64(model.norm_scale_D), f64(model.norm_bias_D), 1e-6)
    return h @ f64(model.logits_DN)


@pytest.mark.usefixtures("optimised")
def test_one_pass_equals_the_paper_by_hand():
    # A small residual stream, so that the epsilons of the norms matter.
    small = ("token", "start", "positions", "out_", "down")
    model = draw(
        dataclasses.replace(TINY, layers=4),
        lambda name: 0.01 if any(part in name for part in small) else 0.5,
    )
    inputs_BT = some_inputs(T=15)
    inputs_BT[1, 6] = START
    logits_BTN = run(model, inputs_BT)
    expected = by_hand(model, np.asarray(inputs_BT))
    assert expected.std() > 0.5
    assert_close(logits_BTN, expected, 1e-5)


def test_gradients_are_the_slopes_of_the_paper_by_hand():
    """Norms, activations and biases have backward passes of the model's own."""
    model, inputs_BT = draw(TINY, seed=3), some_inputs(T=7)
    rng = np.random.default_rng(0)
    weights_BTN = rng.normal(size=(2, 7, 256))

    def loss(model):
        return (model(inputs_BT) * weights_BTN).sum()

    leaves, structure = jax.tree.flatten(model)
    exact = [np.asarray(leaf, np.float64) for leaf in leaves]
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(model)]
    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
    for n, gradient in enumerate(gradients):
        step = 1e-5 * rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step if i == n else x for i, x in enumerate(exact)]
            logits_BTN = by_hand(structure.unflatten(moved), inputs_BT)
            ends.append((logits_BTN * weights_BTN).sum())
        slope, error = (ends[0] - ends[1]) / 2, 1e-4 * np.linalg.norm(step)
        error *= np.linalg.norm(gradient)
        assert abs((gradient * step).sum() - slope) < error + 1e-9, names[n]


@pytest.mark.parametrize(
    "add",
    [
        lambda x, bias: norm(x, jnp.ones(1), bias, 1e-5),
        lambda x, bias: biased_gelu(x + 30, bias),
        _biased,
    ],
    ids=["norm", "biased_gelu", "biased"],
)
def test_gradients_of_biases_add_up_in_float32(add):
    x = jnp.zeros((1, 257, 1), jnp.bfloat16)  # bfloat16 counts to 256
    gradient = jax.grad(lambda bias: add(x, bias).astype(jnp.float32).sum())
    assert float(gradient(jnp.zeros(1))[0]) == 257


def test_rows_of_one_large_value_have_a_norm():
    """In float32 the mean of squares may be below the square of the mean."""
    x_TD = jnp.linspace(100, 10_000, 512)[:, None] * jnp.ones(48)
    mean_T = x_TD.mean(-1)
    assert ((x_TD**2).mean(-1) - mean_T**2).min() < -1e-5
    assert jnp.isfinite(norm(x_TD, jnp.ones(48), jnp.zeros(48), 1e-5)).all()


def test_the_norm_of_bfloat16_is_rounded_once():
    x_TD = (10 + jax.random.normal(jax.random.key(0), (64, 48))).astype(jnp.bfloat16)
    args = jnp.ones(48), jnp.zeros(48), 1e-5
    exact_TD = norm(x_TD.astype(jnp.float32), *args)
    np.testing.assert_array_equal(norm(x_TD, *args), exact_TD.astype(jnp.bfloat16))


def test_logits_of_bfloat16_are_not_rounded():
    logits_BTN = run(tiny(dtype="bfloat16"), some_inputs())
    assert (logits_BTN != logits_BTN.astype(jnp.bfloat16)).mean() > 0.9


@pytest.mark.parametrize("T", [1, 7])
def test_a_short_sequence_is_the_prefix_of_a_long_one(T):
    model, inputs_BT = tiny(), some_inputs()
    whole = run(model, inputs_BT)
    assert_close(run(model, inputs_BT[:, :T]), whole[:, :T], 1e-5)


def test_refuses_more_tokens_than_its_context():
    with pytest.raises(ValueError, match=r"17 tokens are more .* of 16; give 16") as e:
        tiny()(some_inputs(T=17))
    assert "\n" not in str(e.value)


def test_bfloat16_is_close_to_float32():
    inputs_BT = some_inputs()
    exact = run(tiny(), inputs_BT)
    rough = run(tiny(dtype="bfloat16"), inputs_BT)
    assert rough.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((rough - exact) ** 2)) / jnp.std(exact))
    assert 1e-4 < error < 0.02


# ---- Causality ---------------------------------------------------------------------

TWO_STEPS = ["Strided(4)", "Fixed(4, 2)", "Columns(3), Local(3)"]


@pytest.mark.parametrize("patterns", TWO_STEPS)
def test_gradients_reach_all_of_the_past_and_nothing_else(patterns, monkeypatch):
    model = tiny(patterns=parse(patterns), layers=2)
    x_TD = model.embed(some_inputs(B=1))[0]
    weights_N = jax.random.normal(jax.random.key(9), (256,))

    def scores(x_TD):
        with monkeypatch.context() as m:
            m.setattr(SparseTransformer, "embed", lambda self, inputs: x_TD[None])
            return model(some_inputs(B=1))[0] @ weights_N

    size_TT = np.abs(jax.jit(jax.jacrev(scores))(x_TD)).sum(-1)
    reached_TT = np.tril(np.ones((16, 16), bool))
    assert (size_TT[~reached_TT] == 0).all()
    assert (size_TT[reached_TT] > 0).all()


@pytest.mark.parametrize("patterns", ["Strided(4)", "Fixed(4, 2, rotate=True)"])
def test_a_byte_changes_nothing_before_it(patterns):
    model = tiny(patterns=parse(patterns))
    inputs_TT = np.repeat(some_inputs(B=1), 16, axis=0)
    t = np.arange(16)
    inputs_TT[t, t] = (inputs_TT[t, t] + 1) % 256
    rows = jnp.concatenate([some_inputs(B=1), inputs_TT])
    logits = np.asarray(run(model, rows))
    for changed in t:
        difference = np.abs(logits[1 + changed] - logits[0]).max(-1)
        assert (difference[:changed] == 0).all()
        assert difference[changed] > 1e-3


# ---- Rematerialisation and dropout -------------------------------------------------


@jax.jit
def loss_and_gradients(model, inputs_BT, key=None):
    def loss(model):
        return cross_entropy(model(inputs_BT, key), inputs_BT % 256).mean()

    return jax.value_and_grad(loss)(model)


@pytest.mark.slow
def test_rematerialisation_changes_no_number():
    key = jax.random.key(4)
    results = {
        remat: loss_and_gradients(
            tiny(remat=remat, dropout=0.3, patterns=(Local(4),)), some_inputs(), key
        )
        for remat in REMAT
    }
    loss, grads = results.pop("none")
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    for other, other_grads in results.values():
        assert_close(other, loss, 1e-6)
        for a, b in zip(
            jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True
        ):
            assert_close(a, b, 1e-5)


@pytest.mark.slow
def test_unrolling_changes_no_number():
    remat = "attention+mlp"
    args = some_inputs(), jax.random.key(4)
    patterns = (Strided(4), Local(3))
    looped, *unrolled = (
        loss_and_gradients(
            tiny(unroll=n, remat=remat, dropout=0.3, patterns=patterns, layers=6), *args
        )
        for n in (1, 2, 3)
    )
    for other in unrolled:
        for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(other), strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA of older jax merges the two passes on a CPU all the same",
)
@pytest.mark.usefixtures("optimised")
def test_unrolling_undoes_no_rematerialisation():
    def work_space(**changes):
        wide = {"layers": 4, "patterns": (Local(3),), "width": 64, "feed_forward": 256}
        model = tiny(**wide, **changes)
        inputs_BT = jnp.zeros((16, 16), jnp.int32)
        compiled = jax.jit(loss_and_gradients.__wrapped__).lower(model, inputs_BT)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    kept = work_space(remat="none")
    # Of four cycles: one is left over beside the loop, and there is no loop.
    for unroll in (3, 4):
        assert work_space(remat="full", unroll=unroll) < 0.6 * kept


def test_keeps_for_the_backward_pass_what_it_says():
    def products(remat):
        jaxpr = jax.make_jaxpr(loss_and_gradients.__wrapped__)(
            tiny(remat=remat), some_inputs()
        )
        return sum(
            eqn.primitive.name == "dot_general" for eqn in equations(jaxpr.jaxpr)
        )

    # The body of the scan has two blocks: q, k, v and out are computed again, or not;
    # and so is up.
    full, attention, mlp = map(products, ("full", "attention", "attention+mlp"))
    assert (full - attention, attention - mlp) == (2 * 4, 2 * 1)
    assert products("none") < mlp


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(sub)


def test_drops_only_with_a_key_and_always_the_same():
    model, inputs_BT = tiny(dropout=0.3), some_inputs()
    key, other = jax.random.split(jax.random.key(0))
    assert_close(run(model, inputs_BT), run(tiny(), inputs_BT, key), 0)
    assert_close(run(model, inputs_BT, key), run(model, inputs_BT, key), 0)
    for a, b in [(key, None), (key, other)]:
        difference = run(model, inputs_BT, a) - run(model, inputs_BT, b)
        assert float(jnp.abs(difference).max()) > 1e-2


def test_every_branch_of_every_layer_drops_its_own_entries():
    """Branch n adds 2**n where it was kept, so that the sum spells out all masks."""
    L, rate = 4, 0.25
    model = tiny(dropout=rate, layers=L)
    model.blocks.out_HVD[...] = jnp.zeros_like(model.blocks.out_HVD[...])
    model.blocks.down_FD[...] = jnp.zeros_like(model.blocks.down_FD[...])
    value_L1 = (1 - rate) * 4.0 ** jnp.arange(L)[:, None]
    model.blocks.out_bias_D[...] = jnp.tile(value_L1, 16)
    model.blocks.down_bias_D[...] = jnp.tile(2 * value_L1, 16)
    x_BTD = jnp.zeros((64, 16, 16))
    keys_B = jax.random.split(jax.random.key(0), 64)
    sums_BTD = np.asarray(model._run_blocks(x_BTD, keys_B))
    codes_BTD = np.rint(sums_BTD).astype(int)
    assert_close(sums_BTD, codes_BTD, 1e-5)  # what is kept grows by 1 / (1 - rate)
    kept = [(codes_BTD >> n & 1).ravel() for n in range(2 * L)]
    error = 5 * 0.5 / codes_BTD.size**0.5
    for n, mask in enumerate(kept):
        assert abs(mask.mean() - (1 - rate)) < error
        for other in kept[:n]:
            assert abs((mask & other).mean() - (1 - rate) ** 2) < error
    rows = kept[0].reshape(64, -1)
    assert len(np.unique(rows, axis=0)) == 64


# ---- Every kind of attention, and the compiler -------------------------------------


@pytest.mark.parametrize(
    "patterns",
    [
        "Columns(4), Local(4), Local(4), Local(4)",
        "Fixed(4, 2, rotate=True), Dense()",
        "PerHead((Local(4), Columns(4)))",
    ],
)
def test_every_way_to_combine_heads_gives_finite_gradients(patterns):
    model = tiny(patterns=parse(patterns), layers=4)
    loss, grads = loss_and_gradients(model, some_inputs())
    assert np.isfinite(loss)
    for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def test_names_the_implementation_of_attention():
    inputs_BT = some_inputs()
    named = run(tiny(implementation="reference"), inputs_BT)
    assert_close(named, run(tiny(), inputs_BT), 1e-5)
    with pytest.raises(ValueError, match="implementation='fast'"):
        tiny(implementation="fast")(inputs_BT)


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
def test_the_128_layers_of_cifar10_compile_within_a_minute():
    config = finalized("cifar10")
    model_config = config_lib.model_config(config)
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES)
    with jax.set_mesh(mesh):
        abstract = state.abstract(
            model_config, optim.make_optimizer(config.optim), jax.random.key(0)
        )
        batch = dict.fromkeys(
            ("inputs_BT", "targets_BT"), jax.ShapeDtypeStruct((1, 3072), jnp.int32)
        )
        train_step = make_train_step(config, jax.random.key(0))
        began = time.monotonic()
        train_step.lower(abstract, batch).compile()
        assert time.monotonic() - began < 60  # half of it on two quiet cores
