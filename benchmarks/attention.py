"""Time every implementation of attention, and dense cuDNN, on this machine's GPU.

    python benchmarks/attention.py                      # all cases, three processes
    python benchmarks/attention.py --cases enwik8 audio --quick

Milliseconds are medians over processes of the median of several samples; a sample is
many calls dispatched one after the other and waited for once, so that the cost of a
launch stays out. `error` is the worst relative 2-norm among the output and the
gradients of q, k and v, against `gathered` in float32 on one sequence and one head.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package, also where it is not installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from sparse_flax import attention  # noqa: E402
from sparse_flax.attention import (  # noqa: E402
    Columns,
    Dense,
    Fixed,
    Local,
    Strided,
    sparse_attention,
)
from sparse_flax.progress import duration  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "attention.json"
PROCESSES = 3
SAMPLES = 5
SECONDS = 0.04  # a sample takes about so long, and makes at most CALLS calls
CALLS = 40
CUDNN = "dense cuDNN"

# Case: ((B, T, H, K, V), patterns). Sizes are the paper's, and a longer one.
CASES = {
    "enwik8": (
        (8, 12288, 8, 64, 64),
        [
            Strided(128),
            Columns(128),
            Local(128),
            Fixed(128, 32),
            Fixed(128, 32, rotate=True),
        ],
    ),
    "cifar10": ((32, 3072, 2, 128, 128), [Strided(96), Columns(96), Local(96)]),
    "cifar10_half": ((32, 3072, 2, 64, 128), [Strided(96), Columns(96), Local(96)]),
    "imagenet64": ((8, 12288, 16, 32, 32), [Strided(128), Columns(128), Local(128)]),
    "audio": ((2, 65536, 8, 64, 64), [Strided(256), Columns(256), Local(256)]),
    "long": ((1, 1048576, 8, 64, 64), [Strided(1024)]),
}


def todo(cases: list[str], device_kind: str) -> list[tuple]:
    """List (case, pattern, implementation); 'reference' is no way to compute."""
    rows = []
    for case in cases:
        (B, T, H, K, V), patterns = CASES[case]
        q = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)
        v = jax.ShapeDtypeStruct((B, T, H, V), jnp.bfloat16)
        for pattern in patterns:
            for name, module in attention.IMPLEMENTATIONS.items():
                refused = module.runs_on(device_kind)
                refused = refused or module.supports(pattern, q, q, v)
                if name != "reference" and not refused:
                    rows.append((case, pattern, name))
        if K == V and "NVIDIA" in device_kind:  # cuDNN takes one width
            rows.append((case, Dense(), CUDNN))
    return rows


def attend(pattern, implementation, q, k, v):
    """The call that is timed."""
    if implementation == CUDNN:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    return sparse_attention(q, k, v, pattern, implementation=implementation)


def inputs(shape, dtype=jnp.bfloat16):
    """q, k, v and the output's gradient."""
    B, T, H, K, V = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (B, T, H, width), dtype)
        for key, width in zip(keys, (K, K, V, V), strict=True)
    ]


def value_and_gradients(run):
    """(q, k, v, d_out) -> (out, dq, dk, dv), compiled."""

    def call(q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(d_out)

    return jax.jit(call)


def milliseconds(run, args, samples: int) -> float:
    """The median over samples of a call's time."""
    jax.block_until_ready(run(*args))
    began = time.perf_counter()
    jax.block_until_ready(run(*args))
    once = time.perf_counter() - began
    calls = max(1, min(CALLS, round(SECONDS / once)))
    taken = []
    for _ in range(samples):
        began = time.perf_counter()
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - began) / calls * 1e3)
    return statistics.median(taken)


@functools.lru_cache(maxsize=1)
def exact(pattern, T: int, K: int, V: int):
    """Output and gradients in float32, on one sequence and one head."""
    args = inputs((1, T, 1, K, V))
    with jax.default_matmul_precision("highest"):
        run = functools.partial(attend, pattern, "gathered")
        return value_and_gradients(run)(*(x.astype(jnp.float32) for x in args))


def error(pattern, implementation, T: int, K: int, V: int) -> float:
    """The worst relative 2-norm of the output's and the gradients' error."""
    run = functools.partial(attend, pattern, implementation)
    got = value_and_gradients(run)(*inputs((1, T, 1, K, V)))
    return max(
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(got, exact(pattern, T, K, V), strict=True)
    )


def measure(case: str, pattern, implementation: str, samples: int) -> dict:
    """One row; where memory does not suffice it says so and has no times."""
    shape, _ = CASES[case]
    row = {"case": case, "pattern": repr(pattern), "implementation": implementation}
    run = functools.partial(attend, pattern, implementation)
    try:
        args = inputs(shape)
        row["fwd_ms"] = milliseconds(jax.jit(run), args[:3], samples)
        row["fwdbwd_ms"] = milliseconds(value_and_gradients(run), args, samples)
        del args
        _, T, _, K, V = shape
        # Dense over a million tokens in float32 takes minutes, and tells nothing new.
        tell = implementation != CUDNN or T <= 2**17
        row["error"] = error(pattern, implementation, T, K, V) if tell else None
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" not in str(problem):
            raise
        row |= {"fwd_ms": None, "fwdbwd_ms": None, "error": None}
        row["note"] = "out of memory"
    return row


def one_process(cases: list[str], samples: int, out: str) -> None:
    """Measure all rows and write them; a line and the time left for each."""
    rows = todo(cases, jax.devices()[0].device_kind)
    began, done = time.monotonic(), []
    for case, pattern, name in rows:
        row = measure(case, pattern, name, samples)
        done.append(row)
        each = (time.monotonic() - began) / len(done)
        times = " / ".join(
            f"{row[key]:.3f}" if row[key] else "-" for key in ("fwd_ms", "fwdbwd_ms")
        )
        print(
            f"{len(done)}/{len(rows)} | {case} {pattern} {name} | {times} ms | "
            f"error {row['error'] or 0:.1e} | "
            f"eta {duration(each * (len(rows) - len(done)))}",
            flush=True,
        )
    pathlib.Path(out).write_text(json.dumps(done))


def combine(runs: list[list[dict]]) -> list[dict]:
    """The median over processes of every number."""
    rows = []
    for same in zip(*runs, strict=True):
        row = dict(same[0])
        for key in ("fwd_ms", "fwdbwd_ms", "error"):
            values = [other[key] for other in same if other[key] is not None]
            row[key] = float(f"{statistics.median(values):.4g}") if values else None
        rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Start the processes one after the other and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--quick", action="store_true", help="one process, three samples"
    )
    parser.add_argument("--out", default=str(RESULTS), help="the JSON file to write")
    parser.add_argument("--rows-of-one-process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    samples = 3 if options.quick else SAMPLES
    if options.rows_of_one_process:
        one_process(options.cases, samples, options.rows_of_one_process)
        return
    processes = 1 if options.quick else PROCESSES
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(processes):
            print(f"process {i + 1} of {processes}", flush=True)
            out = pathlib.Path(folder, f"{i}.json")
            command = [sys.executable, __file__, "--cases", *options.cases]
            command += ["--quick"] * options.quick + ["--rows-of-one-process", str(out)]
            # Each has the whole card: this process touches no device before they end.
            subprocess.run(command, check=True)
            runs.append(json.loads(out.read_text()))
    device = jax.devices()[0]
    result = {
        "hardware": f"{jax.device_count()} x {device.device_kind}",
        "versions": versions(),
        "processes": processes,
        "rows": combine(runs),
    }
    out = pathlib.Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
