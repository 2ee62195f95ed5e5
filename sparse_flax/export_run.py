"""--mode=export: the weights of a run's checkpoint, as a small folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sparse_flax import config as config_lib
from sparse_flax import exported, processes, state
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.config_checks import finalize
from sparse_flax.errors import UserError
from sparse_flax.sharding import make_mesh
from sparse_flax.workdir import RunFolder

# What may differ between two exports of one run.
FREE = (*exported.ELSEWHERE, "train.steps", "eval", "sample", "checkpoint", "log")


def run(
    config: ConfigDict,
    workdir: str,
    folder: str,
    step: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Export the newest checkpoint that is whole, or the one of `step`.

    Args:
      config: not yet finalized; config.eval.weights chooses the weights.
      workdir: of the run.
      folder: where to; what was exported there of the same run is replaced.
      step: of the checkpoint.
      say: called with each line that the user should read.

    Raises:
      UserError: there is none, or the folder holds something else, as another run's.
    """
    found, target = RunFolder(workdir), Path(folder).expanduser()
    config, _ = finalize(config)
    config_lib.changes(found.saved()["config"], config)  # or refuse
    there = target.is_dir() and any(target.iterdir())
    if there and not (target / "config.json").exists():
        raise UserError(
            f"--model={folder} holds files of something else; name a new folder"
        )
    # Of the data what tells them apart, and not where somebody had them.
    data = {k: v for k, v in found.saved()["data"].items() if k != "source"}
    data = {"name": config.data.name, **data}
    if there:
        old = exported.record(target)  # or refuse
        differ = config_lib.differences(old["config"], config)
        if old.get("data") != data or not all(x.startswith(FREE) for x in differ):
            raise UserError(
                f"--model={folder} holds a model of another run, at its step "
                f"{old['step']}; name a new folder, or remove that one first"
            )
    weights = config.eval.weights
    checkpoints = Checkpointer(found.checkpoints, say=say)
    # One device does, but several processes have to read together.
    shape = config.mesh if processes.count() > 1 else {}
    with jax.set_mesh(make_mesh(**shape)):
        abstract = state.abstract_model(config_lib.model_config(config))
        field = state.WEIGHTS[weights]
        step, model = checkpoints.newest_whole(field, abstract, step)
        about = {"step": step, "weights": weights, "data": data}
        size = exported.save(target, model, config, about)
    say(f"checkpoint         {step} ({weights} weights)")
    say(f"model              {target} ({size / 1e6:.1f} MB)")
