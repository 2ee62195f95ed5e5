"""A model in a folder, small enough to ship: weights and configuration, no more.

    model.safetensors    parameters by name; bfloat16, but for the norms
    config.json          configuration, what was trained on what, checksum of the above

`--mode=export` writes one from a run's checkpoint and `--mode=sample --model=FOLDER`
samples from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.flax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sparse_flax import __version__, processes, state
from sparse_flax import config as config_lib
from sparse_flax.config_checks import finalize
from sparse_flax.errors import UserError
from sparse_flax.integrity import named_leaves
from sparse_flax.model import ModelConfig, SparseTransformer
from sparse_flax.workdir import MODEL, read_record, write_atomically, writing

# Where the data lie and what they are computed on is the business of whoever samples.
ELSEWHERE = ("data.path", "data.folder", "model.attention", "mesh")


def save(
    folder: Path, model: SparseTransformer, config: ConfigDict, about: dict[str, Any]
) -> int:
    """Write a model into a folder, which is made, and return the size in bytes.

    Args:
      folder: what it holds of an earlier model is replaced.
      model: the weights.
      config: finalized.
      about: what else to write down, as the step and the data.

    Raises:
      UserError: the system refuses.
    """
    leaves = {
        name: x if "norm" in name else x.astype(jnp.bfloat16)
        for name, x in named_leaves(model).items()
    }
    if processes.count() > 1:  # each of which holds pieces
        leaves = multihost_utils.process_allgather(leaves, tiled=True)
    weights = safetensors.flax.save(jax.device_get(leaves))
    kept = config_lib.flatten(config.to_dict())
    defaults = config_lib.flatten(config_lib.defaults().to_dict())
    for name in kept:
        if name.startswith(ELSEWHERE):
            kept[name] = defaults[name]
    record = {
        "format": MODEL,
        "version": __version__,
        **about,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "config": config_lib.completed(kept).to_dict(),
    }
    text = json.dumps(record, indent=1).encode() + b"\n"
    if processes.is_first():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "model.safetensors", weights)
        write_atomically(folder / "config.json", text)
    return len(weights) + len(text)


def record(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote beside the weights.

    Raises:
      UserError: there is no model in the folder.
    """
    found = read_record(folder / "config.json", MODEL, {"sha256", "config", "step"})
    if found is None:
        raise UserError(
            f"--model={folder} holds no exported model (no config.json); write one "
            f"with --mode=export --workdir=RUN --model={folder}"
        )
    return found


def load(folder: Path | str, config: ModelConfig | None = None) -> SparseTransformer:
    """Read a model, with float32 parameters, onto the mesh that is set, if one is.

    >>> model = exported.load("models/text")
    >>> model.generate([b"Once "], 100)[0].tobytes()

    Args:
      folder: what `save` has written.
      config: its architecture, where something of it is to be different.

    Raises:
      UserError: it is damaged, missing or another model's.
    """
    folder = Path(folder).expanduser()
    if config is None:
        saved, _ = finalize(config_lib.completed(record(folder)["config"]))
        config = config_lib.model_config(saved)
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    make = functools.partial(SparseTransformer, config)
    abstract_model = (
        state.abstract_model(config)
        if on_mesh
        else jax.eval_shape(make, jax.random.key(0))
    )
    path, expected = folder / "model.safetensors", record(folder)["sha256"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); bring the file back, or "
            "export the model again"
        ) from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(
            f"{path} is not what was exported with the config.json beside it; bring "
            "the files back, or export the model again"
        )
    leaves = safetensors.flax.load_file(path)
    wanted = named_leaves(abstract_model)
    for name in [*wanted, *sorted(leaves.keys() - wanted.keys())]:
        was = leaves[name].shape if name in leaves else "nothing"
        now = wanted[name].shape if name in wanted else "nothing"
        if was != now:
            raise UserError(
                f"{path} holds {was} for {name} where this configuration has {now}; "
                "leave out the --config.model options"
            )
    placed = [
        jax.device_put(leaves[name].astype(x.dtype), x.sharding if on_mesh else None)
        for name, x in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract_model), placed)
