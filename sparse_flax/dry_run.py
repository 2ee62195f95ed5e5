"""Sizes and costs of a configuration, and whether it fits: without data, or running."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import jax
from ml_collections import ConfigDict

from sparse_flax import advice, devices, flops, memory, topology
from sparse_flax import config as config_lib
from sparse_flax.config_checks import finalize
from sparse_flax.devices import Budget
from sparse_flax.memory import gib
from sparse_flax.model import SparseTransformer, parameter_count
from sparse_flax.sharding import MESH_AXES

Say = Callable[[str], None]


def run(
    config: ConfigDict,
    device: str | None = None,
    say: Say = print,
    topology_name: str | None = None,
) -> bool:
    """Print the table of parameters, what a step costs, and what memory it needs.

    Args:
      config: as for training.
      device: what it has to fit, as 'H200'; by default the accelerator that JAX runs
        on, if there is one.
      say: prints a line.
      topology_name: TPUs to compile for and to fit instead, as 'v5e:16x16'.

    Returns:
      False if it is known not to fit.

    Raises:
      UserError: the configuration is not valid, or the device or topology not known,
        or the mesh not as large as it.
    """
    chips = None
    if topology_name:
        chips = topology.describe(topology_name)
        topology.check_mesh(config, topology_name, len(chips))
    config, notices = finalize(config)
    for notice in notices:
        say(f"NOTE: {notice}")
    if chips:
        kind = chips[0].device_kind
        show_costs(config, say, kind)
        say(f"compiling for {len(chips)} x {kind}, which is not here, and not running")
        return show_memory(config, chips, devices.named(kind), say)
    given = devices.named(device) if device else None  # before any work
    found = memory.mesh_devices(math.prod(config.mesh[axis] for axis in MESH_AXES))
    budget = given or devices.here()
    if notice := devices.dtype_notice(
        budget.device if budget else "", config.model.dtype
    ):
        say(f"NOTE: {notice}")
    config_lib.explain_attention(config)  # what is compiled here; or a sentence
    show_costs(config, say, given.device if given else None)
    return show_memory(config, found, budget, say)


def show_costs(config: ConfigDict, say: Say, device_kind: str | None = None) -> None:
    """Print the parameters of a finalized configuration, and what a step costs.

    `device_kind` is for what attention runs; None: the device that is here.
    """
    model_config = config_lib.model_config(config)
    model = jax.eval_shape(
        lambda key: SparseTransformer(model_config, key), jax.random.key(0)
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = " x ".join(map(str, leaf.shape))
        size = math.prod(leaf.shape)
        say(f"{name.removesuffix('.value'):<24} {shape:>20} {size:>14,}")
    say(f"parameters: {parameter_count(model):,}")
    B, T = config.train.batch_size, model_config.context
    for explanation in config_lib.explain_attention(config, device_kind):
        say(str(explanation))
    say(f"tokens a step: {B * T:,}")
    once = B * flops.train_flops(model_config)
    again = B * flops.recomputed_flops(model_config)
    say(f"FLOPs a step: {once:.4g} (no recomputation)")
    say(
        f"FLOPs a step: {once + again:.4g} with what model.remat={config.model.remat} "
        "computes again"
    )
    count = math.prod(config.mesh[axis] for axis in MESH_AXES)
    if count > 1:
        say(f"FLOPs a step and device: {(once + again) / count:.4g} of these")
    moved = memory.least_bytes_moved(config)
    say(
        f"bytes a step and device: at least {gib(sum(moved.values()))} "
        f"({gib(moved['state'])} parameters, gradients, optimizer and averages, each "
        f"read and written once; {gib(moved['attention'])} attention's arguments, "
        "results and their gradients, once)"
    )


def show_memory(
    config: ConfigDict,
    found: list[jax.Device] | None,
    budget: Budget | None,
    say: Say,
) -> bool:
    """Print the memory of one device by part; return False if it does not fit."""
    held = memory.state_bytes(config)
    if found is None:
        _say_table(held, None, say)
        say(
            "activations and attention are not known: the mesh has more devices than "
            "are here, and JAX has started already; --mode=dry_run in a new process, "
            "with JAX_PLATFORMS=cpu, compiles for any number of them"
        )
        return True
    kind = found[0].device_kind

    def measure(config: ConfigDict, what: str = "the train step") -> memory.Compiled:
        say(f"compiling {what}, which may take a minute, to see what it needs ...")
        began = time.monotonic()
        compiled = memory.compile_step(config, found)
        say(f"... {gib(compiled.total)} in {time.monotonic() - began:.1f} s")
        return compiled

    compiled = measure(config)
    work = memory.attention_bytes(config, found[0])
    same = budget and found[0].platform != "cpu" and devices.is_kind(budget, kind)
    _say_table(held | _split(compiled, held, work), compiled.total, say)
    for name, (calls, size) in compiled.collectives.items():
        say(f"  {name:<18} {calls:,} a step: results of {gib(size)}")
    for name, calls in compiled.kernels.items():
        say(f"  {name:<18} {calls} in the program")
    if not same:
        whose = f"the {budget.device}" if budget else "an accelerator"
        say(
            f"activations and attention as compiled for {kind}; an estimate for "
            f"{whose}, whose program differs"
        )
    if budget is None:
        say("no accelerator here; name one with --device=H200 to see whether it fits")
        return True
    share = f"{gib(budget.usable)} of {gib(budget.total)}"
    if budget.highest > budget.usable:
        share += (
            f": JAX takes {devices.fraction():.0%} of a GPU unless "
            f"{devices.FRACTION_VARIABLE} says otherwise"
        )
    say(f"{budget.device}: {share}")
    if compiled.total <= budget.usable:
        say(f"it fits the {budget.device}: {compiled.total / budget.usable:.0%} used")
        return True
    say(f"it does not fit the {budget.device}")
    say(advice.what_to_change(config, budget, compiled, measure))
    return False


def _split(
    compiled: memory.Compiled, held: dict[str, int], work: int
) -> dict[str, float]:
    """Divide what is not state between attention's work space and the rest."""
    kept = sum(held.values())
    rest = max(compiled.total - kept, 0)
    return {"activations": max(rest - work, 0), "attention": min(work, rest)}


def _say_table(parts: Mapping[str, float], total: float | None, say: Say) -> None:
    say("memory of a device while training:")
    meaning = {
        "parameters": "float32",
        "gradients": "of all layers",
        "optimizer": "Adam's two moments",
        "averaged weights": "for evaluation",
        "activations": "what the backward pass keeps, the batch and other work space",
        "attention": "work space of one layer, forward and backward",
    }
    for name, size in parts.items():
        say(f"  {name:<18} {gib(size):>14}  {meaning[name]}")
    if total is not None:
        say(f"  {'total':<18} {gib(total):>14}")
