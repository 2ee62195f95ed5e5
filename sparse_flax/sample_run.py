"""--mode=sample: what a run's checkpoint or an exported model makes.

Of a run, also while it trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sparse_flax import config as config_lib
from sparse_flax import (
    exported,
    processes,
    sample,
    sample_audio,
    sample_images,
    state,
)
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.config_checks import finalize
from sparse_flax.errors import UserError
from sparse_flax.generate import generate
from sparse_flax.model import SparseTransformer
from sparse_flax.sharding import make_mesh
from sparse_flax.stopping import StopRequest
from sparse_flax.workdir import RunFolder, writing

KINDS = {"text": sample, "image": sample_images, "audio": sample_audio}
# What says anything for one kind of data only.
OF_ONE_KIND = {
    "prompt": "text",
    "count": "text",
    "rows": "image",
    "given_seconds": "audio",
    "seconds": "audio",
}
OPTIONS = ("temperature", "top_k", "top_p", "seed")  # of generate()


class SampleRun:
    """Samples text, images or audio by config.sample."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        say: Callable[[str], None] = print,
        model: str | None = None,
    ):
        """Find the weights and what is to be continued.

        Args:
          config: not yet finalized.
          workdir: of the run, or where to write if a model is given.
          say: called with each line that the user should read.
          model: the folder of an exported model.

        Raises:
          UserError: there is no such run or model, its architecture is another, or
            what is given cannot be read or leaves no room for the sample.
        """
        self.say = say
        self.config, _ = finalize(config)
        if model is None:
            say(f"working directory  {workdir}")
            run = RunFolder(workdir)
            self.folder, self.saved = run.path, run.saved()
            config_lib.changes(self.saved["config"], self.config)  # or refuse
            self.checkpoints = Checkpointer(run.checkpoints, say=say)
        else:
            self.folder = Path(workdir).expanduser()
            self.saved = exported.record(Path(model).expanduser())
            names = f"the model in {model}", "another --model"
            config_lib.changes(self.saved["config"], self.config, *names)
        self._check_meaning(model or workdir)
        self.model = model
        self.model_config = config_lib.model_config(self.config)
        check(self.config)
        self.kind = KINDS[self.config.data.kind]
        with processes.first_before_the_rest():
            self.given = self.kind.given(self.config, self.model_config.context)
        trained_on = self.saved.get("data", {}).get("fingerprint")
        if trained_on and self.given.fingerprint not in ("", trained_on):
            say(
                f"NOTE: {self.given.source} is not of the bytes that "
                f"{model or workdir} was trained with, and what is given here may "
                "have been among those"
            )
        digest = hashlib.sha256(b"".join(self.given.prompts)).hexdigest()
        processes.same_everywhere(digest, "other prompts")
        self.stop = StopRequest()
        mesh = self.config.mesh
        self.mesh = make_mesh(**mesh)
        with jax.set_mesh(self.mesh):
            config_lib.explain_attention(self.config)  # or refuse

    def _check_meaning(self, whose: str) -> None:
        """Refuse to take the bytes for something else than in training."""
        # Sampling from nothing reads no data, whose content would tell.
        for name in ("kind", "rate"):
            now = self.config.data[name]
            was = self.saved["config"]["data"].get(name, now)
            if was != now:
                raise UserError(
                    f"data.{name}={now!r}, but {whose} was trained with "
                    f"data.{name}={was!r}; use {was!r}"
                )

    def run(self, step: int | None = None) -> None:
        """Sample from the newest checkpoint that is whole, or the one of `step`.

        Raises UserError if there is none.
        """
        options = {name: self.config.sample[name] for name in OPTIONS}
        self.stop.listen()
        try:
            with jax.set_mesh(self.mesh):
                model = self.restored(step)
                sampled = generate(
                    model,
                    self.given.prompts,
                    self.given.count,
                    stop=self.stop,
                    say=self.say,
                    **options,
                )
        finally:
            self.stop.ignore()
        if self.stop:
            done = len(sampled[0])
            so_far = f" after {done:,} of {self.given.count:,} bytes" if done else ""
            self.say(f"stopped by {self.stop.signal}{so_far}")
            if not done:  # what an earlier call wrote is worth more
                return
        if not processes.is_first():
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.say(self.kind.write(self.config, self.given, sampled, self.folder))

    def restored(self, step: int | None) -> SparseTransformer:
        """Return the weights on the mesh that is set, and say which they are."""
        if self.model is not None:
            model = exported.load(self.model, self.model_config)
            self.say(f"model              {self.model} (step {self.saved['step']})")
            return model
        weights = self.config.eval.weights
        step, model = self.checkpoints.newest_whole(
            state.WEIGHTS[weights], state.abstract_model(self.model_config), step
        )
        self.say(f"checkpoint         {step} ({weights} weights)")
        return model


def check(config: ConfigDict) -> None:
    """Refuse what config.sample says for another kind of data.

    Raises:
      UserError: so it does.
    """
    kind, defaults = config.data.kind, config_lib.defaults().sample
    for name, only in OF_ONE_KIND.items():
        value = config.sample[name]
        if only != kind and value != defaults[name]:
            like = [n for n, k in OF_ONE_KIND.items() if k == kind]
            raise UserError(
                f"sample.{name}={value} is for data.kind={only!r}, and this model's "
                f"is {kind!r}; leave it out, or try {' or '.join(like)}"
            )
