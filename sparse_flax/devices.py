"""What is known of devices: their memory, and how fast their vendors say they are."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re

import jax

from sparse_flax.errors import UserError

GIB = 2**30

# One device as JAX counts devices, so half a chip for TPU v2, v3 and v7x. Memory in GiB
# as its driver reports it; the vendor's dense bfloat16 peak in TFLOP/s, float16 where a
# GPU has no bfloat16 tensor cores, 0 where we know of none.
DEVICES = {
    "B200": (179.0, 2250),
    "H200": (140.4, 989),
    "H100 PCIe": (79.6, 756),
    "H100": (79.6, 989),
    "A100 80GB": (80.0, 312),
    "A100 40GB": (40.0, 312),
    "L40S": (45.0, 362),
    "L4": (22.5, 121),
    "A10G": (22.5, 70),
    "V100 32GB": (32.0, 125),
    "V100 16GB": (16.0, 125),
    "T4": (15.0, 65),
    "RTX 4090 Laptop": (16.0, 0),
    "RTX 4090": (24.0, 165),
    "TPU v7x": (96.0, 1153.5),
    "TPU v6e": (32.0, 918),
    "TPU v5p": (95.0, 459),
    "TPU v5e": (16.0, 197),
    "TPU v4": (32.0, 275),
    "TPU v3": (16.0, 61.5),
    "TPU v2": (8.0, 22.5),
}
# The vendor's memory bandwidth in TB/s, where a page of theirs has it.
BANDWIDTHS = {
    "B200": 8.0,
    "H200": 4.8,
    "H100 PCIe": 2.0,
    "H100": 3.35,
    "A100 80GB": 2.039,
    "A100 40GB": 1.555,
    "L40S": 0.864,
    "L4": 0.3,
    "A10G": 0.6,
    "V100 32GB": 0.9,
    "V100 16GB": 0.9,
    "T4": 0.32,
    "RTX 4090": 1.008,
    "TPU v6e": 1.6,
    "TPU v5p": 2.765,
    "TPU v5e": 0.819,
}
# What `jax.Device.device_kind` calls some of them.
KINDS = {
    "TPU7x": "TPU v7x",
    "TPU v6 lite": "TPU v6e",
    "TPU v5 lite": "TPU v5e",
    "TPU v5": "TPU v5p",
}

# GPUs that compute in bfloat16 slowly or not at all.
NO_BFLOAT16 = ("V100 32GB", "V100 16GB", "T4")

# JAX takes this share of a GPU's memory when it starts, unless told otherwise; most of
# the rest can be had, but for what CUDA and its libraries need themselves.
FRACTION_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
DEFAULT_FRACTION, HIGHEST_FRACTION = 0.75, 0.92
TPU_FRACTION = 0.975  # 15.6 of the 16 GiB of a v5e; its compiler says 15.75


@dataclasses.dataclass(frozen=True)
class Budget:
    """The memory of one device, in bytes."""

    device: str
    total: int
    usable: int  # by JAX, as things are set
    highest: int  # by JAX, with `FRACTION_VARIABLE` as high as it should be


def peak(device_kind: str) -> float | None:
    """Return a device's peak in FLOP/s, or None where we know of none (a CPU, say)."""
    name = _find(device_kind)
    return DEVICES[name][1] * 1e12 or None if name else None


def bandwidth(device_kind: str) -> float | None:
    """Return a device's memory bandwidth in bytes/s, or None where we know of none."""
    name = _find(device_kind)
    return BANDWIDTHS.get(name, 0) * 1e12 or None if name else None


def dtype_notice(device_kind: str, dtype: str) -> str | None:
    """Return a sentence where a device lacks the type of the activations."""
    name = _find(device_kind)
    if name not in NO_BFLOAT16 or dtype != "bfloat16":
        return None
    return f"a {name} has no bfloat16: --config.model.dtype=float16"


def named(name: str) -> Budget:
    """Return the budget of a device, 'H200' or 'TPU v5e', or as JAX calls its kind.

    Raises UserError, naming the nearest, if it is not in the table.
    """
    found = _find(name)
    if found is None:
        words, close = _words(name), difflib.get_close_matches
        # 'A100' lacks only its size; else whatever is spelt alike.
        partly = [known for known in DEVICES if words and words <= _words(known)]
        lower = {known.lower().removeprefix("tpu "): known for known in DEVICES}
        near = partly or [lower[key] for key in close(name.lower(), lower, 1, 0)]
        raise UserError(
            f"--device={name} is none of {', '.join(DEVICES)}; try --device={near[0]!r}"
        )
    total = int(DEVICES[found][0] * GIB)
    if found.startswith("TPU"):
        return Budget(found, total, *[int(TPU_FRACTION * total)] * 2)
    highest = int(max(HIGHEST_FRACTION, fraction()) * total)
    return Budget(found, total, int(fraction() * total), highest)


def here() -> Budget | None:
    """Return the budget of the accelerator that JAX runs on, or None on a CPU."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu" or not limit:
        return None
    if device.platform != "gpu":
        return Budget(device.device_kind, limit, limit, limit)
    total = int(limit / fraction())
    highest = max(limit, int(HIGHEST_FRACTION * total))
    return Budget(device.device_kind, total, limit, highest)


def is_kind(budget: Budget, device_kind: str) -> bool:
    """Whether a budget is that of a kind of device, as JAX calls it."""
    return budget.device in (device_kind, _find(device_kind))


def fraction() -> float:
    """Return the share of a GPU's memory that JAX takes, by default 0.75.

    Raises UserError if the environment variable that sets it holds no such number.
    """
    old = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for variable in (FRACTION_VARIABLE, old):
        if text := os.environ.get(variable):
            try:
                value = float(text)
            except ValueError:
                value = 0.0
            if not 0 < value <= 1:
                raise UserError(f"{variable}={text} is not from 0 to 1; try .75")
            return value
    return DEFAULT_FRACTION


def _find(text: str) -> str | None:
    """Return the row whose words are all in a name: an L40 is no L4."""
    words = _words(text)
    rows = {name: name for name in DEVICES} | KINDS
    found = [name for name in rows if _words(name) - {"tpu"} <= words]
    return rows[max(found, key=lambda name: len(_words(name)))] if found else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))
