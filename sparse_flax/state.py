"""TrainState: what a checkpoint holds, and how it lies on the mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_flax.loss_scale import LossScale
from sparse_flax.model import ModelConfig, SparseTransformer
from sparse_flax.sharding import parameter_shardings

# What eval.weights says, and the field of the state that it chooses.
WEIGHTS = {"ema": "ema", "raw": "model"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a run needs to go on; keys and data follow from the step."""

    step: jax.Array  # int32 scalar: steps done
    model: SparseTransformer  # float32 parameters
    opt_state: Any  # of optax
    ema: SparseTransformer  # averaged parameters
    loss_scale: LossScale  # which only float16 uses


def create(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    loss_scale: float = 2.0**16,
) -> TrainState:
    """Make the state before the first step; on a mesh, each piece where it belongs."""
    init = functools.partial(_init, config, optimizer, loss_scale=loss_scale)
    return jax.jit(init, out_shardings=_shardings(jax.eval_shape(init, key)))(key)


def abstract(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Return shapes, dtypes and shardings of the state, without making it."""
    return _placed(jax.eval_shape(functools.partial(_init, config, optimizer), key))


def abstract_model(config: ModelConfig) -> SparseTransformer:
    """Return shapes, dtypes and shardings of the parameters alone."""
    init = functools.partial(SparseTransformer, config)
    return _placed(jax.eval_shape(init, jax.random.key(0)))


def _placed(shapes: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        _shardings(shapes),
    )


def _init(config, optimizer, key, loss_scale=1.0) -> TrainState:
    model = SparseTransformer(config, key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt_state=optimizer.init(model),
        # A copy: a buffer that is donated must not be there twice.
        ema=jax.tree.map(jnp.copy, model),
        loss_scale=LossScale.start(loss_scale),
    )


def _shardings(tree: Any) -> Any:
    return parameter_shardings(tree, jax.sharding.get_mesh())
