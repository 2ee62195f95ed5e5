"""Time the train step on one device and over several, and compare the losses.

    python benchmarks/scaling.py                # all devices here, a half, a quarter ..
    python benchmarks/scaling.py --devices 4    # one device and four
    python benchmarks/scaling.py --quick        # small models: whether it runs

enwik8's model with Strided(128), 8 rows a device along mesh.data and mesh.fsdp, 8 in
all along mesh.tensor; the music model, one row of 65,536 tokens, along mesh.context.
Random bytes; every device has the same rows along mesh.data and mesh.fsdp, so that loss
and gradient are those of one device. Each case runs three steps to warm up and then
ten. The largest number of devices comes first, and rows are written as they come.

Writes benchmarks/results/scaling.json: {hardware, versions, command, rows: [{model,
pattern, batch_size, context, mesh, tokens_per_s, step_ms, times (of one device),
loss_error (of the bits per byte of the fourth step, relative)}]}.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a clone that is not installed
RESULTS = Path(__file__).with_name("results") / "scaling.json"

from benchmarks import processes  # noqa: E402
from sparse_flax import config as config_lib  # noqa: E402
from sparse_flax import optim, sharding, state  # noqa: E402
from sparse_flax.config_checks import finalize  # noqa: E402
from sparse_flax.data.batches import inputs_and_targets  # noqa: E402
from sparse_flax.train_step import make_train_step  # noqa: E402

STEPS = 10
# (model, pattern or '' for its own, rows, axes of the mesh)
CASES = [
    ("enwik8", "Strided(128)", 8, ("data", "fsdp", "tensor")),
    ("music", "", 1, ("context",)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--devices", type=int, nargs="+", help="default: all, halves")
    args = parser.parse_args()
    there = jax.device_count()
    if there == 1:
        sys.exit("one device is here; there is nothing to compare it with")
    numbers = args.devices or halves(there)
    if wrong := [n for n in numbers if not 2 <= n <= there]:
        sys.exit(f"--devices {wrong[0]}: name numbers from 2 to {there}")
    record = {
        **processes.jax_device(),
        "command": processes.command_line(),
        "rows": [],
    }
    record["hardware"] = f"{there} x {record['hardware']}"
    for model, pattern, rows, axes in CASES:
        alone = alone_bits = None
        several = [(axis, n) for n in numbers for axis in axes]
        for axis, devices in [("", 1), *several]:
            row, bits = measure(model, pattern, rows, axis, devices, args.quick)
            alone, alone_bits = alone or row, alone_bits or bits
            row["times"] = axis and row["tokens_per_s"] / alone["tokens_per_s"]
            row["loss_error"] = abs(bits / alone_bits - 1)
            record["rows"].append(row)
            processes.write(args.out, record)
            print(row, flush=True)


def halves(devices: int) -> list[int]:
    """Return a number of devices, half of it, and so on, down to two."""
    return [devices >> k for k in range(devices.bit_length() - 1)]


def measure(
    model: str, pattern: str, rows: int, axis: str, devices: int, quick: bool
) -> tuple[dict, float]:
    """Return a case's row, and the bits per byte of the step after the warm-up."""
    config = runpy.run_path(str(ROOT / "configs" / f"{model}.py"))["get_config"]()
    config.model.dropout, config.optim.warmup_steps = 0.0, 1
    config.model.patterns = pattern or config.model.patterns
    if quick:
        config.model.layers, config.model.width, config.model.context = 2, 64, 4096
        config.model.heads, config.model.unroll = 4, 1
    copies = devices if axis in sharding.ACTIVATION_AXES["B"] else 1
    config.train.batch_size = config.eval.batch_size = rows * copies
    if axis:
        config.mesh[axis] = devices
    config, _ = finalize(config)
    model_config = config_lib.model_config(config)
    T = model_config.context
    windows_BT = np.random.default_rng(0).integers(0, 256, (rows, T)).astype(np.uint8)
    batch = inputs_and_targets(np.tile(windows_BT, (copies, 1)))
    optimizer = optim.make_optimizer(config.optim)
    with jax.set_mesh(sharding.make_mesh(**config.mesh)):
        batch = sharding.put_batch(batch)
        now = state.create(model_config, optimizer, jax.random.key(0))
        step = make_train_step(config, jax.random.key(1)).lower(now, batch).compile()
        ends, bits = [], []
        for _ in range(3 + 1 + STEPS):
            now, values = step(now, batch)
            bits.append(float(values["bits_per_byte"]))
            ends.append(time.perf_counter())
    seconds = float(np.median(np.diff(ends[3:])))
    return {
        "model": model,
        "pattern": config.model.patterns,
        "batch_size": rows * copies,
        "context": T,
        "mesh": f"mesh.{axis}={devices}" if axis else "one device",
        "tokens_per_s": rows * copies * T / seconds,
        "step_ms": 1e3 * seconds,
    }, bits[3]


if __name__ == "__main__":
    main()
