"""The train step: forward, backward, Adam, averaged weights; one jitted function."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sparse_flax import evaluate, optim
from sparse_flax.attention import target_device_kind
from sparse_flax.loss_scale import LossScale
from sparse_flax.sharding import batch_rows, split_batch
from sparse_flax.state import TrainState

Metrics = dict[str, Any]

# cuBLASLt adds biases, residuals and other products to a product on its way out, where
# Triton's products, the default, leave that to passes of their own over the memory.
NVIDIA_OPTIONS = {
    "xla_gpu_enable_cublaslt": True,
    "xla_gpu_enable_triton_gemm": False,
}


def make_train_step(config: ConfigDict, dropout_key: jax.Array) -> Any:
    """Return the jitted step (state, batch) -> (state, metrics); it donates state."""
    optimizer = optim.make_optimizer(config.optim)
    schedule = optim.make_schedule(
        config.optim.learning_rate, config.optim.warmup_steps, config.train.steps
    )
    is_float16 = config.model.dtype == "float16"  # see loss_scale.py

    def scaled_nats(model, batch, key, scale):
        logits_BTN = model(batch["inputs_BT"], key, batch["rows_B"])
        nats = jnp.mean(evaluate.cross_entropy(logits_BTN, batch["targets_BT"]))
        return nats * scale, nats

    def nats_and_gradient(model, batch, key, scale):
        """Average both over the micro-batches, which run one after the other."""
        parts = config.train.accumulate
        differentiate = jax.grad(scaled_nats, has_aux=True)
        if parts == 1:
            grads, nats = differentiate(model, batch, key, scale)
        else:

            def add(total, micro_batch):
                one = differentiate(model, micro_batch, key, scale)
                return jax.tree.map(jnp.add, total, one), None

            zero = jax.tree.map(jnp.zeros_like, model), jnp.float32(0)
            (grads, nats), _ = jax.lax.scan(add, zero, split_batch(batch, parts))
        return nats / parts, jax.tree.map(lambda g: g / (parts * scale), grads)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=_compiler_options())
    def train_step(old: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        loss_scale = old.loss_scale if is_float16 else LossScale.start(1.0)
        nats, grads = nats_and_gradient(
            old.model,
            batch | {"rows_B": batch_rows(batch["inputs_BT"].shape[0])},
            jax.random.fold_in(dropout_key, old.step),
            loss_scale.scale,
        )
        updates, opt_state = optimizer.update(grads, old.opt_state, old.model)
        rate = schedule(old.step)
        model = jax.tree.map(lambda p, u: p - rate * u, old.model, updates)
        ema = optim.update_average(old.ema, model, old.step, config.optim.ema_decay)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(nats) & jnp.isfinite(grad_norm)
        # Of a finite loss, an infinite gradient may only mean too high a scale.
        skipped = jnp.isfinite(nats) & ~finite & loss_scale.can_fall()

        # A step that is not finite changes nothing, so that the state stays good.
        def if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new = TrainState(
            step=old.step + (finite | skipped),
            model=if_finite(model, old.model),
            opt_state=if_finite(opt_state, old.opt_state),
            ema=if_finite(ema, old.ema),
            loss_scale=loss_scale.after(finite) if is_float16 else old.loss_scale,
        )
        return new, {
            "bits_per_byte": nats / jnp.log(2.0),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "loss_scale": new.loss_scale.scale,
            "skipped": skipped,
            "finite": finite | skipped,
            "good_gradients": [jnp.isfinite(g).all() for g in jax.tree.leaves(grads)],
        }

    return train_step


def _compiler_options() -> dict[str, bool] | None:
    return NVIDIA_OPTIONS if "NVIDIA" in target_device_kind() else None
