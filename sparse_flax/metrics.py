"""What a run writes down: JSON lines, TensorBoard events and the loss curve."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tensorboardX import SummaryWriter

from sparse_flax.workdir import WorkDir, write_atomically

COLUMNS = (
    "step",
    "split",
    "bits_per_byte",
    "weights",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "mfu",
)


class MetricsLog:
    """The rows of a run, each step once, however often the run was interrupted."""

    def __init__(self, workdir: WorkDir, *, step: int, tensorboard: bool):
        """Go on after `step`: later rows, of steps that will be run again, go."""
        self.rows = [row for row in read_rows(workdir.metrics) if row["step"] <= step]
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(workdir.metrics, lines.encode())
        self._file = open(workdir.metrics, "a", buffering=1)  # noqa: SIM115
        self._events = None
        if tensorboard:
            # Events of later steps are hidden by TensorBoard from here on.
            self._events = SummaryWriter(
                str(workdir.tensorboard), purge_step=step + 1 if step else None
            )

    def write(self, *, step: int, split: str, **values: Any) -> None:
        """Write one row; the columns that are not given are null."""
        row = dict.fromkeys(COLUMNS) | {"step": step, "split": split} | values
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        if self._events:
            for name in COLUMNS[2:]:
                if isinstance(row[name], float):
                    self._events.add_scalar(f"{split}/{name}", row[name], step)

    def find(self, split: str, step: int) -> dict[str, Any] | None:
        """Return the row of a split at a step, if there is one."""
        same = (row["split"] == split and row["step"] == step for row in self.rows)
        return next(itertools.compress(self.rows, same), None)

    def plot(self, path: Path, bigram: float | None = None) -> None:
        """Draw the loss curve; `bigram` is a line to be below."""
        plot_curve(self.rows, path, bigram)

    def close(self) -> None:
        """Flush and close every file."""
        self._file.close()
        if self._events:
            self._events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, without a last line that a kill tore."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def first_not_finite(model: Any, good_gradients: list[bool]) -> str:
    """Name the first parameter, in the order of the model, that went bad.

    Args:
      model: the parameters before the step that failed.
      good_gradients: whether each one's gradient in that step was finite.
    """
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    values = [not jnp.isfinite(leaf).all() for _, leaf in leaves]
    for what, bad in (("value", values), ("gradient", ~np.array(good_gradients))):
        for path, _ in itertools.compress(leaves, bad):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            name = name.removesuffix(".value")
            return f"the first parameter whose {what} is not finite is {name}"
    return "every parameter and gradient is finite, but their norm is not"


def plot_curve(rows: list[dict[str, Any]], path: Path, bigram: float | None) -> None:
    """Draw bits per byte against steps, training and validation, into a PNG."""
    matplotlib.use("Agg")  # works without a screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for split, style in (
        ("train", {"color": "#9ab8d8", "linewidth": 1}),
        ("validation", {"color": "#c0392b", "linewidth": 1.5, "marker": "o"}),
    ):
        points = [(r["step"], r["bits_per_byte"]) for r in rows if r["split"] == split]
        if points:
            axes.plot(*np.array(points).T, label=split, markersize=4, **style)
    if bigram:
        axes.axhline(bigram, color="#7f8c8d", linestyle="--", linewidth=1)
        axes.annotate(
            f"bigram table {bigram:.3f}",
            (0.995, bigram),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    axes.set(xlabel="step", ylabel="bits per byte", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
