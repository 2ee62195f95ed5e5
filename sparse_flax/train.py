"""A run, and its loop, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from sparse_flax import (
    banner,
    devices,
    evaluate,
    optim,
    processes,
    progress,
    sample,
    state,
    trained,
)
from sparse_flax import config as config_lib
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.config_checks import finalize
from sparse_flax.data import batches, bigram, sources
from sparse_flax.errors import UserError
from sparse_flax.integrity import fingerprint
from sparse_flax.metrics import MetricsLog, first_not_finite, train_row
from sparse_flax.model import SparseTransformer
from sparse_flax.profiling import Profile
from sparse_flax.sharding import make_mesh, own_rows, put_batch
from sparse_flax.stopping import StopRequest
from sparse_flax.train_step import make_train_step
from sparse_flax.workdir import WorkDir

Metrics = dict[str, Any]


def run(
    config: ConfigDict, workdir: str, say: Callable[[str], None] = print
) -> SparseTransformer:
    """Train, or go on training, and return the weights, off the mesh: for a notebook.

    >>> model = train.run(config, "runs/mine")

    Args:
      config: not yet finalized; config.eval.weights chooses the weights.
      workdir: where the run is, or will be.
      say: called with each line that the user should read.

    Raises:
      UserError: whatever the user can put right, in a sentence.
    """
    trainer = Trainer(config, workdir, say)
    trainer.run()
    return trained.off_mesh(trainer.chosen_model())


class Trainer:
    """A run: its state and everything that it reads and writes."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        say: Callable[[str], None] = print,
        profile: int = 0,
    ):
        """Find out where the run stands, and say so; trace `profile` steps of it.

        Raises:
          UserError: whatever the user can put right, in a sentence.
        """
        self.say = say
        say(f"working directory  {workdir}")
        self.config, notices = finalize(config)
        self.model_config = config_lib.model_config(self.config)
        self.stop = StopRequest()
        self.clock = progress.Clock()
        mesh, data = self.config.mesh, self.config.data
        self.unit = evaluate.UNITS[data.kind]
        # What fails in here lets go of the folder again, for a notebook's next attempt.
        with contextlib.ExitStack() as opened:
            self.workdir = WorkDir(workdir)
            opened.callback(self.workdir.close)
            profile = profile if processes.is_first() else 0
            self.profile = Profile(profile, self.workdir.profile, self.clock.pause, say)
            with processes.first_before_the_rest():
                self.splits = sources.load(data)
            processes.same_everywhere(self.splits.fingerprint, "other training data")
            changed = self.workdir.agree(self.config, self.splits)
            self.mesh = make_mesh(**mesh)
            self.checkpoints = Checkpointer(
                self.workdir.checkpoints, keep=self.config.checkpoint.keep, say=say
            )
            opened.callback(self.checkpoints.close)
            with jax.set_mesh(self.mesh):
                init_key, self.dropout_key = jax.random.split(
                    jax.random.key(self.config.seed)
                )
                optimizer = optim.make_optimizer(self.config.optim)
                args = self.model_config, optimizer, init_key
                self.state: Any
                restored = self.checkpoints.restore_latest(state.abstract(*args))
                self.step, self.state = restored or (
                    0,
                    state.create(*args, self.config.optim.loss_scale),
                )
                self.saved = self.step if restored else None
                banner.show(
                    say, self.config, self.model_config, self.splits, self.saved
                )
                batch_size = self.config.train.batch_size
                rows, self.eval_rows = map(
                    own_rows, (batch_size, self.config.eval.batch_size)
                )
            self.first = self.step  # where this process began
            self.batch = None
            self.stream = batches.train_batches(
                self.splits.train,
                batch_size=batch_size,
                context=self.model_config.context,
                seed=self.config.seed,
                start=self.step,
                steps=self.config.train.steps,
                rows=rows,
            )
            # Now that nothing is left to refuse, on any host.
            processes.wait_for_all()
            self.workdir.save_config(self.config, self.splits)
            self.metrics = MetricsLog(
                self.workdir, step=self.step, tensorboard=self.config.log.tensorboard
            )
            opened.callback(self.metrics.close)
            kind = jax.devices()[0].device_kind
            told = [*notices, devices.dtype_notice(kind, self.config.model.dtype)]
            for notice in filter(None, [*told, self.splits.notice]):
                say(f"NOTE: {notice}")
            for change in changed:
                say(f"changed since the last run: {change}")
                if change.startswith("train.steps:"):
                    say("NOTE: its cosine now ends there, so the learning rate jumps")
            self.baseline = bigram.baseline(
                self.splits, self.model_config.context, self.config.eval.max_windows
            )
            self.opened = opened.pop_all()

    # ---- The loop ------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or until told to stop.

        The order matters. A state is saved only when its last step was found finite;
        before the evaluation, which may be interrupted; and an evaluation that was
        interrupted is made up for after the restart.
        """
        config, steps = self.config, self.config.train.steps
        running: Metrics | None = None  # of the step that the device is at
        train_step = None
        with jax.set_mesh(self.mesh), self.opened:
            self.opened.callback(self.stop.ignore)
            self.opened.callback(self.profile.abandon)
            self.stop.listen()
            while not self.stop:
                last = self.step >= steps
                save = last or progress.is_due(self.step, config.checkpoint.every_steps)
                check = last or self.step == 0
                check |= progress.is_due(self.step, config.eval.every_steps)
                if running and (save or check):
                    self.account_for(running)
                    running = None
                with self.clock.pause():
                    if save and self.step:
                        self.save()
                    if check:
                        self.evaluate("validation")
                    if last:
                        self.evaluate("test")
                    self.announce(self.checkpoints.poll())
                if last or self.stop:
                    break
                self.batch = put_batch(next(self.stream), config.train.batch_size)
                if train_step is None:
                    train_step = self.compile(self.batch)
                    self.clock.start(self.step)
                with self.profile.step(self.step, self.state):
                    self.state, values = train_step(self.state, self.batch)
                # The step before is looked at while this one runs.
                if running:
                    self.account_for(running)
                self.step += 1
                running = {"step": self.step, **values}
            if running:
                self.account_for(running)
            self.profile.end(self.state)
            if self.stop:
                self.save()
            self.announce(self.checkpoints.wait())
            if self.stop or not self.finish():
                self.say(
                    f"stopped by {self.stop.signal} at step {self.step:,}; the same "
                    "command goes on from there"
                )

    def compile(self, batch: Any) -> Callable:
        """Compile the train step, ahead of its first use, and say how long it took."""
        began = time.monotonic()
        step = make_train_step(self.config, self.dropout_key)
        compiled = step.lower(self.state, batch).compile()
        self.say(f"compiled the train step in {time.monotonic() - began:.1f} s")
        return compiled

    def account_for(self, values: Metrics) -> None:
        """Wait for a step and take in its metrics.

        Raises:
          UserError: its loss or gradient was not finite; nothing is saved after it.
        """
        config, step = self.config, values["step"]
        values = jax.device_get(values)
        if not values["finite"]:
            self.give_up(
                f"step {step:,}: the loss is {values['bits_per_byte']:.3g} bits per "
                f"{self.unit} and the gradient norm {values['grad_norm']:.3g}",
                first_not_finite(self.state.model, values["good_gradients"]),
            )
        if values["skipped"]:
            self.say(
                f"step {step:,}: skipped, because the gradient overflowed float16; the "
                f"loss scale is {values['loss_scale']:,.0f} now"
            )
        self.clock.tick(step)
        # Which rows there are must not depend on where the run was interrupted.
        due = step in (1, config.train.steps) or progress.is_due(
            step, config.log.every_steps
        )
        if not due and step != self.first + 1:
            return
        speed = self.clock.rate() * config.train.batch_size
        row = train_row(values, speed, self.model_config, self.mesh)
        if due:
            self.metrics.write(step=step, split="train", **row)
        left = self.clock.left(step, config.train.steps)
        self.say(progress.line(step, config.train.steps, row, left, self.unit))

    def give_up(self, what: str, where: str) -> NoReturn:
        """Raise the UserError about numbers that are not finite."""
        self.announce(self.checkpoints.wait())
        raise UserError(
            f"{what}; {where}; nothing was saved after step "
            f"{max(self.checkpoints.steps(), default=0):,}; try half of "
            f"optim.learning_rate={self.config.optim.learning_rate}"
        )

    # ---- Now and then --------------------------------------------------------------

    def save(self) -> None:
        """Start to save the state, unless this step is saved already."""
        if self.saved == self.step:
            return
        # A step may be finite and still lead where the next one is not.
        if self.batch and not evaluate.is_finite(
            self.state.model, self.batch, self.config.train.accumulate
        ):
            self.give_up(
                f"step {self.step:,}: the loss after it is not finite",
                first_not_finite(self.state.model, []),
            )
        self.checkpoints.save(self.step, self.state)
        self.saved = self.step

    def announce(self, steps: list[int]) -> None:
        """Say of each checkpoint that it is saved, once that is true."""
        for step in steps:
            self.say(f"saved {self.workdir.checkpoints / str(step)}")

    def chosen_model(self) -> SparseTransformer:
        """Return the weights that are evaluated and sampled from."""
        return getattr(self.state, state.WEIGHTS[self.config.eval.weights])

    def evaluate(self, split: str) -> None:
        """Score a split and write a row, if the present step has none; not if told to
        stop.
        """
        config, context = self.config.eval, self.model_config.context
        data = getattr(self.splits, split)
        windows = batches.evaluation_window_count(
            data.size, context, config.max_windows
        )
        row = {"split": split, "weights": config.weights, "windows": windows}
        there = bool(self.metrics.find(step=self.step, **row))
        if self.stop or processes.from_first(there):
            return
        model = self.chosen_model()
        score = evaluate.bits_per_byte(
            model,
            batches.evaluation_batches(
                data,
                batch_size=config.batch_size,
                context=context,
                max_windows=config.max_windows,
                rows=self.eval_rows,
            ),
            count=-(-windows // config.batch_size),
            stop=self.stop,
            say=self.say,
        )
        if score is None:
            return
        if not math.isfinite(score):
            self.give_up(
                f"step {self.step:,}: the {split} score is {score} bits per "
                f"{self.unit}",
                first_not_finite(model, []),
            )
        self.metrics.write(step=self.step, bits_per_byte=score, **row)
        self.metrics.plot(self.workdir.curve, self.baseline, self.unit)
        self.say(
            f"step {self.step:,}: {split} {score:.3f} bits/{self.unit} "
            f"({config.weights} weights, {self._scored(split, windows)})"
        )

    def _scored(self, split: str, windows: int) -> str:
        """Say how much of a split was scored."""
        if self.config.data.kind != "image":
            return f"{windows:,} windows"
        if windows == len(getattr(self.splits, split)):
            return self.splits.amount(split)
        return f"{windows:,} images"

    def finish(self) -> bool:
        """Sample, and show what came out; return False if told to stop before that."""
        text = self.sample()
        if self.stop:
            return False
        digest = fingerprint(self.state.model)
        if not processes.is_first():
            return True
        self.metrics.plot(self.workdir.curve, self.baseline, self.unit)
        steps = self.config.train.steps
        past = f", past train.steps={steps:,}" if self.step > steps else ""
        self.say(f"finished at step {self.step:,}{past}")
        banner.show_result(self.say, self.metrics.rows, self.baseline, self.unit)
        banner.show_files(self.say, self.workdir, self.step, text)
        self.say(f"parameters fingerprint: {digest}")
        return True

    def sample(self) -> str:
        """Continue the beginning of the validation text; the same for the same run."""
        config = self.config.eval
        if not config.sample_bytes:
            return ""
        return sample.write_samples(
            self.chosen_model(),
            self.splits.validation[: config.prompt_bytes].tobytes(),
            self.workdir.sample,
            number=config.samples,
            count=config.sample_bytes,
            seed=self.config.seed,
            stop=self.stop,
            say=self.say,
        )
