"""Where the memory of a train step goes, found by compiling and without running it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, SingleDeviceSharding
from ml_collections import ConfigDict

from sparse_flax import attention, optim, program, state
from sparse_flax import config as config_lib
from sparse_flax.attention.dispatch import piece
from sparse_flax.devices import GIB
from sparse_flax.sharding import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    parameter_shardings,
)
from sparse_flax.train_step import make_train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says that one device needs for a train step, in bytes."""

    total: float  # infinite where the compiler gave up for lack of memory
    temporary: float  # of these, for what is made and dropped within the step
    collectives: dict[str, program.Sent] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # for TPUs


def mesh_devices(needed: int) -> list[jax.Device] | None:
    """Return devices to compile for: those here, or as many CPU ones as are needed.

    A CPU can be taken for any number of devices, but only before JAX has started: None
    if it is too late, or if JAX_PLATFORMS leaves the CPU out.
    """
    if needed > 1:
        with contextlib.suppress(RuntimeError):  # it has started; there may be enough
            jax.config.update("jax_num_cpu_devices", needed)
    if needed <= jax.device_count():
        return jax.devices()
    try:
        cpus = jax.devices("cpu")
    except RuntimeError:
        return None
    return cpus if needed <= len(cpus) else None


def abstract_state(config: ConfigDict) -> state.TrainState:
    """Return shapes and, if a mesh is set, shardings of a run's state."""
    optimizer = optim.make_optimizer(config.optim)
    # Its shape alone: a mesh of devices that are not here can make no key.
    key = jax.eval_shape(jax.random.key, 0)
    return state.abstract(config_lib.model_config(config), optimizer, key)


def state_bytes(config: ConfigDict) -> dict[str, int]:
    """Return the bytes that one device holds of each part of the state, exactly.

    As the table in sharding.py divides it; gradients are laid out as parameters, and
    there twice where micro-batches are accumulated. Needs no devices.
    """
    with jax.set_mesh(make_mesh()):
        shapes = abstract_state(config)
    mesh = AbstractMesh(tuple(config.mesh[axis] for axis in MESH_AXES), MESH_AXES)

    def held(tree: Any) -> int:
        shardings = parameter_shardings(tree, mesh)
        sizes = jax.tree.map(
            lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
            tree,
            shardings,
        )
        return sum(jax.tree.leaves(sizes))

    parameters = held(shapes.model)
    return {
        "parameters": parameters,
        "gradients": parameters * (2 if config.train.accumulate > 1 else 1),
        "optimizer": held(shapes.opt_state),
        "averaged weights": held(shapes.ema),
    }


def compile_step(config: ConfigDict, devices: list[jax.Device]) -> Compiled:
    """Compile the train step of a finalized configuration for its mesh of devices."""
    sizes = [config.mesh[axis] for axis in MESH_AXES]
    key = jax.random.key(1)  # before the mesh, whose devices may be described only
    with jax.set_mesh(make_mesh(**config.mesh, devices=devices)):
        shape = config.train.batch_size, config.model.context
        tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(2))
        batch = {"inputs_BT": tokens_BT, "targets_BT": tokens_BT}
        step = make_train_step(config, key)
        lowered = step.lower(abstract_state(config), batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:  # on a TPU, whose memory is known
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(math.inf, math.inf)
    found: Any = compiled.memory_analysis()
    # The new state takes the place of the old one, which is the alias.
    kept = found.argument_size_in_bytes + found.output_size_in_bytes
    kept -= found.alias_size_in_bytes
    # On a CPU, peak_memory_in_bytes means nothing.
    temporary = found.temp_size_in_bytes
    text = compiled.as_text()
    sent = program.collectives(text) if math.prod(sizes) > 1 else {}
    return Compiled(kept + temporary, temporary, sent, program.kernels(text))


def attention_bytes(config: ConfigDict, device: jax.Device) -> int:
    """Return what the attention of one layer needs besides q, k, v, out and gradients.

    Forward and backward, compiled alone for one device's rows and heads; of the pattern
    that needs most.
    """
    q, k, v = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
        for x in layer_shapes(config)
    )

    def temporary(pattern: attention.Pattern) -> int:
        run = functools.partial(_attend_and_back, config.model.attention, pattern)
        found: Any = jax.jit(run).lower(q, k, v, v).compile().memory_analysis()
        return found.temp_size_in_bytes

    with jax.default_device(device):  # whose implementation is picked
        return max(map(temporary, set(attention.parse(config.model.patterns))))


def _attend_and_back(implementation, pattern, q, k, v, d_out):
    def attend(q, k, v):
        return attention.sparse_attention(
            q, k, v, pattern, implementation=implementation or None
        )

    return jax.vjp(attend, q, k, v)[1](d_out)


def layer_shapes(config: ConfigDict) -> list[jax.ShapeDtypeStruct]:
    """Return q, k and v as one device has them for one micro-batch of one layer."""
    arrays, shards = config_lib.attention_shapes(config)
    return [piece(x, shards) for x in arrays]


def least_bytes_moved(config: ConfigDict) -> dict[str, int]:
    """Return what one device must at least read and write in a step, by part.

    state: parameters, optimizer state and averaged weights read once and written once,
    gradients written and read, once however many micro-batches; attention: q, k, v and
    out moved once forward, and with their gradients once backward. No activation
    between layers, no weight read a second time and no communication is counted, so a
    real step moves more.
    """
    parts = state_bytes(config)
    parts["gradients"] = parts["parameters"]  # not those of a micro-batch beside them
    micro_batches = config.train.accumulate
    patterns = attention.parse(config.model.patterns)
    each = sum(
        attention.explain(pattern, *layer_shapes(config)).bytes for pattern in patterns
    )
    layers = config.model.layers // len(patterns)
    return {
        "state": 2 * sum(parts.values()),
        "attention": 3 * each * layers * micro_batches,
    }


def gib(size: float) -> str:
    """Write a number of bytes for a person: 12.34 GiB; below 0.01 GiB in MiB."""
    if size < 0.01 * GIB:
        return f"{size / 2**20:.2f} MiB"
    return f"{size / GIB:.2f} GiB" if size < math.inf else "more than there is"
