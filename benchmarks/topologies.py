"""Compile train steps for TPUs that are not here, and run nothing: those of CASES.

    python benchmarks/topologies.py              # all that the result does not hold yet
    python benchmarks/topologies.py enwik8       # of these configs, again

Needs the TPU compiler, pip install 'jax[tpu]', and no TPU: what is written is what the
compiler says, and nothing here has run on one. A row is written as soon as it is
compiled; rows of other versions are made anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import runpy
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package, also where it is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import processes  # noqa: E402
from sparse_flax import config as config_lib  # noqa: E402
from sparse_flax import devices, flops, memory, topology  # noqa: E402
from sparse_flax.config_checks import finalize  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "topologies.json"
ONE = "enwik8:colab", "cifar10:colab", "music:colab"
POD = "enwik8", "cifar10", "imagenet64", "imagenet64:302m", "music"
POD = (*POD, "music:262144", "music:1048576", "images", "books", "text8")
CASES = [
    *((name, "v5e:1x1") for name in ONE),
    *((name, "v5e:16x16") for name in POD),
    *((name, "v5e:4x4") for name in (*ONE, "enwik8")),
]


def configuration(name: str, chips: int) -> Any:
    """Return a config with its rows over all chips, one each where it has fewer."""
    file, _, preset = name.partition(":")
    found = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["get_config"](preset)
    found.mesh.data = chips
    for group in ("train", "eval"):
        rows = found[group].batch_size
        found[group].batch_size = math.ceil(rows / chips) * chips
    return finalize(found)[0]


def row(name: str, where: str) -> dict[str, Any]:
    """Compile one config for one topology."""
    chips = topology.describe(where)
    config = configuration(name, len(chips))
    began = time.monotonic()
    compiled = memory.compile_step(config, chips)
    seconds = time.monotonic() - began
    budget = devices.named(chips[0].device_kind)
    model = config_lib.model_config(config)
    computed = flops.train_flops(model) + flops.recomputed_flops(model)
    fits = compiled.total <= budget.usable
    return {
        "config": name,
        "topology": where,
        "batch_size": config.train.batch_size,
        "context": config.model.context,
        "state_bytes": sum(memory.state_bytes(config).values()),
        "bytes": compiled.total if math.isfinite(compiled.total) else None,
        "usable_bytes": budget.usable,
        "fits": fits,
        "flops": config.train.batch_size * computed / len(chips),
        "collectives": {k: list(sent) for k, sent in compiled.collectives.items()},
        "kernels": compiled.kernels,
        "compile_s": round(seconds, 1),
    }


def main() -> None:
    """Compile, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", help="compile these again")
    options = parser.parse_args()
    about = processes.versions("jax", "libtpu")
    old = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept = old.get("rows", []) if old.get("versions") == about else []
    rows = {
        (r["config"], r["topology"]): r
        for r in kept
        if r["config"] not in options.configs
    }
    missing = [case for case in CASES if case not in rows]
    if options.configs:
        missing = [case for case in missing if case[0] in options.configs]
    for number, (name, where) in enumerate(missing, 1):
        print(f"{number} of {len(missing)}: {name} for {where} ...", flush=True)
        rows[name, where] = made = row(name, where)
        size = memory.gib(made["bytes"] or math.inf)
        print(f"... {size} in {made['compile_s']} s", flush=True)
        ordered = [rows[case] for case in CASES if case in rows]
        processes.write(RESULT, {"versions": about, "rows": ordered})


if __name__ == "__main__":
    main()
