"""--mode=eval: bits per byte of a run's checkpoints, also while it trains.

Nothing that the run reads is written: not its lock, its metrics or its checkpoints.
What was found is appended to eval.jsonl; the seconds of a first row include compiling.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from sparse_flax import banner, evaluate, processes, progress, state
from sparse_flax import config as config_lib
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.config_checks import finalize
from sparse_flax.data import batches, sources
from sparse_flax.errors import UserError
from sparse_flax.metrics import first_not_finite, read_rows
from sparse_flax.model import SparseTransformer
from sparse_flax.sharding import make_mesh, own_rows
from sparse_flax.stopping import StopRequest
from sparse_flax.workdir import RunFolder, writing

# Bits per byte of the enwik8 test split by minimum context, of 12,288 (table 3).
PAPER = {
    6144: 0.9952,
    9216: 0.9936,
    10752: 0.9932,
    11904: 0.9930,
    12096: 0.9922,
    12160: 0.9908,
}
PAPER_IMAGES = {"cifar10": "2.80", "imagenet64": "3.44"}  # bits per dim (table 1)
POLL_SECONDS = 1.0


class EvalRun:
    """One way to score, applied to one checkpoint of a run or to all to come."""

    def __init__(
        self, config: ConfigDict, workdir: str, say: Callable[[str], None] = print
    ):
        """Find the run and say what will be scored, and how.

        Raises:
          UserError: there is no such run, or the configuration or data are others.
        """
        self.say = say
        say(f"working directory  {workdir}")
        self.folder = RunFolder(workdir)
        self.config, _ = finalize(config)
        self.model_config = config_lib.model_config(self.config)
        self.stop = StopRequest()
        data, mesh, options = self.config.data, self.config.mesh, self.config.eval
        with processes.first_before_the_rest():
            self.splits = sources.load(data)
        processes.same_everywhere(self.splits.fingerprint, "other data")
        for change in self.folder.agree(self.config, self.splits):
            if change.startswith("model."):  # all else is of no consequence here
                say(f"changed since the run: {change}")
        self.data = getattr(self.splits, options.split)
        self.unit = evaluate.UNITS[data.kind]
        self.mesh = make_mesh(**mesh)
        self.checkpoints = Checkpointer(self.folder.checkpoints, say=say)
        size, context = self.data.size, self.model_config.context
        self.cut = {
            "context": context,
            "max_windows": options.max_windows,
            "min_context": options.min_context,
        }
        self.windows = batches.evaluation_window_count(size, **self.cut)
        everything = batches.evaluation_window_count(
            size, **self.cut | {"max_windows": 0}
        )
        self.whole = self.windows == everything
        # A part is of full windows, each scored alike.
        part = self.windows * (context - options.min_context)
        self.protocol = {
            "split": options.split,
            "weights": options.weights,
            "context": context,
            "min_context": options.min_context,
            "windows": self.windows,
            "whole": self.whole,
            "bytes_scored": size if self.whole else part,
            "dtype": self.config.model.dtype,
        }
        with jax.set_mesh(self.mesh):
            config_lib.explain_attention(self.config)  # or refuse it, in a sentence
            for warning in banner.unused_accelerators():
                say(f"WARNING: {warning}")
        if self.splits.notice:
            say(f"NOTE: {self.splits.notice}")
        amount = self.splits.amount(options.split)
        say(f"data               {self.splits.source}: {options.split}, {amount}")
        say(f"protocol           {self._protocol()}")
        if not self.whole:
            say(
                f"NOTE: eval.max_windows={options.max_windows} scores a part, "
                f"{self.windows:,} of {everything:,} windows; "
                "--config.eval.max_windows=0 scores the whole split"
            )

    def _protocol(self) -> str:
        """Say in a sentence what is scored, and with how much context."""
        if self.data.ndim == 2:
            amount = self.splits.amount(self.protocol["split"])
            part = "all" if self.whole else f"{self.windows:,} of"
            return f"each image on its own, {part} {amount}, once"
        context, least = self.cut["context"], self.cut["min_context"]
        scored = self.protocol["bytes_scored"]
        parts = [
            f"minimum context {least:,} of {context:,}"
            + (": windows without overlap" if not least else "")
        ]
        if least:
            parts.append(f"the last {context - least:,} bytes of each window scored")
            if self.whole:
                parts.append("and all of the first")
        each = "all" if self.whole else f"{scored:,} of"
        parts.append(f"{each} {self.data.size:,} bytes, once")
        return ", ".join(parts)

    # ---- Which checkpoints ---------------------------------------------------------

    def run(self, step: int | None = None) -> None:
        """Score the newest checkpoint that is whole, or the one of `step`.

        Raises:
          UserError: there is none, or its score is not finite.
        """
        self.stop.listen()
        try:
            with jax.set_mesh(self.mesh):
                step, model = self.checkpoints.newest_whole(*self._part(), step)
            if not self.stop and self.score(step, model):
                return
            self._say_stopped()
        finally:
            self.stop.ignore()

    def follow(self) -> None:
        """Score each checkpoint once, oldest first, until the run has ended.

        It has when the checkpoint of its last step is there. One that eval.jsonl has
        by the same protocol already is not scored again.
        """
        done = {
            row["step"]
            for row in read_rows(self.folder.evaluations)
            if self.protocol.items() <= row.items()
        }
        done = set(processes.from_first(sorted(done)))
        waiting_after = None
        self.stop.listen()
        try:
            while not self.stop:
                # Of several processes, all do what the first finds.
                there = processes.from_first(self.checkpoints.steps())
                if new := [step for step in there if step not in done]:
                    with jax.set_mesh(self.mesh):
                        model = self.checkpoints.read_part(new[0], *self._part())
                    if model is not None:
                        self.score(new[0], model)
                    done.add(new[0])
                    continue
                newest, last = max(there, default=0), self._last_step()
                if newest >= last:
                    self.say(f"the run has ended at step {newest:,}; all is scored")
                    return
                if newest != waiting_after:
                    waiting_after = newest
                    self.say(
                        f"waiting for a checkpoint after step {newest:,}; the run ends "
                        f"at step {last:,}, Ctrl-C ends the waiting"
                    )
                time.sleep(POLL_SECONDS)
            self._say_stopped()
        finally:
            self.stop.ignore()

    def _last_step(self) -> int:
        """Return where the run is to end, which a restart of it may change."""
        saved = self.folder.saved() if processes.is_first() else None
        return processes.from_first(saved and saved["config"]["train"]["steps"])

    # ---- One checkpoint ------------------------------------------------------------

    def score(self, step: int, model: SparseTransformer) -> dict[str, Any] | None:
        """Score a checkpoint, say so and write a row; None if told to stop.

        Raises:
          UserError: the score is not finite, or the row could not be written.
        """
        with jax.set_mesh(self.mesh):
            what = "images" if self.data.ndim == 2 else "windows"
            self.say(f"evaluating checkpoint {step}: {self.windows:,} {what}")
            began = time.monotonic()
            size = self.config.eval.batch_size
            score = evaluate.bits_per_byte(
                model,
                batches.evaluation_batches(
                    self.data, batch_size=size, rows=own_rows(size), **self.cut
                ),
                count=-(-self.windows // size),
                stop=self.stop,
                say=self.say,
            )
            seconds = time.monotonic() - began
            if score is None:
                return None
            if not math.isfinite(score):
                raise UserError(
                    f"checkpoint {step}: the {self.protocol['split']} score is {score} "
                    f"bits per {self.unit}; {first_not_finite(model, [])}; try "
                    "--config.model.dtype=float32"
                )
        row = {
            "step": step,
            **self.protocol,
            "bits_per_byte": score,
            "unit": f"bits per {self.unit}",
            "seconds": seconds,
            "bytes_per_s": self.protocol["bytes_scored"] / seconds,
        }
        self._append(row)
        self.say(
            f"step {step:,}: {row['split']} {score:.4f} bits/{self.unit} "
            f"({row['weights']} weights; {self._protocol()}; "
            f"{progress.duration(seconds)}, "
            f"{row['bytes_per_s']:,.0f} bytes/s)"
        )
        if paper := self._paper():
            self.say(f"the paper has {paper} for this protocol")
        return row

    def _part(self) -> tuple[str, SparseTransformer]:
        """Return the field of the chosen weights, and what is to be read for it."""
        field = state.WEIGHTS[self.protocol["weights"]]
        return field, state.abstract_model(self.model_config)

    def _paper(self) -> str | None:
        """Return the figure that the score is comparable with, if there is one."""
        row = self.protocol
        if row["split"] != "test" or not row["whole"] or self.splits.notice:
            return None
        if self.splits.name == "enwik8" and row["context"] == 12288:
            least = row["min_context"]
            return f"{PAPER[least]:.4f}" if least in PAPER else None
        published = self.splits.published.get("test")
        if published and published == len(self.data):
            return PAPER_IMAGES.get(self.splits.name)
        return None

    def _append(self, row: dict[str, Any]) -> None:
        if not processes.is_first():
            return
        path = self.folder.evaluations
        with writing(path), open(path, "ab+") as file:
            # After a line that a full disk tore, begin a new one.
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")

    def _say_stopped(self) -> None:
        path = self.folder.evaluations
        where = f"; what was scored before is in {path}" if path.exists() else ""
        self.say(f"stopped by {self.stop.signal}{where}")
