"""What each implementation supports, asked of the code."""

from __future__ import annotations

import jax

from sparse_flax.attention.dispatch import IMPLEMENTATIONS
from sparse_flax.attention.patterns import (
    Blocks,
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    Summaries,
)

# Pattern, (B, T, H, H_kv, K, V), dtype; the sizes of the paper and their edges.
CASES = [
    (Dense(), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (Local(128), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (Columns(128), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (Strided(128), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (Strided(128), (8, 12288, 8, 8, 64, 64), "float16"),
    (Strided(128), (8, 12288, 8, 8, 64, 64), "float32"),
    (Strided(128), (8, 12288, 8, 2, 64, 64), "bfloat16"),
    (Strided(128), (8, 12287, 8, 8, 64, 64), "bfloat16"),
    (Strided(128), (8, 12288, 16, 16, 32, 32), "bfloat16"),
    (Strided(96), (32, 3072, 2, 2, 128, 128), "bfloat16"),
    (Strided(96), (32, 3072, 2, 2, 64, 128), "bfloat16"),
    (Strided(128), (8, 12288, 8, 8, 256, 256), "bfloat16"),
    (Strided(256), (2, 65536, 8, 8, 64, 64), "bfloat16"),
    (Strided(1024), (1, 1048576, 8, 8, 64, 64), "bfloat16"),
    (Fixed(128, 32), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (Fixed(128, 32, rotate=True), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (Blocks(128), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (Summaries(128, 32), (8, 12288, 8, 8, 64, 64), "bfloat16"),
    (PerHead((Local(128), Columns(128))), (8, 12288, 8, 8, 64, 64), "bfloat16"),
]


def support_table() -> str:
    """Return a Markdown table: which implementation takes which call, and why not.

    Devices are left out: 'hopper' needs an H100 or H200, 'cudnn' an NVIDIA GPU from
    Ampere on, 'tpu' a TPU from v4 on, the others run anywhere.
    """
    head = ["pattern", "B, T, H (key heads), K, V", "dtype", *IMPLEMENTATIONS]
    rows, notes = [], []
    for pattern, (B, T, H, H_kv, K, V), dtype in CASES:
        q, k, v = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape in ((B, T, H, K), (B, T, H_kv, K), (B, T, H_kv, V))
        )
        row = [f"`{pattern}`", f"{B}, {T:,}, {H} ({H_kv}), {K}, {V}", dtype]
        for module in IMPLEMENTATIONS.values():
            why = module.supports(pattern, q, k, v)
            if why and why not in notes:
                notes.append(why)
            row.append(f"no ({notes.index(why) + 1})" if why else "yes")
        rows.append(row)
    table = [head, ["---"] * len(head), *rows]
    lines = [f"| {' | '.join(row)} |" for row in table]
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines)
