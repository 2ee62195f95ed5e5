"""Count what the devices of one sequence send each other, as compiled for TPUs.

    python benchmarks/context_bytes.py

Attention alone, forward and backward, compiled by the TPU's compiler for eight v5e that
are not here (pip install 'jax[tpu]'): the results of the program's own collectives, of
one device. Beside it ring attention, by arithmetic: every device sees the keys and
values of all others pass by, forward and again backward, and then their gradients.
Nothing is run or timed.

Writes benchmarks/results/context_bytes.json: {hardware, versions, command, shape_BTHK,
devices, ring_bytes, rows: [{pattern, sent: {collective: [calls, bytes]}, bytes}]}.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a clone that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from benchmarks import processes  # noqa: E402
from sparse_flax import program, topology  # noqa: E402
from sparse_flax.attention import parse, sparse_attention  # noqa: E402
from sparse_flax.sharding import make_mesh  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "context_bytes.json"
TOPOLOGY = "v5e:2x4"
B, T, H, K = 1, 65536, 8, 64
PATTERNS = (
    "Local(256), Columns(256), Strided(256), Fixed(128, 32), "
    "Fixed(128, 32, rotate=True), Summaries(128, 8), Blocks(128), Dense()"
)


def main() -> None:
    chips = topology.describe(TOPOLOGY)
    shard = B * T // len(chips) * H * K * jnp.bfloat16.dtype.itemsize
    record = {
        "hardware": f"{len(chips)} x {chips[0].device_kind}, compiled and not run",
        "versions": processes.versions("jax", "jaxlib", "libtpu"),
        "command": "python benchmarks/context_bytes.py",
        "shape_BTHK": [B, T, H, K],
        "devices": len(chips),
        # Two arrays forward, two and their two gradients backward, from each other one.
        "ring_bytes": 6 * (len(chips) - 1) * shard,
        "rows": [],
    }
    for pattern in parse(PATTERNS):
        sent = exchanged(pattern, chips)
        record["rows"].append(
            {
                "pattern": repr(pattern),
                "sent": {kind: list(what) for kind, what in sorted(sent.items())},
                "bytes": sum(what.bytes for what in sent.values()),
            }
        )
        print(record["rows"][-1], flush=True)
    processes.write(RESULT, record)


def exchanged(pattern, chips) -> dict[str, program.Sent]:
    """Compile attention and its gradient, and read its collectives."""
    mesh = make_mesh(context=len(chips), devices=chips)
    like = jax.ShapeDtypeStruct(
        (B, T, H, K),
        jnp.bfloat16,
        sharding=NamedSharding(mesh, P(None, "context", None, None)),
    )

    def both(q, k, v, d_out):
        out, pull = jax.vjp(lambda *x: sparse_attention(*x, pattern), q, k, v)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(*[like] * 4).compile().as_text()
    return program.collectives(text)


if __name__ == "__main__":
    main()
