"""Bits against steps, of one run or many."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from sparse_flax.errors import UserError
from sparse_flax.evaluate import UNITS
from sparse_flax.metrics import draw_rows, read_rows
from sparse_flax.workdir import RUN, read_record

# Told apart also by most of those who see fewer colors (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
TRAIN = 0.55  # how much of a training curve's color is white

Runs = str | os.PathLike | Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]


def curves(runs: Runs, *, first: int = 0) -> Figure:
    """Draw the loss curves of runs, each with its training and validation.

    Args:
      runs: the folder of a run or its metrics.jsonl, several of them, or a dictionary
        from the names to write beside them.
      first: the step to begin with; the fall from eight bits may hide the rest.

    Raises:
      UserError: there is no such run, it has nothing to draw, or their bits are of
        different things.
    """
    named = _named(runs)
    if not named:
        raise UserError("no run is given; name the folder of one, such as runs/books")
    drawn, units = {}, {}
    for name, path in named.items():
        file = path if path.is_file() else path / "metrics.jsonl"
        if not file.exists():
            raise UserError(
                f"{path} holds no metrics.jsonl; name the folder of a run, or such a "
                "file"
            )
        rows = [row for row in read_rows(file) if {"step", "split"} <= row.keys()]
        drawn[name] = [row for row in rows if row["step"] >= first]
        if not drawn[name]:
            last = max((row["step"] for row in rows), default=None)
            raise UserError(
                f"{file} has no rows"
                + ("" if last is None else f" from step {first} on; try {last // 2}")
            )
        if unit := _unit(file.parent):
            units[name] = unit
    if len(set(units.values())) > 1:
        (one, a), (other, b) = [
            next((n, u) for n, u in units.items() if u == unit)
            for unit in dict.fromkeys(units.values())
        ]
        raise UserError(
            f"{one} is in bits per {a} and {other} in bits per {b}; draw them apart"
        )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for n, (name, rows) in enumerate(drawn.items()):
        color = COLORS[n % len(COLORS)]
        red, green, blue = (TRAIN + (1 - TRAIN) * x for x in to_rgb(color))
        light = to_hex((red, green, blue))
        draw_rows(axes, rows, name, (light, color))
    unit = next(iter(units.values()), None)
    axes.set(xlabel="step", ylabel=f"bits per {unit}" if unit else "bits")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _named(runs: Runs) -> dict[str, Path]:
    if isinstance(runs, Mapping):
        return {name: Path(path).expanduser() for name, path in runs.items()}
    if isinstance(runs, str | os.PathLike):
        runs = [runs]
    paths = list(dict.fromkeys(Path(run).expanduser() for run in runs))
    folders = [(path.parent if path.is_file() else path).absolute() for path in paths]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return dict(zip(names, paths, strict=True))


def _unit(folder: Path) -> str | None:
    """Return what the bits of a run are counted by, if its configuration is there."""
    saved = read_record(folder / "config.json", RUN, {"data", "config"})
    return UNITS.get(saved["config"]["data"].get("kind")) if saved else None
