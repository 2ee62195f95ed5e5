"""Time whole training steps: forward, backward, Adam, averaged weights.

    python benchmarks/train_step.py                   # every case, on one GPU
    python benchmarks/train_step.py --models enwik8 --patterns "Strided(128)"
    python benchmarks/train_step.py --models imagenet64 --patterns "Strided(1024)" \
        --context 1048576 --batch_size 1 --remat full

Each case runs in a process of its own, so that its peak of memory is its own: random
bytes, the paper's model at full size, `--steps` steps after three to warm up. Prints a
line a case and writes benchmarks/results/train_step.json: {hardware, versions, rows:
[{model, pattern, context, dropout, remat, unroll, batch_size, attention, tokens_per_s,
step_ms, step_ms_spread, mfu, memory_gb, command}]}. Rows measured before on the same
hardware with the same versions stay. step_ms is the median, its spread the 5th and 95th
percentile; MFU is defined in sparse_flax/flops.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a clone that is not installed
RESULTS = Path(__file__).with_name("results") / "train_step.json"

from benchmarks import processes  # noqa: E402

# (model, batch size, pattern, unroll): the paper's, and the others of its table 2. The
# unrolled ones have no loop over layers left.
CASES = [
    ("enwik8", 8, "Fixed(128, 32, rotate=True)", 30),
    ("enwik8", 8, "Strided(128)", 30),
    ("enwik8", 8, "Dense()", 30),
    ("cifar10", 32, "Columns(96), Local(96), Local(96), Local(96)", 1),
    ("cifar10", 32, "Strided(96)", 1),
    ("cifar10", 32, "Fixed(128, 32, rotate=True)", 1),
    ("cifar10", 32, "Dense()", 1),
    ("imagenet64", 8, "Local(128), Columns(128), Local(128), Local(128)", 1),
]
# What tells one row from another.
KEY = (
    "model",
    "pattern",
    "context",
    "dropout",
    "remat",
    "unroll",
    "batch_size",
    "attention",
)


def main() -> None:
    args = parse()
    if args.case:
        print(json.dumps(measure(args)))
        return
    cases = [
        (model, args.batch_size or batch, pattern, dropout, remat, args.unroll or turns)
        for (model, batch, pattern, turns), dropout, remat in itertools.product(
            cases_of(args), args.dropout, args.remat
        )
    ]
    failed, began = 0, time.monotonic()
    for number, case in enumerate(cases):
        model, batch, pattern, dropout, remat, unroll = case
        named = f"{model} {pattern} dropout {dropout} remat {remat} unroll {unroll}"
        left = (time.monotonic() - began) / max(number, 1) * (len(cases) - number)
        eta = f" | eta {left:.0f} s" if number else ""
        print(f"case {number + 1} of {len(cases)}: {named}{eta}", flush=True)
        options = ["--models", model, "--patterns", pattern, "--dropout", str(dropout)]
        options += ["--remat", remat, "--batch_size", str(batch)]
        options += ["--unroll", str(unroll), "--context", str(args.context)]
        options += ["--steps", str(args.steps), "--attention", args.attention]
        command = [sys.executable, __file__, "--case", "--trace", args.trace, *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            tail = done.stderr.strip().splitlines()[-1:] or ["no message"]
            print(f"  failed: {tail[0][:300]}", flush=True)
            failed += 1
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        row["command"] = f"python benchmarks/train_step.py {shlex.join(options)}"
        print(
            f"  {row['tokens_per_s']:,.0f} tokens/s | {row['step_ms']:.1f} ms "
            f"({row['step_ms_spread'][0]:.1f} to {row['step_ms_spread'][1]:.1f}) | "
            f"MFU {row['mfu']:.1%} | {row['memory_gb']:.1f} GB",
            flush=True,
        )
        add(row, args.out)
    if failed:
        sys.exit(f"{failed} of {len(cases)} cases failed")


def cases_of(args: argparse.Namespace) -> list[tuple[str, int, str, int]]:
    """The cases asked for; a pattern of no case is run with its models' first."""
    cases = [case for case in CASES if case[0] in args.models]
    if not args.patterns:
        return cases
    known = [case for case in cases if case[2] in args.patterns]
    others = [p for p in args.patterns if p not in {case[2] for case in known}]
    firsts = {model: (batch, turns) for model, batch, _, turns in reversed(cases)}
    known += [
        (model, batch, pattern, turns)
        for model, (batch, turns) in firsts.items()
        for pattern in others
    ]
    return known


def add(row: dict, path: Path) -> None:
    """Write a row beside those measured on the same hardware with the same versions.

    It takes the place of one that measured the same.
    """
    about = {key: row.pop(key) for key in ("hardware", "versions")}
    old = json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get(key) == value for key, value in about.items())
    rows = {tuple(r[k] for k in KEY): r for r in (old["rows"] if same else [])}
    rows[tuple(row[k] for k in KEY)] = row
    processes.write(path, {**about, "rows": [*rows.values()]})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = list(dict.fromkeys(case[0] for case in CASES))
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--patterns", nargs="+", default=[])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0])
    parser.add_argument("--remat", nargs="+", default=["attention+mlp"])
    parser.add_argument("--batch_size", type=int, default=0, help="0: each case's own")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--context", type=int, default=0, help="0: the model's own")
    parser.add_argument("--unroll", type=int, default=0, help="0: each case's own")
    parser.add_argument("--attention", default="", help="an implementation by name")
    parser.add_argument("--trace", default="", help="a folder for a profile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", action="store_true", help="one case, in here")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict:
    """Run one case and return its row."""
    import contextlib

    import jax
    import numpy as np

    from sparse_flax import config as config_lib
    from sparse_flax import devices, flops, optim, sharding, state
    from sparse_flax.config_checks import finalize
    from sparse_flax.data.batches import inputs_and_targets
    from sparse_flax.train_step import make_train_step

    config = runpy.run_path(str(ROOT / "configs" / f"{args.models[0]}.py"))
    config = config["get_config"]()
    config.model.patterns = args.patterns[0]
    config.model.dropout = args.dropout[0]
    config.model.remat = args.remat[0]
    config.model.attention = args.attention
    config.model.unroll = args.unroll
    if args.context:
        config.model.context, config.model.position_shape = args.context, ()
        config.data = config_lib.defaults().data  # none is read; pictures have one size
    config.train.batch_size = args.batch_size
    config, _ = finalize(config)
    model_config = config_lib.model_config(config)
    B, T = args.batch_size, model_config.context
    windows_BT = np.random.default_rng(0).integers(0, 256, (B, T)).astype(np.uint8)
    with jax.set_mesh(sharding.make_mesh()):
        batch = sharding.put_batch(inputs_and_targets(windows_BT))
        now = state.create(
            model_config, optim.make_optimizer(config.optim), jax.random.key(0)
        )
        step = make_train_step(config, jax.random.key(1)).lower(now, batch).compile()

        def run(steps: int) -> list[float]:
            nonlocal now
            ends = []
            for _ in range(steps):
                now, values = step(now, batch)
                values["bits_per_byte"].block_until_ready()
                ends.append(time.perf_counter())
            return ends

        run(3)
        trace = jax.profiler.trace(args.trace) if args.trace else None
        with trace or contextlib.nullcontext():
            ends = run(args.steps + 1)
    step_s = np.diff(ends)
    tokens_per_s = B * T / np.median(step_s)
    device = jax.devices()[0]
    peak = devices.peak(device.device_kind)
    used = tokens_per_s / T * flops.train_flops(model_config)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "model": args.models[0],
        "pattern": config.model.patterns,
        "context": T,
        "dropout": config.model.dropout,
        "remat": config.model.remat,
        "unroll": config.model.unroll,
        "batch_size": B,
        "attention": args.attention,
        "tokens_per_s": tokens_per_s,
        "step_ms": 1e3 * np.median(step_s),
        "step_ms_spread": list(1e3 * np.quantile(step_s, [0.05, 0.95])),
        "mfu": used / peak if peak else 0.0,
        "memory_gb": memory / 1e9,
        **processes.jax_device(),
    }


if __name__ == "__main__":
    main()
