"""Time a PyTorch user's training step of the paper's enwik8 model, on one GPU.

    python benchmarks/peers/torch_train.py
    python benchmarks/peers/torch_train.py --kinds dense --remat full

Needs torch (written for 2.11) and no jax. 30 layers, 512 wide, 8 heads, 12,288 bytes,
without dropout; torch.compile, bfloat16 autocast, fused AdamW. `dense` is cuDNN's
attention, `strided` and `fixed` are those of torch_attention.py. Each kind runs in a
process of its own and may take --kind_minutes, compilation included. Writes
benchmarks/results/torch_train.json in the form of train_step.json; a kind that came to
nothing has a `note` in place of numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import processes  # noqa: E402
from benchmarks.peers import torch_attention  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "torch_train.json"
LAYERS, D, H, T, STRIDE, SUMMARY = 30, 512, 8, 12288, 128, 32
K, ROWS = D // H, T // STRIDE
PATTERNS = {
    "dense": "Dense()",
    "strided": f"Strided(stride={STRIDE})",
    "fixed": f"Fixed(block={STRIDE}, summary={SUMMARY}, offset=0, rotate=False)",
}


def make_attention(kind: str, batch: int):
    """(q, k, v) -> out, [B, H, T, K] each."""
    shape, mask = (batch, H, T, K), torch_attention.compiled_block_mask
    if kind == "strided":
        return torch_attention.strided(shape, STRIDE, mask)
    if kind == "fixed":
        return torch_attention.fixed(shape, STRIDE, SUMMARY, mask)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    """A residual block: attention, then the two layers with the paper's activation."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.attention = attention

    def forward(self, x):
        """x_BTD -> x_BTD."""
        B = x.shape[0]
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).reshape(B, T, D))
        h = self.up(self.norm2(x))
        return x + self.down(h * torch.sigmoid(1.702 * h))


class Model(nn.Module):
    """Bytes to the mean cross entropy of the next ones."""

    def __init__(self, attention, remat: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, D)
        self.row, self.column = nn.Embedding(ROWS, D), nn.Embedding(STRIDE, D)
        self.blocks = nn.ModuleList([Block(attention) for _ in range(LAYERS)])
        self.norm, self.logits = nn.LayerNorm(D), nn.Linear(D, 256, bias=False)
        self.remat = remat

    def forward(self, bytes_BT):
        """Return the loss, in nats a byte."""
        i = torch.arange(T, device=bytes_BT.device)
        x = self.embed(bytes_BT) + self.row(i // STRIDE) + self.column(i % STRIDE)
        x = pad(x[:, :-1], (0, 0, 1, 0))
        for block in self.blocks:
            if self.remat == "full":
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits = self.logits(self.norm(x))
        return cross_entropy(logits.flatten(0, 1), bytes_BT.flatten())


def measure(kind: str, batch: int, remat: str, steps: int) -> dict[str, Any]:
    """Time one kind and return its row."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = Model(make_attention(kind, batch), remat).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    loss_of = torch.compile(model)
    bytes_BT = torch.randint(0, 256, (batch, T), device="cuda")
    backends = [SDPBackend.CUDNN_ATTENTION]

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(backends):
            loss = loss_of(bytes_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    began = time.perf_counter()
    step()
    first_step_s = time.perf_counter() - began
    for _ in range(3):
        step()
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - began))
    step_ms = statistics.median(taken)
    cut = statistics.quantiles(taken, n=20)
    return {
        "tokens_per_s": batch * T / step_ms * 1e3,
        "step_ms": step_ms,
        "step_ms_spread": [cut[0], cut[-1]],
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_step_s": first_step_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--remat", choices=["none", "full"], default="none")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kind_minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--kind", help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args()
    if options.kind:
        row = measure(options.kind, options.batch_size, options.remat, options.steps)
        print(json.dumps(row))
        return
    result = {
        "hardware": f"1 x {torch.cuda.get_device_name()}",
        "versions": processes.versions("torch", "triton"),
        "command": processes.command_line(),
        "rows": [],
    }
    for number, kind in enumerate(options.kinds):
        left = options.kind_minutes * (len(options.kinds) - number)
        print(f"{kind} | all in at most {left:g} minutes", flush=True)
        row = {
            "model": "enwik8",
            "implementation": "torch",
            "pattern": PATTERNS[kind],
            "batch_size": options.batch_size,
            "dropout": 0.0,
            "remat": options.remat,
        }
        command = [sys.executable, __file__, "--kind", kind, "--remat", options.remat]
        command += ["--batch_size", str(options.batch_size)]
        command += ["--steps", str(options.steps)]
        row |= outcome(command, 60 * options.kind_minutes)
        print(f"  {row}", flush=True)
        result["rows"].append(row)
        processes.write(options.out, result)


def outcome(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a kind's process; its numbers, or a note on what became of it."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"note": f"not done after {seconds:g} s, compilation included"}
    if done.returncode:
        return {"note": "failed"}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
