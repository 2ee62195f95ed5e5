"""A trace of some training steps, for people who look for what takes the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# Steps before the trace: the first ones load programs, and the pipeline fills.
WARM_UP = 3


class Profile:
    """Trace a number of steps once, and let the run go on after them."""

    def __init__(
        self,
        steps: int,
        folder: Path,
        pause: Callable[[], contextlib.AbstractContextManager],
        say: Callable[[str], None] = print,
    ):
        """Trace `steps` steps (0: none) into `folder`.

        `pause` keeps what it takes to begin and to write out of the rate of training.
        """
        self.steps, self.folder, self.pause, self.say = steps, folder, pause, say
        self._seen, self._tracing = 0, False

    @contextlib.contextmanager
    def step(self, step: int, state: Any) -> Iterator[None]:
        """Enter with each training step; `state` is what the step before left.

        The trace begins and ends once that is ready, so that it holds whole steps; what
        happens between them, an evaluation perhaps, is in it too.
        """
        if self.steps and self._seen == WARM_UP:
            with self.pause():
                jax.block_until_ready(state)
                jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._tracing = True
        elif self._seen == WARM_UP + self.steps:
            self.end(state)
        self._seen += 1
        if not self._tracing:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def end(self, state: Any) -> None:
        """Write the trace if one is still being taken, and say where it is."""
        if self._tracing:
            self._tracing = False
            with self.pause():
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            self.say(
                f"traced {self._seen - WARM_UP} steps into {self.folder}: open its "
                "perfetto_trace.json.gz at https://ui.perfetto.dev, or pip install "
                f"xprof and run xprof --logdir={self.folder}"
            )
        elif self.steps and self._seen <= WARM_UP:
            self.say(
                f"no trace: it begins after {WARM_UP} steps, and this run made "
                f"{self._seen}"
            )
        self.steps = 0

    def abandon(self) -> None:
        """Stop a trace that an error left open; this process may take another."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
