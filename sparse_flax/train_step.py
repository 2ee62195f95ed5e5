"""The train step: forward, backward, Adam, averaged weights; one jitted function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sparse_flax import evaluate, optim
from sparse_flax.state import TrainState

Metrics = dict[str, Any]


def make_train_step(config: ConfigDict, dropout_key: jax.Array) -> Callable:
    """Return the jitted step (state, batch) -> (state, metrics); it donates state."""
    optimizer = optim.make_optimizer(config.optim)
    schedule = optim.make_schedule(
        config.optim.learning_rate, config.optim.warmup_steps, config.train.steps
    )

    def mean_nats(model, batch, key):
        logits_BTN = model(batch["inputs_BT"], key)
        return jnp.mean(evaluate.cross_entropy(logits_BTN, batch["targets_BT"]))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(old: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(dropout_key, old.step)
        nats, grads = jax.value_and_grad(mean_nats)(old.model, batch, key)
        updates, opt_state = optimizer.update(grads, old.opt_state, old.model)
        rate = schedule(old.step)
        model = jax.tree.map(lambda p, u: p - rate * u, old.model, updates)
        new = TrainState(
            step=old.step + 1,
            model=model,
            opt_state=opt_state,
            ema=optim.update_average(old.ema, model, old.step, config.optim.ema_decay),
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(nats) & jnp.isfinite(grad_norm)
        # A step that is not finite changes nothing, so that the state stays good.
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        return new, {
            "bits_per_byte": nats / jnp.log(2.0),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "finite": finite,
            "good_gradients": [jnp.isfinite(g).all() for g in jax.tree.leaves(grads)],
        }

    return train_step
