"""What a run writes down: JSON lines, TensorBoard events and the loss curve."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from sparse_flax import devices, flops, processes
from sparse_flax.data.bigram import Baseline
from sparse_flax.model import ModelConfig
from sparse_flax.workdir import WorkDir, write_atomically, writing

COLUMNS = (
    "step",
    "split",
    "bits_per_byte",
    "weights",
    "windows",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "tokens_per_s",
    "mfu",
)


class MetricsLog:
    """The rows of a run, each step once, however often the run was interrupted.

    Process 0 reads and writes them; the others keep what they are given to themselves.
    """

    def __init__(self, workdir: WorkDir, *, step: int, tensorboard: bool):
        """Go on after `step`: later rows, of steps that will be run again, go."""
        self._path, self._events, self.rows = workdir.metrics, None, []
        if not processes.is_first():
            return
        rows = read_rows(workdir.metrics)
        self.rows = [row for row in rows if row.get("step", math.inf) <= step]
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(workdir.metrics, lines.encode())
        self._events = Events(workdir.tensorboard, step) if tensorboard else None

    def write(self, *, step: int, split: str, **values: Any) -> None:
        """Write one row; the columns that are not given are null."""
        row = dict.fromkeys(COLUMNS) | {"step": step, "split": split} | values
        self.rows.append(row)
        if not processes.is_first():
            return
        with writing(self._path), open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._events:
            numbers = {k: v for k, v in values.items() if isinstance(v, float)}
            self._events.write(step, {f"{split}/{k}": v for k, v in numbers.items()})

    def find(self, **values: Any) -> dict[str, Any] | None:
        """Return the first row that has these values, if there is one."""
        same = (values.items() <= row.items() for row in self.rows)
        return next(itertools.compress(self.rows, same), None)

    def plot(
        self, path: Path, baseline: Baseline | None = None, unit: str = "byte"
    ) -> None:
        """Draw the loss curve, in bits by the unit, and a baseline to be below."""
        if processes.is_first():
            plot_curve(self.rows, path, baseline, unit)

    def close(self) -> None:
        """Close what is open."""
        if self._events:
            self._events.close()


class Events:
    """A TensorBoard event file, begun by the first row.

    Not tensorboardX's SummaryWriter: that writes from a thread, and once the disk is
    full the thread is dead and the run waits for it for ever.
    """

    def __init__(self, folder: Path, step: int):
        """Go on after `step`; TensorBoard hides what was written of later ones."""
        self._folder, self._first = folder, step
        self._file: EventsWriter | None = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the scalars of a step through to the disk."""
        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        with writing(self._folder):
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                # The suffix keeps apart what starts within a second.
                self._file = EventsWriter(str(self._folder / "events"), f".{step}")
                restart = SessionLog(status=SessionLog.START)
                self._add(self._first + 1, session_log=restart)
            self._add(step, summary=Summary(value=scalars))
            self._file.flush()

    def _add(self, step: int, **what: Any) -> None:
        assert self._file is not None
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        """Close the file, which is complete since the last row."""
        if self._file:
            with contextlib.suppress(OSError):  # it repeats what has been raised
                self._file.close()


def train_row(
    values: dict[str, Any],
    sequences_per_s: float,
    model_config: ModelConfig,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Return the columns of a training step from what the train step returned.

    MFU is of the devices of the mesh together, and null where their peak is not known.
    """
    peak = devices.peak(mesh.devices.flat[0].device_kind)
    used = sequences_per_s * flops.train_flops(model_config)
    is_float16 = model_config.dtype == "float16"
    return {
        "bits_per_byte": float(values["bits_per_byte"]),
        "weights": "raw",
        "learning_rate": float(values["learning_rate"]),
        "grad_norm": None if values["skipped"] else float(values["grad_norm"]),
        "loss_scale": float(values["loss_scale"]) if is_float16 else None,
        "tokens_per_s": sequences_per_s * model_config.context,
        "mfu": used / (peak * mesh.size) if peak else None,
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, without a last line that a kill tore."""
    rows: list[Any] = []
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def first_not_finite(model: Any, good_gradients: list[bool]) -> str:
    """Name the first parameter, in the order of the tree, that went bad.

    Args:
      model: the parameters before the step that failed.
      good_gradients: whether each one's gradient in that step was finite; empty where
        there was no gradient.
    """
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    values = [not jnp.isfinite(leaf).all() for _, leaf in leaves]
    for what, bad in (("value", values), ("gradient", np.logical_not(good_gradients))):
        for path, _ in itertools.compress(leaves, bad):  # the first is enough
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            name = name.removesuffix(".value")
            return f"the first parameter whose {what} is not finite is {name}"
    return "every parameter and gradient is finite, but what follows from them is not"


def draw_rows(
    axes: Axes,
    rows: list[dict[str, Any]],
    name: str = "",
    colors: tuple[str, str] = ("#9ab8d8", "#c0392b"),
) -> None:
    """Draw bits against steps, training and validation, each in its color."""
    thin: dict[str, Any] = {"linewidth": 1}
    marked = {"linewidth": 1.5, "marker": "o", "markersize": 4}
    for split, color, style in zip(
        ("train", "validation"), colors, (thin, marked), strict=True
    ):
        points = [(r["step"], r["bits_per_byte"]) for r in rows if r["split"] == split]
        if points:
            label = f"{name} {split}".strip()
            axes.plot(*np.array(points).T, label=label, color=color, **style)


def plot_curve(
    rows: list[dict[str, Any]], path: Path, baseline: Baseline | None, unit: str
) -> None:
    """Draw bits against steps, training and validation, into a PNG."""
    # Not by pyplot, which needs a screen or takes a notebook's own away.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_rows(axes, rows)
    if baseline:
        axes.axhline(baseline.bits, color="#7f8c8d", linestyle="--", linewidth=1)
        axes.annotate(
            f"{baseline.what} {baseline.bits:.3f}",
            (0.995, baseline.bits),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    axes.set(xlabel="step", ylabel=f"bits per {unit}", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())
