"""Draw the README's figures, but for the curves, which are of runs.

    python benchmarks/figures.py

Writes into docs/:

    patterns.png           who sees whom
    attention_growth.png   time against T, from benchmarks/results/attention.json
    music.png              sound that a model went on with, from benchmarks/results/
                           models/continued-*.ogg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import soundfile
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package, also where it is not installed

from sparse_flax.attention import (  # noqa: E402
    Blocks,
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    Summaries,
)
from sparse_flax.visualize.mask_figure import (  # noqa: E402
    draw_mask,
    in_two_steps,
    share_of_past,
)

RESULTS = ROOT / "benchmarks" / "results" / "attention.json"
DOCS = ROOT / "docs"
SOUNDS = ROOT / "benchmarks" / "results" / "models"
GIVEN_SECONDS = 0.65  # of each of them
PATTERNS = {
    "Dense()": Dense(),
    "Local(8)": Local(8),
    "Columns(8)": Columns(8),
    "Strided(8)": Strided(8),
    "Blocks(8)": Blocks(8),
    "Summaries(8, 2)": Summaries(8, 2),
    "Fixed(8, 2)": Fixed(8, 2),
    "PerHead((Local(8),\nColumns(8)))": PerHead((Local(8), Columns(8))),
}


def patterns(tokens: int = 32) -> Figure:
    """Every pattern's mask, of all its heads, and what two layers of it reach."""
    figure = Figure(figsize=(14, 2.4), layout="constrained")
    panels = figure.subplots(1, len(PATTERNS))
    for axes, (name, pattern) in zip(panels, PATTERNS.items(), strict=True):
        heads = range(pattern.head_period)
        mask = np.any([pattern.mask(tokens, head) for head in heads], axis=0)
        reached = in_two_steps(mask, mask)
        draw_mask(axes, mask, name if "\n" in name else f"\n{name}", reached)
        axes.set_xlabel(
            f"{share_of_past(mask):.0%}, in two {share_of_past(reached):.0%}",
            fontsize=8,
        )
    return figure


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


def continued(paths: list[Path]) -> Figure:
    """Spectrograms, with a line where what was given ends."""
    figure = Figure(figsize=(8, 1.4 * len(paths)), layout="constrained")
    for axes, path in zip(
        figure.subplots(len(paths), squeeze=False)[:, 0], paths, strict=True
    ):
        samples, rate = soundfile.read(path)
        axes.specgram(samples + 1e-6, NFFT=256, noverlap=224, Fs=rate, cmap="magma")
        axes.axvline(GIVEN_SECONDS, color="#ff7800", linewidth=2)
        axes.set(ylabel="Hz", xlim=(0, len(samples) / rate), ylim=(0, rate / 2))
    axes.set_xlabel("seconds: given to the left of the line, sampled to the right")
    return figure


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    _write(continued(sorted(SOUNDS.glob("continued-*.ogg"))), "music.png")
    _write(patterns(), "patterns.png")
    if not RESULTS.exists() or "growth" not in (
        result := json.loads(RESULTS.read_text())
    ):
        sys.exit(f"{RESULTS} has no growth; run benchmarks/attention.py first")
    _write(growth(result["growth"]), "attention_growth.png")


def _write(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / name, dpi=100)
    print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    main()
