"""Time what a PyTorch user gets on the paper's attention shapes, on one GPU.

    python benchmarks/peers/torch_attention.py

Needs torch (written for 2.11) and no jax. Dense attention by cuDNN and FlashAttention
2; Strided and Fixed as the fastest that we know: FlexAttention, compiled, once over
the window or the blocks and once over re-laid columns or gathered summaries, merged by
their log-sum-exps. Timed, and written to benchmarks/results/torch_attention.json, as
benchmarks/attention.py does; `error` is taken up to EXACT_T tokens.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import processes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "torch_attention.json"
ROW_SECONDS = 120
EXACT_T = 16384  # float32 scores of more tokens take too much memory

# Case: B, H, T, K, stride or block, and the width of summaries where Fixed is timed.
CASES = {
    "enwik8": (8, 8, 12288, 64, 128, 32),
    "cifar10": (32, 2, 3072, 128, 96, None),
    "audio": (2, 8, 65536, 64, 256, None),
}
DENSE, FLEX = "Dense()", "torch FlexAttention, re-laid pair"
BACKENDS = {
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch FlashAttention 2": SDPBackend.FLASH_ATTENTION,
}


def todo() -> list[dict[str, Any]]:
    """What there is to measure, a row each without its numbers."""
    rows = []
    for case, (B, H, T, K, l, c) in CASES.items():
        named = [(DENSE, name) for name in BACKENDS]
        named.append((f"Strided(stride={l})", FLEX))
        if c:
            fixed = f"Fixed(block={l}, summary={c}, offset=0, rotate=False)"
            named.append((fixed, FLEX))
        rows += [
            {
                "case": case,
                "shape_BTHKV": [B, T, H, K, K],
                "pattern": pattern,
                "implementation": implementation,
            }
            for pattern, implementation in named
        ]
    return rows


def merge(out1, lse1, out2, lse2):
    """Softmax over two disjoint sets of keys, from the outputs over each."""
    top = torch.maximum(lse1, lse2)
    a, b = torch.exp(lse1 - top)[..., None], torch.exp(lse2 - top)[..., None]
    return ((a * out1 + b * out2) / (a + b)).to(out1.dtype)


def strided(shape, stride: int, block_mask):
    """(q, k, v) -> out: the window as it is, columns on a view that makes them rows."""
    B, H, T, K = shape
    R = T // stride
    window = block_mask(lambda b, h, i, j: (i >= j) & (i - j < stride), T, T)
    earlier = block_mask(lambda b, h, i, j: i > j, R, R)

    def fold(x):
        x = x.view(B, H, R, stride, K).permute(0, 3, 1, 2, 4)
        return x.reshape(B, stride * H, R, K)

    def run(q, k, v):
        out1, lse1 = flex_attention(q, k, v, block_mask=window, return_lse=True)
        out2, lse2 = flex_attention(
            fold(q), fold(k), fold(v), block_mask=earlier, return_lse=True
        )
        out2 = out2.view(B, stride, H, R, K).permute(0, 2, 3, 1, 4).reshape(B, H, T, K)
        lse2 = lse2.view(B, stride, H, R).permute(0, 2, 3, 1).reshape(B, H, T)
        return merge(out1, lse1, out2, lse2)

    return run


def fixed(shape, block: int, summary: int, block_mask):
    """(q, k, v) -> out: the own block, and the gathered summaries of earlier ones."""
    B, H, T, K = shape
    N = T // block
    own = block_mask(lambda b, h, i, j: (i // block == j // block) & (i >= j), T, T)
    past = block_mask(lambda b, h, i, j: j // summary < i // block, T, N * summary)

    def last(x):
        x = x.view(B, H, N, block, K)[:, :, :, block - summary :]
        return x.reshape(B, H, N * summary, K)

    def run(q, k, v):
        out1, lse1 = flex_attention(q, k, v, block_mask=own, return_lse=True)
        out2, lse2 = flex_attention(
            q, last(k), last(v), block_mask=past, return_lse=True
        )
        return merge(out1, lse1, out2, lse2)

    return run


def compiled_block_mask(mask, queries: int, keys: int):
    """Make a BlockMask by tiles, without queries x keys values in memory."""
    make = torch.compile(create_block_mask, dynamic=False)
    return make(mask, None, None, queries, keys, device="cuda")


def attention(row: dict[str, Any]):
    """(q, k, v) -> out for a row."""
    B, H, T, K, l, c = CASES[row["case"]]
    if row["pattern"] == DENSE:

        def dense(q, k, v):
            with sdpa_kernel(BACKENDS[row["implementation"]]):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        return dense
    if row["pattern"].startswith("Strided"):
        run = strided((B, H, T, K), l, compiled_block_mask)
    else:
        run = fixed((B, H, T, K), l, c, compiled_block_mask)
    return torch.compile(run, dynamic=False)


def mask_of(row: dict[str, Any], device: str) -> torch.Tensor:
    """Return mask_TT: who sees whom."""
    _, _, T, _, l, c = CASES[row["case"]]
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    if row["pattern"] == DENSE:
        return j <= i
    if row["pattern"].startswith("Strided"):
        return (j <= i) & ((i - j < l) | ((i - j) % l == 0))
    return (j <= i) & ((i // l == j // l) | (j % l >= l - c))


def value_and_gradients(run, q, k, v, d_out) -> list[torch.Tensor]:
    """Return out, dq, dk, dv."""
    out = run(q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), d_out)]


def exact(mask, q, k, v):
    """Attention in q's dtype, with all scores in memory."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def error(got, row: dict[str, Any], args) -> float | None:
    """The worst relative 2-norm among out, dq, dk, dv, in the last sequence's head."""
    if args[0].shape[2] > EXACT_T:
        return None
    args = [x[-1:, -1:].detach().float().requires_grad_() for x in args]
    run = functools.partial(exact, mask_of(row, args[0].device.type))
    return max(
        float((a[-1:, -1:].float() - b).norm() / b.norm())
        for a, b in zip(got, value_and_gradients(run, *args), strict=True)
    )


def measure(row: dict[str, Any], with_error: bool) -> dict[str, Any]:
    """One row."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    B, H, T, K, *_ = CASES[row["case"]]
    args = [
        torch.randn(B, H, T, K, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    ]
    run = attention(row)

    def wait(_):
        torch.cuda.synchronize()

    with torch.no_grad():
        fwd_ms = processes.milliseconds(lambda: run(*args[:3]), wait)
    for x in args[:3]:
        x.requires_grad_()
    both = functools.partial(value_and_gradients, run, *args)
    fwdbwd_ms = processes.milliseconds(both, wait)
    row = {**row, "fwd_ms": fwd_ms, "fwdbwd_ms": fwdbwd_ms}
    row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if with_error:
        row["error"] = error(both(), row, args)
    return row


def one_process(options: argparse.Namespace) -> int:
    """Measure the rows that the record lacks, and return the exit status."""
    about = {
        "hardware": f"1 x {torch.cuda.get_device_name()}",
        "versions": processes.versions("torch", "triton")
        | {"cudnn": str(torch.backends.cudnn.version())},
    }
    record = processes.Record(options.record, about)
    rows, began = todo(), time.monotonic()
    for number, row in enumerate(rows):
        key = f"{row['case']} {row['pattern']} {row['implementation']}"
        if key in record.rows:
            continue
        if time.time() > options.deadline:
            return processes.OUT_OF_TIME
        record.begin(key, row)
        row = measure(row, options.number == 0)
        record.add(key, row)
        left = (time.monotonic() - began) / (number + 1) * (len(rows) - number - 1)
        print(
            f"{number + 1}/{len(rows)} | {key} | {row['fwd_ms']:.3f} / "
            f"{row['fwdbwd_ms']:.3f} ms | error {row.get('error') or 0:.1e} | "
            f"eta {left:.0f} s",
            flush=True,
        )
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=processes.PROCESSES)
    parser.add_argument("--minutes", type=float, default=60, help="stop by then")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    for name, kind in (("--number", int), ("--record", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # of one process
    options = parser.parse_args()
    if options.record:
        sys.exit(one_process(options))
    deadline = time.time() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        # What the first process compiles serves the others.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder, "triton")))

        def command(number: int, record: Path) -> list[str]:
            line = [sys.executable, __file__, "--number", str(number)]
            return [*line, "--record", str(record), "--deadline", str(deadline)]

        records, missing = processes.measure_all(
            command, options.out, options.processes, ROW_SECONDS
        )
    result = {
        **(records[0].about or {}),
        "command": processes.command_line(),
        "rows": processes.combine([record.rows for record in records]),
    }
    processes.finish(options.out, result, missing, options.processes)


if __name__ == "__main__":
    main()
