"""FLOPs against a count of the products that the model's own program holds."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax.attention import Columns, Dense, Fixed, Local, PerHead, Strided
from sparse_flax.flops import forward_flops, recomputed_flops, train_flops
from sparse_flax.model import ModelConfig, SparseTransformer

TINY = ModelConfig(
    context=16,
    layers=4,
    width=16,
    heads=4,
    qk_width=8,
    feed_forward=24,
    patterns=(Dense(),),
    position_shape=(4, 4),
    dtype="float32",
)


def product_flops(jaxpr):
    """Two for each multiplication in each product, loops counted."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * np.prod(out) * np.prod([left[axis] for axis in contracted])
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            total += times * product_flops(sub)
    return total


@pytest.mark.parametrize("T", [16, 11])
def test_equals_the_products_of_the_program(T):
    config = dataclasses.replace(TINY, implementation="reference", remat="none")
    model = jax.eval_shape(lambda k: SparseTransformer(config, k), jax.random.key(0))
    inputs_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)
    found = product_flops(jax.make_jaxpr(lambda m, x: m(x))(model, inputs_BT).jaxpr)
    one_hot = 2 * T * 256 * 16  # the embedding, which we call a look-up
    # The reference also multiplies the pairs above the diagonal: K = 2, V = 4.
    masked = 2 * (2 + 4) * (T * T - T * (T + 1) // 2) * 4 * 4
    assert forward_flops(config, T) == found - one_hot - masked


def test_counts_strided_by_hand():
    config = dataclasses.replace(TINY, patterns=(Strided(3),), layers=2)
    # Query i of 7 sees 1, 2, 3, then 3 and one more for each stride before those.
    pairs = 1 + 2 + 3 + 4 + 4 + 4 + 5
    per_token = 2 * (2 * 16 * 8 + 2 * 16 * 16 + 2 * 16 * 24)
    attention = pairs * 4 * 2 * (2 + 4)
    logits = 2 * 7 * 16 * 256
    assert forward_flops(config, 7) == 2 * (7 * per_token + attention) + logits


@pytest.mark.parametrize(
    "patterns",
    [
        (Local(5), Columns(4)),
        (Fixed(4, 2, rotate=True),),
        (PerHead((Local(3), Dense())), Dense()),
    ],
    ids=str,
)
def test_counts_the_pairs_that_each_head_of_each_layer_sees(patterns):
    config = dataclasses.replace(TINY, patterns=patterns)
    pairs = sum(
        patterns[layer % len(patterns)].mask(16, head).sum()
        for layer in range(4)
        for head in range(4)
    )
    dense = 4 * 4 * 16 * 17 // 2
    saved = forward_flops(TINY) - forward_flops(config)
    assert saved == 2 * (2 + 4) * (dense - pairs)


def test_a_train_step_costs_three_forward_passes():
    assert train_flops(TINY, 5) == 3 * forward_flops(TINY, 5)
    assert forward_flops(TINY) == forward_flops(TINY, 16)


@pytest.mark.parametrize("remat", ["full", "attention", "attention+mlp", "products"])
def test_counts_what_the_backward_pass_of_the_program_does_again(remat):
    def products(remat):
        config = dataclasses.replace(TINY, implementation="reference", remat=remat)
        model = jax.eval_shape(
            lambda k: SparseTransformer(config, k), jax.random.key(0)
        )
        inputs_BT = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        gradient = jax.grad(lambda m, x: m(x).sum())
        return product_flops(jax.make_jaxpr(gradient)(model, inputs_BT).jaxpr)

    masked = 2 * (2 + 4) * (16 * 16 - 16 * 17 // 2) * 4 * 4  # by the reference
    again = recomputed_flops(dataclasses.replace(TINY, remat=remat))
    assert products(remat) - products("none") == again + masked
    assert recomputed_flops(dataclasses.replace(TINY, remat="none")) == 0
