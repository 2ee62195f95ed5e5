"""Time sampling over caches, at full size, with random weights.

    python benchmarks/sampling.py            # on one GPU, some minutes
    python benchmarks/sampling.py --quick    # small models: whether it runs

enwik8's model, its own pattern and dense attention, a window of 12,288 bytes at once
for 1 and for 64 rows: seconds a byte at a position are those of the loop that
`generate` runs, started there over caches that are empty but as large (what they hold
changes no time), best of three calls of 64 bytes. The average over the window is that
of the middles of its parts (quarters, or eighths with many rows): a call reads as far
as its part ends, so that within a part the time does not change. CIFAR-10's model: 64
images, all of their bytes, by `generate` itself, compiling left out.

The share of memory bandwidth is what a step must read (weights once, and of the caches
what the byte at this position sees) a second, of the vendor's figure.

Writes benchmarks/results/sampling.json: {hardware, versions, command, rows: [{model,
pattern, context, batch_size, bytes_per_s, ms_at: {position: ms a byte}, bandwidth_at:
{position: share}, asked (the positions to show), compile_s, seconds}]}.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import runpy
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a clone that is not installed
RESULTS = Path(__file__).with_name("results") / "sampling.json"

from benchmarks import processes  # noqa: E402
from sparse_flax import config as config_lib  # noqa: E402
from sparse_flax import devices, generate  # noqa: E402
from sparse_flax.config_checks import finalize  # noqa: E402
from sparse_flax.decoder import decoder, prefill  # noqa: E402
from sparse_flax.model import ModelConfig, SparseTransformer  # noqa: E402

BYTES = 64  # of a call that is timed
# (model, pattern or '' for its own, rows). What matters first, should time run out.
CASES = [
    *(("enwik8", pattern, rows) for pattern in ("", "Dense()") for rows in (1, 64)),
    ("cifar10", "", 64),
]


def main() -> None:
    args = parse()
    device = jax.devices()[0]
    record = {
        **processes.jax_device(),
        "command": processes.command_line(),
        "rows": [],
    }
    cases = [case for case in CASES if case[0] in args.models]
    began = time.monotonic()
    for number, (name, pattern, rows) in enumerate(cases):
        spent = time.monotonic() - began
        eta = f" | eta {spent / number * (len(cases) - number):.0f} s" if number else ""
        rows = min(rows, 4) if args.quick else rows
        print(
            f"case {number + 1} of {len(cases)}: {name} "
            f"{pattern or 'its own pattern'}, {rows} rows{eta}",
            flush=True,
        )
        config = model_config(name, pattern, args.quick)
        if name == "cifar10":
            row = images(name, config, rows)
        else:
            row = window(name, config, rows, device.device_kind)
        print(f"  {shown(row)}", flush=True)
        record["rows"].append(row)
        processes.write(args.out, record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models")
    names = list(dict.fromkeys(name for name, _, _ in CASES))
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def model_config(name: str, pattern: str, quick: bool) -> ModelConfig:
    """Return the architecture of a file in configs/, or a small one like it."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    if pattern:
        config.model.patterns = pattern
    found = config_lib.model_config(finalize(config)[0])
    if not quick:
        return found
    layers, context = len(found.patterns), 1024
    small = {"width": 16, "qk_width": 16, "feed_forward": 16, "heads": 2}
    return dataclasses.replace(found, layers=layers, context=context, **small)


def window(name: str, config: ModelConfig, rows: int, kind: str) -> dict:
    """Time a byte at some positions of a window, and average over all of it."""
    T = config.context
    ends = sorted({generate.reach(end, T, rows) for end in range(1, T + 1)})
    middles = [(a + b) // 2 for a, b in itertools.pairwise([0, *ends])]
    asked = [round(500 / 12288 * T), min(round(12000 / 12288 * T), T - BYTES)]
    model = make(config)
    weights = jax.block_until_ready(decoder(model))
    del model
    caches = empty_caches(config, rows)
    bytes_BT = jnp.zeros((rows, T), jnp.int32)
    lengths_B = jnp.zeros(rows, jnp.int32)
    keys_B = jax.random.split(jax.random.key(0), rows)
    seconds, compile_s, compiled = {}, 0.0, set()
    for position in sorted({*middles, *asked}):
        reach = generate.reach(position + BYTES, T, rows)
        best = float("inf")
        for _ in range(3 + (reach not in compiled)):
            began = time.perf_counter()
            bytes_BT, caches = generate._sample(
                weights,
                caches,
                bytes_BT,
                (position, position + BYTES),
                lengths_B,
                keys_B,
                1.0,
                None,
                reach=reach,
            )
            bytes_BT.block_until_ready()
            took = time.perf_counter() - began
            if reach in compiled:
                best = min(best, took)
            else:
                compiled.add(reach)
                compile_s += took
        seconds[position] = best / BYTES
    average = sum(seconds[position] for position in middles) / len(middles)
    bandwidth = devices.bandwidth(kind)
    held = sum(x.nbytes for x in jax.tree.leaves(weights))
    shares = {
        position: (held + rows * cache_bytes(config, position))
        / seconds[position]
        / bandwidth
        for position in seconds
        if bandwidth
    }
    return {
        "model": name,
        "pattern": ", ".join(map(repr, config.patterns)),
        "batch_size": rows,
        "context": T,
        "bytes_per_s": rows / average,
        "ms_at": {str(p): 1e3 * s for p, s in seconds.items()},
        "bandwidth_at": {str(p): share for p, share in shares.items()},
        "asked": asked,
        "compile_s": compile_s,
    }


def images(name: str, config: ModelConfig, rows: int) -> dict:
    """Sample whole images, twice, and time the second time."""
    model, count = make(config), config.context
    took = []
    for _ in range(2):
        began = time.perf_counter()
        sampled = generate.generate(model, [b""] * rows, count, seed=0, say=print)
        took.append(time.perf_counter() - began)
    assert all(len(image) == count for image in sampled)
    return {
        "model": name,
        "pattern": ", ".join(map(repr, config.patterns)),
        "batch_size": rows,
        "context": count,
        "bytes_per_s": rows * count / took[1],
        "seconds": took[1],
        "compile_s": took[0] - took[1],
    }


def make(config: ModelConfig) -> SparseTransformer:
    return jax.jit(functools.partial(SparseTransformer, config))(jax.random.key(0))


def empty_caches(config: ModelConfig, rows: int):
    """Return the caches that no prompt leaves, without running the model for them."""
    make_caches = functools.partial(prefill, T=config.context)
    model = jax.eval_shape(
        functools.partial(SparseTransformer, config), jax.random.key(0)
    )
    inputs = jax.ShapeDtypeStruct((rows, 64), jnp.int32)
    shapes = jax.eval_shape(make_caches, model, inputs, 0)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def cache_bytes(config: ModelConfig, position: int) -> int:
    """Count the bytes of keys and values that one row's byte at a position sees."""
    H, width = config.heads, config.qk_width + config.width
    seen = sum(
        part.pairs(position + 1) - part.pairs(position)
        for layer in range(config.layers)
        for head in range(H)
        for part in config.patterns[layer % len(config.patterns)].parts(head)
    )
    return seen * width // H * jnp.dtype(config.dtype).itemsize


def shown(row: dict) -> str:
    if "seconds" in row:
        return f"{row['seconds']:.1f} s | {row['bytes_per_s']:,.0f} bytes/s"
    at = [
        f"{row['ms_at'][str(p)]:.3f} ms at {p:,}"
        + (f" ({row['bandwidth_at'][str(p)]:.0%})" if row["bandwidth_at"] else "")
        for p in row["asked"]
    ]
    speed = f"{row['bytes_per_s']:,.0f} bytes/s"
    return " | ".join([speed, *at, f"compiled in {row['compile_s']:.0f} s"])


if __name__ == "__main__":
    main()
