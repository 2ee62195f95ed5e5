"""Schedule, Adam, clipping, decay mask and weight averaging (paper, section 6)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sparse_flax.sharding import dimension_letters


def make_schedule(learning_rate: float, warmup_steps: int, steps: int):
    """Return step -> learning rate: linear warm-up, then a cosine to 0 after `steps`.

    Counted from 1, so that neither the first step nor the last has a rate of 0.
    """
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=steps + 1,
    )
    return lambda step: rate(step + 1)


def make_optimizer(optim: ConfigDict) -> optax.GradientTransformation:
    """Return Adam after clipping, with decoupled weight decay, before the rate.

    The train step multiplies by the learning rate of its own step, so that no second
    step count can disagree with the first.
    """
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(optim.beta1, optim.beta2, optim.epsilon),
        optax.add_decayed_weights(optim.weight_decay, mask=decays),
        optax.masked(optax.scale(optim.embedding_rate), at_the_ends),
    )


def decays(parameters: Any) -> Any:
    """Say of each parameter whether it decays: matrices and tables, not vectors.

    The released code decays tensors of rank two and more. Here biases of heads and
    everything stacked over layers have a higher rank than they mean, so names decide.
    """

    def decide(path: tuple, leaf: Any) -> bool:
        del leaf
        return len(dimension_letters(path)) >= 2 and "_bias_" not in str(path)

    return jax.tree_util.tree_map_with_path(decide, parameters)


def at_the_ends(parameters: Any) -> Any:
    """Say of each parameter whether it is an embedding or the output, not a block.

    `optim.embedding_rate` multiplies the learning rate of these. The paper has one
    rate for all (1 here); a short run of a small model learns much faster with a higher
    one, as zero logits and small embeddings have far to go.
    """
    names = ("token_", "start_", "positions_", "logits_")

    def decide(path: tuple, leaf: Any) -> bool:
        del leaf
        return any(name in str(path) for name in names)

    return jax.tree_util.tree_map_with_path(decide, parameters)


def update_average(average: Any, parameters: Any, step: jax.Array, decay: float) -> Any:
    """Move the averaged weights towards the parameters after step `step` (from 0).

    The weight of the past is min(decay, (1 + step) / (10 + step)), so that the random
    start is forgotten fast.
    """
    past = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: past * a + (1 - past) * p, average, parameters)
