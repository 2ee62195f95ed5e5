"""Train the paper's table 2 again: dense, fixed and strided, on text and on images.

    python benchmarks/table2.py --books FILE --cifar10 FOLDER

A cell is a run of sparse_flax.main, from its start to the score of the whole test
split: {books, cifar10} x {scaled, full} x {dense, fixed, strided} x {equal steps, equal
time} x learning rates x seeds. Within a data set, size, rate and seed, the data and
their order are the same, and everything but the pattern. `scaled` has the paper's
width, heads, context and vocabulary and fewer layers, so that it learns enough in that
time; `full` is the paper's model as far as it gets. Neither has dropout: nothing is
seen often enough to overfit.

Equal time: what a pattern reaches in --seconds of training, compiling and scoring left
out, the number of steps by its own measured speed. Equal steps: what it reaches in the
number of steps that dense attention makes in that time. The schedule ends with the run.

Finished cells are read from --out and skipped; a file with cells of other hardware or
versions is refused, so name another --out for those. A cell that was stopped goes on
from its checkpoint in --workdir. With --minutes no cell begins that would not end
within them.

Writes {hardware, versions, trials, rows: [{data, size, pattern, seed, learning_rate,
limit_s (the --seconds), budget (steps | time | both, of dense), steps, seconds (of
training), validation, test (bits per byte or dim), command}]}.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a clone that is not installed
RESULTS = Path(__file__).with_name("results") / "table2.json"

from benchmarks import processes  # noqa: E402
from sparse_flax.metrics import read_rows  # noqa: E402

TRIAL_STEPS = 40
OVERHEAD = 75.0  # seconds of a cell that are not training: starting, compiling, scoring
SEEDS = 3
PATTERNS = {
    "books": {
        "dense": "Dense()",
        "fixed": "Fixed(128, 32, rotate=True)",
        "strided": "Strided(128)",
    },
    "cifar10": {
        "dense": "Dense()",
        "fixed": "Fixed(128, 32, rotate=True)",
        "strided": "Strided(96)",
    },
}
# What differs from configs/{books,cifar10}.py:short, which have the paper's sizes. The
# positions are the same whatever the pattern, and so is what is computed again.
OF_DATA = {
    "books": {"model.position_shape": "(96, 128)"},
    "cifar10": {"optim.warmup_steps": 150},
}
OF_ALL = {
    "eval.max_windows": 0,
    "eval.every_steps": 0,
    "eval.sample_bytes": 0,
    "checkpoint.every_steps": 0,  # at the end, and where it is stopped
    "log.tensorboard": False,
}
SCALED = {
    "books": {"model.layers": 6},
    "cifar10": {"model.layers": 12},
}
SIZES = ("scaled", "full")
LEARNING_RATES = {
    "books": {"scaled": 5e-4, "full": 5e-4},  # at 2e-3 dense attention hardly learns
    "cifar10": {"scaled": 2e-3, "full": 1e-3},
}
KEY = ("data", "size", "pattern", "seed", "learning_rate", "limit_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", help="a text of some 100 MB")
    parser.add_argument("--cifar10", help="as --config.data.path of configs/cifar10.py")
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", help=f"default: {LEARNING_RATES}"
    )
    parser.add_argument("--seconds", type=int, default=420, help="of training")
    parser.add_argument("--minutes", type=float, help="begin nothing that takes longer")
    parser.add_argument("--workdir", type=Path, default=Path("runs/table2"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--try", dest="options", nargs="*", default=[], help=(
        "NAME=VALUE of the configuration, to see whether it runs"
    ))  # fmt: skip
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in PATTERNS if getattr(args, name)}
    if not given:
        parser.error("name the data: --books FILE, --cifar10 FOLDER, or both")
    bench = Bench(args, given)
    for seed in range(args.seeds):
        for size in args.sizes:
            for data in given:
                rates = args.learning_rates or [LEARNING_RATES[data][size]]
                for rate, pattern in itertools.product(rates, PATTERNS[data]):
                    key = (data, size, pattern, seed, rate, args.seconds)
                    for budget in ("steps", "time"):
                        bench.cell(budget, *key)


class Bench:
    """The cells that are finished, and how one is made."""

    def __init__(self, args: argparse.Namespace, given: dict[str, str]) -> None:
        self.args, self.given, self.began = args, given, time.monotonic()
        self.result: dict[str, Any] = {"rows": [], "trials": []}
        if args.out.exists():
            self.result = json.loads(args.out.read_text())

    def cell(self, budget: str, *key: Any) -> None:
        """Train one cell, unless it is finished, and add its row."""
        key = dict(zip(KEY, key, strict=True))
        if self.find(budget, **key):
            return
        if key["pattern"] == "dense":
            # Its speed sets the number of steps, so that one run is both cells.
            budget, trial = "both", self.trial(key)
            steps = max(1, int(key["limit_s"] * trial["steps_per_s"]))
        elif budget == "steps":
            steps = self.find("both", **{**key, "pattern": "dense"})["steps"]
        else:
            same = self.find("steps", **key)
            steps = max(1, int(key["limit_s"] * same["steps"] / same["seconds"]))
        self.stop_if_late(key["limit_s"])
        name = "-".join(str(part) for part in [*key.values(), budget])
        command, rows = self.train(name, key, {"train.steps": steps})
        scores = {row["split"]: row["bits_per_byte"] for row in rows if row["windows"]}
        seconds = steps / self.steps_per_s(name, rows)
        row = {
            **key,
            "budget": budget,
            "steps": steps,
            "seconds": seconds,
            "validation": scores["validation"],
            "test": scores["test"],
            "command": command,
        }
        self.result["rows"].append(row)
        processes.write(self.args.out, self.result)
        print(json.dumps(row), flush=True)

    def trial(self, key: dict[str, Any]) -> dict[str, Any]:
        """Return the measured speed of a model with dense attention."""
        key = {name: key[name] for name in ("data", "size", "pattern")}
        for trial in self.result["trials"]:
            if trial.items() >= key.items():
                return trial
        self.stop_if_late(0.0)
        name = "-".join([*key.values(), "trial"])
        options = {"train.steps": TRIAL_STEPS, "eval.max_windows": 8}
        rate = LEARNING_RATES[key["data"]][key["size"]]
        run = {**key, "seed": 0, "learning_rate": rate}
        _, rows = self.train(name, run, options)
        trial = {**key, "steps_per_s": self.steps_per_s(name, rows)}
        self.result["trials"].append(trial)
        processes.write(self.args.out, self.result)
        return trial

    def steps_per_s(self, name: str, rows: list[dict[str, Any]]) -> float:
        """Return the median over a run of its steps a second."""
        config = json.loads((self.args.workdir / name / "config.json").read_text())
        config = config["config"]
        tokens = config["train"]["batch_size"] * config["model"]["context"]
        rates = [row["tokens_per_s"] for row in rows if row["tokens_per_s"]]
        return statistics.median(rates) / tokens

    def find(self, budget: str, **key: Any) -> dict[str, Any] | None:
        """Return the finished row of a cell."""
        for row in self.result["rows"]:
            if row.items() >= key.items() and row["budget"] in (budget, "both"):
                return row
        return None

    def train(
        self, name: str, key: dict[str, Any], options: dict[str, Any]
    ) -> tuple[str, list[dict[str, Any]]]:
        """Run, or go on with, one run to its end; return its command and its rows."""
        self.check_device()
        data, size = key["data"], key["size"]
        options = {
            "seed": key["seed"],
            **OF_DATA[data],
            **OF_ALL,
            **(SCALED[data] if size == "scaled" else {}),
            "model.patterns": PATTERNS[data][key["pattern"]],
            "optim.learning_rate": key["learning_rate"],
            **options,
        }
        words = [f"--config.{option}={value}" for option, value in options.items()]
        words += [f"--config.{option}" for option in self.args.options]
        folder = self.args.workdir / name
        line = ["-m", "sparse_flax.main", f"--config=configs/{data}.py:short", *words]
        where = [f"--workdir={folder}", f"--config.data.path={self.given[data]}"]
        print(f"{name}: {shlex.join(line)}", flush=True)
        self.args.workdir.mkdir(parents=True, exist_ok=True)
        with (self.args.workdir / f"{name}.log").open("a") as log:
            ended = subprocess.run(
                [sys.executable, *line, *where],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if ended.returncode:
            sys.exit(f"{name} ended with status {ended.returncode}: see {log.name}")
        return f"python {shlex.join(line)}", read_rows(folder / "metrics.jsonl")

    def check_device(self) -> None:
        """Note hardware and versions; end where the file has rows of others."""
        about = device()
        for name, value in about.items():
            there = self.result.get(name, value)
            if there != value:
                sys.exit(
                    f"{self.args.out} has cells with {name} {there}, and here it is "
                    f"{value}: name another file with --out"
                )
        self.result = {**about, **self.result}

    def stop_if_late(self, seconds: float) -> None:
        """End, to be called again, if so many seconds of training do not fit."""
        if self.args.minutes is None:
            return
        left = 60 * self.args.minutes - (time.monotonic() - self.began)
        if left < seconds + OVERHEAD:
            print("out of time: the same command goes on from here")
            sys.exit(processes.OUT_OF_TIME)


@functools.cache
def device() -> dict[str, Any]:
    """Return {hardware, versions}, by a process that gives the device back."""
    code = (
        "import json; from benchmarks.processes import jax_device;"
        "print(json.dumps(jax_device()))"
    )
    line = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(line.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
