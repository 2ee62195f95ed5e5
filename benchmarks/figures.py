"""Draw the README's figure of time against T from benchmarks/results/attention.json.

python benchmarks/figures.py           # writes docs/attention_growth.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "attention.json"
FIGURE = ROOT / "docs" / "attention_growth.png"


def growth(result: dict) -> Figure:
    """Time of a sequence, forward and backward, and forward alone: ours and dense."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for dense, name, color in (
        (False, "Strided(sqrt(T))", "#c0392b"),
        (True, "dense, cuDNN", "#7f8c8d"),
    ):
        rows = [
            row
            for row in result["rows"]
            if (row["pattern"] == "Dense()") == dense and row["fwdbwd_ms"]
        ]
        rows.sort(key=lambda row: row["shape_BTHKV"][1])
        T = [row["shape_BTHKV"][1] for row in rows]
        for key, what, style in (
            ("fwdbwd_ms", "forward and backward", "-"),
            ("fwd_ms", "forward", "--"),
        ):
            ms = [row[key] / row["shape_BTHKV"][0] for row in rows]
            label = f"{name}, {what}"
            axes.plot(T, ms, style, color=color, marker="o", markersize=4, label=label)
    axes.set(
        xlabel="tokens T",
        ylabel="ms a sequence",
        title=f"Attention, 8 heads of 64, bfloat16, {result['hardware']}",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    if not RESULTS.exists() or "growth" not in (
        result := json.loads(RESULTS.read_text())
    ):
        sys.exit(f"{RESULTS} has no growth; run benchmarks/attention.py first")
    growth(result["growth"]).savefig(FIGURE, dpi=100)
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    main()
