"""A trained model for a notebook: of a run, or of a folder that was exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_flax import config as config_lib
from sparse_flax import exported, state
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.config_checks import finalize
from sparse_flax.errors import UserError
from sparse_flax.model import SparseTransformer
from sparse_flax.sharding import make_mesh
from sparse_flax.workdir import RunFolder


def load(
    folder: str, step: int | None = None, say: Callable[[str], None] = print
) -> tuple[SparseTransformer, ConfigDict]:
    """Return a model and the finalized configuration that it was trained with.

    >>> model, config = trained.load("runs/quickstart")

    Args:
      folder: of a run, whose config.eval.weights chooses the weights; or one that
        `--mode=export` wrote.
      step: of a run's checkpoint; the newest that is whole by default.
      say: called with a line that says which weights these are.

    Raises:
      UserError: there is neither, or it cannot be read.
    """
    path = Path(folder).expanduser()
    if (path / "model.safetensors").exists():
        record = exported.record(path)
        if step not in (None, record["step"]):
            raise UserError(
                f"step {step} is not in the exported model {folder}, which holds step "
                f"{record['step']} alone; leave it out, or name the run's folder"
            )
        config, _ = finalize(config_lib.completed(record["config"]))
        model = exported.load(path, config_lib.model_config(config))
        say(f"model              {folder} (step {record['step']})")
        return model, config
    run = RunFolder(folder)
    config, _ = finalize(config_lib.completed(run.saved()["config"]))
    weights = config.eval.weights
    with jax.set_mesh(make_mesh()):
        abstract = state.abstract_model(config_lib.model_config(config))
        checkpoints = Checkpointer(run.checkpoints, say=say)
        field = state.WEIGHTS[weights]
        step, model = checkpoints.newest_whole(field, abstract, step)
    say(f"checkpoint         {step} ({weights} weights) of {folder}")
    return off_mesh(model), config


def off_mesh(model: SparseTransformer) -> SparseTransformer:
    """Return the parameters on one device, for use without a mesh."""
    return jax.tree.map(jnp.asarray, jax.device_get(model))
