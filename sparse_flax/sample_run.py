"""--mode=sample: what a run's checkpoint writes, also while it trains."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sparse_flax import config as config_lib
from sparse_flax import sample, state
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.config_checks import finalize
from sparse_flax.errors import UserError
from sparse_flax.sharding import make_mesh
from sparse_flax.stopping import StopRequest
from sparse_flax.workdir import RunFolder


class SampleRun:
    """Continues a text by config.sample, into generated.txt of the run."""

    def __init__(
        self, config: ConfigDict, workdir: str, say: Callable[[str], None] = print
    ):
        """Find the run and the prompt.

        Raises:
          UserError: there is no such run, its model is another, or the prompt cannot be
            read or leaves no room for the sample.
        """
        self.say = say
        say(f"working directory  {workdir}")
        self.folder = RunFolder(workdir)
        self.config, _ = finalize(config)
        config_lib.changes(self.folder.saved()["config"], self.config)  # or refuse
        self.model_config = config_lib.model_config(self.config)
        self.prompt = read_prompt(self.config.sample, self.model_config.context)
        self.stop = StopRequest()
        mesh = self.config.mesh
        self.mesh = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
        self.checkpoints = Checkpointer(self.folder.checkpoints, say=say)
        with jax.set_mesh(self.mesh):
            config_lib.explain_attention(self.config)  # or refuse

    def run(self, step: int | None = None) -> None:
        """Sample from the newest checkpoint that is whole, or the one of `step`.

        Raises UserError if there is none.
        """
        path = self.folder.generated
        options = self.config.sample.to_dict()
        del options["prompt"], options["prompt_file"]  # read already
        weights = self.config.eval.weights
        self.stop.listen()
        try:
            with jax.set_mesh(self.mesh):
                abstract = state.abstract_model(self.model_config)
                step, model = self.checkpoints.newest_whole(
                    state.WEIGHTS[weights], abstract, step
                )
                self.say(f"checkpoint         {step} ({weights} weights)")
                text = sample.write_samples(
                    model,
                    self.prompt,
                    path,
                    stop=self.stop,
                    say=self.say,
                    **options,
                )
        finally:
            self.stop.ignore()
        if self.stop:
            self.say(f"stopped by {self.stop.signal}")
        self.say(f"{text}\nsample             {path}")


def read_prompt(options: ConfigDict, context: int) -> bytes:
    """Return the bytes that config.sample says to continue.

    Raises:
      UserError: prompt and prompt_file are both given, the file cannot be read, or
        prompt and sample do not fit the context.
    """
    if options.prompt and options.prompt_file:
        raise UserError(
            f"sample.prompt_file={options.prompt_file} and sample.prompt are two "
            "prompts; give one of them"
        )
    prompt = os.fsencode(options.prompt)
    if options.prompt_file:
        try:
            prompt = Path(options.prompt_file).expanduser().read_bytes()
        except OSError as error:
            raise UserError(
                f"sample.prompt_file={options.prompt_file} cannot be read "
                f"({error.strerror}); give the path of a file"
            ) from error
    room = context - len(prompt)
    if options.count > room:
        nearest = (
            f"sample.count={room}"
            if room > 0
            else f"a prompt of {max(context - options.count, 0)} bytes or fewer"
        )
        raise UserError(
            f"sample.count={options.count} bytes after a prompt of {len(prompt)} do "
            f"not fit model.context={context}; try {nearest}"
        )
    return prompt
