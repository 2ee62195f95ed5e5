"""What a run says of itself: before it starts, and what came out."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_flax import __version__, devices
from sparse_flax.config import explain_attention
from sparse_flax.data.bigram import Baseline
from sparse_flax.data.bytes import Splits
from sparse_flax.model import ModelConfig, SparseTransformer, parameter_count
from sparse_flax.workdir import WorkDir

Say = Callable[[str], None]


def show(
    say: Say,
    config: ConfigDict,
    model_config: ModelConfig,
    splits: Splits,
    resumed: int | None,
) -> None:
    """Print the banner; `resumed` is the step of the restored checkpoint, or None."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("jax", "flax", "optax", "orbax-checkpoint")
    )
    say(f"versions           sparse_flax {__version__}, {versions}, Python "
        f"{platform.python_version()}")  # fmt: skip
    mesh = jax.sharding.get_mesh()
    kind = mesh.devices.flat[0].device_kind
    shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    say(
        f"devices            {mesh.size} of {jax.device_count()} x {kind} "
        f"(mesh: {shape})"
    )
    peak = devices.peak(kind)
    say(
        "peak               "
        + (
            f"{peak / 1e12:,.0f} TFLOP/s dense bfloat16 a device, as its vendor says"
            if peak
            else "not known for this device, so no MFU"
        )
    )
    for warning in unused_accelerators():
        say(f"WARNING: {warning}")
    names = "train", "validation", "test"
    *first, last = (f"{name} {splits.amount(name)}" for name in names)
    unit = " " + last.rpartition(" ")[2]  # once is enough
    sizes = ", ".join([*(amount.removesuffix(unit) for amount in first), last])
    say(f"data               {splits.source}: {sizes}")
    model = jax.eval_shape(
        lambda key: SparseTransformer(model_config, key), jax.random.key(0)
    )
    say(f"parameters         {parameter_count(model):,}")
    say(f"patterns           {config.model.patterns}")
    told = (f"{x.implementation}: {x.reason}" for x in explain_attention(config))
    say(f"attention          {'; '.join(dict.fromkeys(told))}")
    tokens = config.train.batch_size * model_config.context
    say(
        f"tokens a step      {tokens:,} ({config.train.batch_size} sequences of "
        f"{model_config.context:,}); {config.train.steps:,} steps are "
        f"{tokens * config.train.steps / splits.train.size:,.2f} epochs"
    )
    say(
        "resume             "
        + (
            "no checkpoint here: starting afresh"
            if resumed is None
            else f"from the checkpoint at step {resumed:,}"
        )
    )


def show_result(
    say: Say, rows: list[dict[str, Any]], baseline: Baseline, unit: str
) -> None:
    """Print the scores of a finished run, in bits by the unit, beside the baseline."""
    scores = [row for row in rows if row["split"] == "validation"]
    test = [row for row in rows if row["split"] == "test"][-1]
    first, last = (f"{scores[i]['bits_per_byte']:.3f}" for i in (0, -1))
    say(
        f"validation         {first} bits/{unit} at step {scores[0]['step']:,}, {last} "
        f"at step {scores[-1]['step']:,} ({scores[-1]['weights']} weights)"
    )
    say(f"{baseline.what:<18} {baseline.bits:.3f} bits/{unit} on the same windows")
    say(f"test               {test['bits_per_byte']:.3f} bits/{unit}")


def show_files(say: Say, workdir: WorkDir, step: int, samples: str) -> None:
    """Print where a finished run left what it made, and the samples if there are."""
    if samples:
        say(f"sample             {workdir.sample}\n{samples}")
    say(f"checkpoint         {workdir.checkpoints / str(step)}")
    say(f"metrics            {workdir.metrics}")
    say(f"curve              {workdir.curve}")


def unused_accelerators() -> list[str]:
    """Return a sentence for each accelerator that is there and does not work."""
    found = []
    if jax.default_backend() == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
            found.append(
                "an NVIDIA GPU is here, but jax runs on the CPU: "
                'pip install "jax[cuda13]"'
            )
        if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
            found.append(
                "a TPU seems to be here, but jax runs on the CPU: "
                'pip install "jax[tpu]"'
            )
    idle = jax.device_count() - jax.sharding.get_mesh().size
    if idle and jax.default_backend() != "cpu":
        mesh = jax.sharding.get_mesh()
        most = jax.device_count() * mesh.shape["data"] // mesh.size
        found.append(
            f"{idle} of {jax.device_count()} devices are idle: --config.mesh.data="
            f"{most} uses more, with batches that it divides"
        )
    return found
