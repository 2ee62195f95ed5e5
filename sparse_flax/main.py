"""The command line: python -m sparse_flax.main --config=configs/quickstart.py."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from sparse_flax import processes
from sparse_flax.errors import UserError, one_line

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/, with a preset after a colon where it has some."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "sample", "export", "dry_run"],
    "train: train, or go on training. eval: bits per byte of a run's checkpoint, by "
    "config.eval. sample: text, images or audio, by config.sample. export: write a "
    "checkpoint's weights into a small folder, --model. (Of these: without --config, "
    "what the run was trained with.) dry_run: print sizes and costs, and "
    "whether it fits (exit status 1 if not), and run nothing.",
)
_FOLLOW = flags.DEFINE_bool(
    "follow", False, "--mode=eval: score each checkpoint, as long as the run goes on."
)
_CHECKPOINT_STEP = flags.DEFINE_integer(
    "checkpoint_step",
    None,
    "--mode=eval, sample or export: which checkpoint; the newest by default.",
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "The folder of an exported model. --mode=sample: sample from it instead of a run. "
    "--mode=export: write it.",
)
_DEVICE = flags.DEFINE_string(
    "device",
    None,
    "--mode=dry_run: what it has to fit, as H200 or 'TPU v5e'; by default the "
    "accelerator that is here.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "--mode=dry_run: TPUs that are not here, as v5e:1x1 or v5e:16x16, to compile for.",
)
_PROFILE = flags.DEFINE_integer(
    "profile",
    0,
    "--mode=train: write a trace of so many steps into WORKDIR/profile.",
    lower_bound=0,
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Be one of several processes, in every mode but dry_run. auto: where SLURM, Open "
    "MPI, GKE or a TPU pod is found, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
    "JAX_PROCESS_ID are set.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where everything is written; runs/<config name> by default, and for --mode=sample "
    "--model=FOLDER samples/<its name>.",
)

OF_A_RUN = ["eval", "sample", "export"]
OF_SOME_MODES = {
    "follow": ["eval"],
    "checkpoint_step": OF_A_RUN,
    "model": ["sample", "export"],
    "device": ["dry_run"],
    "topology": ["dry_run"],
    "profile": ["train"],
    "distributed": ["train", "eval", "sample", "export"],
    "workdir": ["train", "eval", "sample", "export"],
}


def main(argv: list[str]) -> int:
    """Run the chosen mode; return the exit status."""
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; write --name=value")
    if _CONFIG.value is None:
        of_a_run = _MODE.value in OF_A_RUN
        without = "; or name a run's --workdir" if of_a_run else ""
        if _MODE.value == "sample":
            without += ", or a --model"
        raise UserError(
            f"--config is missing; try --config=configs/quickstart.py{without}"
        )
    for name, modes in OF_SOME_MODES.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            raise UserError(
                f"--{name}={flags.FLAGS[name].value} does nothing in --mode="
                f"{_MODE.value}; leave it out, or use --mode={modes[0]}"
            )
    if _FOLLOW.value and _CHECKPOINT_STEP.value is not None:
        raise UserError(
            "--follow scores every checkpoint and --checkpoint_step one; leave one out"
        )
    if _MODE.value == "export" and not _MODEL.value:
        raise UserError(
            "--mode=export writes a model into a folder; name it with --model=FOLDER"
        )
    if _MODE.value == "sample" and _MODEL.value and _CHECKPOINT_STEP.value is not None:
        raise UserError(
            "--checkpoint_step is for a run, and --model holds one set of weights; "
            "leave one out"
        )
    if _DEVICE.value and _TOPOLOGY.value:
        raise UserError(
            "--device names one device to fit and --topology all of them; leave one out"
        )
    # Late, so that a mistake in the flags is answered before jax is loaded.
    if _MODE.value == "dry_run":
        from sparse_flax import dry_run

        options = _CONFIG.value, _DEVICE.value, _say, _TOPOLOGY.value
        return 0 if dry_run.run(*options) else 1
    workdir = _WORKDIR.value or default_workdir()
    # Every process says it: which is the first is not known yet.
    processes.start(_DISTRIBUTED.value, lambda line: print(line, flush=True))
    if _MODE.value == "eval":
        from sparse_flax.eval_run import EvalRun

        run = EvalRun(_CONFIG.value, workdir, say=_say)
        run.follow() if _FOLLOW.value else run.run(_CHECKPOINT_STEP.value)
        return run.stop.status
    if _MODE.value == "sample":
        from sparse_flax.sample_run import SampleRun

        sampler = SampleRun(_CONFIG.value, workdir, model=_MODEL.value, say=_say)
        sampler.run(_CHECKPOINT_STEP.value)
        return sampler.stop.status
    if _MODE.value == "export":
        from sparse_flax import export_run

        assert _MODEL.value  # which is asked for above
        export_run.run(
            _CONFIG.value, workdir, _MODEL.value, _CHECKPOINT_STEP.value, say=_say
        )
        return 0
    from sparse_flax.sharding import choose_mesh
    from sparse_flax.train import Trainer

    config = _CONFIG.value
    if not any(argument.startswith("--config.mesh.") for argument in sys.argv):
        config = choose_mesh(config, say=_say)
    trainer = Trainer(config, workdir, profile=_PROFILE.value, say=_say)
    trainer.run()
    return trainer.stop.status


def default_workdir() -> str:
    """Return runs/<config name>, with the preset where there is one.

    For samples of an exported model, which has no run: samples/<its name>.
    """
    if _MODE.value == "sample" and _MODEL.value:
        return str(Path("samples") / Path(_MODEL.value).resolve().name)
    flag: Any = flags.FLAGS["config"]
    path, _, preset = flag.config_filename.partition(":")
    name = Path(path).stem + (f"-{preset}" if preset else "")
    return str(Path("runs") / name)


def add_saved_config(argv: list[str]) -> list[str]:
    """Add the run's own --config where a mode of a run names a --workdir and no config.

    Before flags are parsed, because --config.eval.split=... needs a configuration.
    """
    given: dict[str, str] = {}
    for flag, following in itertools.pairwise([*argv[1:], ""]):
        if found := re.match(r"--?(mode|workdir|model|config)(=|$)", flag):
            given[found[1]] = flag[found.end() :] if found[2] else following
    folder = given.get("workdir", "")
    if given.get("mode") == "sample" and given.get("model"):
        folder = f"model:{given['model']}"
    if given.get("mode") not in OF_A_RUN or not folder or "config" in given:
        return argv
    file = Path(__file__).with_name("saved_config.py")
    return [argv[0], f"--config={file}:{folder}", *argv[1:]]


def parse_flags(argv: list[str]) -> list[str]:
    """Parse as absl does, but answer a mistake in a sentence."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # a file that could not be loaded complains now
    except flags.Error as error:
        raise UserError(_number_wanted(str(error)) or str(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "get_config" for frame in frames):
            raise  # a mistake in the file itself, whose author needs the place
        # What ml_collections raises for an unknown option or a value of another type.
        text = str(error.args[0] if error.args else error).replace("\\n", " ")
        if "Did you mean" in text:  # ... "width" instead of "widht"?
            text = "there is no such option; did" + text.rpartition("Did")[2].strip("'")
        elif isinstance(error, KeyError | AttributeError) and " " not in text.strip():
            text = f"the configuration has no option {text}"
        raise UserError(one_line(text)) from None
    except OSError as error:
        # "... [Errno 2] No such file or directory: 'x.py'", over several lines.
        text = one_line(error).rpartition("] ")[2]
        raise UserError(f"--config cannot be read: {text}") from None
    # absl shows INFO by default: at start-up, every accelerator that is not there.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]
    return rest


def _number_wanted(text: str) -> str | None:
    """Return a sentence for what absl says of a flag that int() or float() refuse."""
    found = re.match(
        r"flag (--\S+?)=(.*): (invalid literal for int|could not con)", text
    )
    if not found:
        return None
    flag, value, kind = found.groups()
    if not kind.startswith("invalid"):
        return f"{flag}={value} must be a number, as 0.5 or 1e-3"
    try:
        nearest = round(float(value))
    except (ValueError, OverflowError):
        return f"{flag}={value} must be a whole number, as 100"
    return f"{flag}={value} must be a whole number; try {nearest}"


def _say(line: str) -> None:
    if processes.is_first():
        print(line, flush=True)


def entry_point() -> None:
    """Run, and answer what the user can put right without a traceback."""
    # A sampled byte or a path that the terminal's encoding lacks is no reason to stop.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.argv = add_saved_config(sys.argv)  # which ml_collections reads, too
        app.run(_main_and_leave, flags_parser=parse_flags)
    except UserError as error:
        _end(2, f"error: {error}")
    except OSError as error:
        # Whatever else the system refuses, standard output being full or closed too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) and _MODE.value == "dry_run":
            sys.exit(141)  # as `| head` ends any program: nothing is lost
        _end(2, f"error: {error}; put that right and run the same command again")
    except KeyboardInterrupt:
        _end(
            130,
            "interrupted; the same command goes on from what was last said to be "
            "saved, or begins again",
        )
    except Exception as error:
        what = one_line(f"{type(error).__name__}: {error}")[:300]
        if processes.count() > 1:  # which ends before Python would print these
            traceback.print_exc()
            where = f"process {processes.index()} of {processes.count()}"
            sentence = f"error: {where} failed ({what}); {processes.GO_ON}"
            print(sentence, file=sys.stderr, flush=True)
        processes.fail(1, what)
        raise


def _main_and_leave(argv: list[str]) -> int:
    status = main(argv)
    processes.finish()
    return status


def _end(status: int, sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    processes.fail(status, sentence.removeprefix("error: "))
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
