"""Checkpoints that are restored right or not at all. Orbax lives here, nowhere else.

Orbax commits by an atomic rename, but it restores a flipped bit or a silent cast
without a word. So each checkpoint carries a record of its leaves (dtype, shape and a
checksum of the bits), and every restore is held against it.
"""

import contextlib
import gc
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sparse_flax import integrity, processes, quiet
from sparse_flax.errors import UserError


class DamagedError(Exception):
    """A checkpoint is not, or not any more, what was written."""


def _short(error: Exception) -> str:
    if isinstance(error, DamagedError):
        return str(error)
    return textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")


class Checkpointer:
    """Saves and restores training states in one directory, a subdirectory a step.

    Saving is asynchronous; only `poll` and `wait` say what is safely on disk. With
    several processes all of them call every method, on one shared directory.
    """

    def __init__(
        self, directory: Path, *, keep: int = 3, say: Callable[[str], None] = print
    ):
        """Open `directory`, which the first save makes.

        Args:
          directory: where the steps lie. Damaged ones are moved to `damaged` beside it.
          keep: how many steps to keep; only older ones are ever deleted.
          say: called with each line that the user should read.
        """
        self._directory = Path(directory).absolute()  # Orbax takes no other
        self._keep = keep
        self._say = say
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._committed: list[int] = []

    def steps(self) -> list[int]:
        """Return the steps on disk, oldest first; any of them may be damaged."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def candidates(self, step: int | None = None) -> list[int]:
        """Return the steps to try to read, newest first, or `step` alone.

        Raises UserError if there is none.
        """
        steps = processes.from_first(self.steps())
        if not steps:
            raise UserError(
                f"{self._directory} holds no checkpoint yet; train until one is saved, "
                "or score each as it comes with --mode=eval --follow"
            )
        if step is None:
            return steps[::-1]
        if step not in steps:
            nearest = min(steps, key=lambda there: abs(there - step))
            raise UserError(
                f"checkpoint_step={step} is not in {self._directory}, which holds "
                f"{', '.join(map(str, steps))}; try {nearest}"
            )
        return [step]

    def save(self, step: int, state: Any) -> None:
        """Start to save `state`, a pytree of jax arrays; it may be donated on return.

        Waits for the save before.

        Raises:
          UserError: a float leaf is not finite, `step` is not past all steps on disk,
            or the disk refused this save or the one before.
        """
        self._settle()
        leaves = integrity.named_leaves(state)
        record, not_finite = integrity.record(leaves)
        if not_finite:
            raise UserError(
                f"checkpoint {step} was not written because {not_finite[0]} holds NaN "
                "or infinity; resume from the one before with a lower learning rate"
            )
        sealed = {"leaves": record, "step": step, "seal": integrity.seal(step, record)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            integrity=ocp.args.JsonSave(sealed),
        )
        try:
            accepted = self._writer().save(step, args=args)
        except Exception as error:
            raise self._failure(step, error) from error
        if not accepted:
            raise UserError(
                f"checkpoint {step} was not written because {self._directory} already "
                f"holds {self.steps()[-1]}; resume from that or use a new directory"
            )
        self._saving = step

    def poll(self) -> list[int]:
        """Return the steps committed since last asked; raises UserError as `save`."""
        if self._manager and not self._manager.is_saving_in_progress():
            self._settle()
        committed, self._committed = self._committed, []
        return committed

    def wait(self) -> list[int]:
        """Do as `poll` does, after the save under way."""
        self._settle()
        return self.poll()

    def close(self) -> None:
        """Wait, release all threads, and raise UserError where nobody has seen it."""
        self._settle()
        self._discard_writer()

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """Return (step, state) of the newest checkpoint that is provably right.

        Damaged ones are passed over; once an older one is restored they are moved to
        `damaged` beside the directory, so that their steps can be saved again.

        Args:
          abstract_state: the state's tree of `jax.ShapeDtypeStruct` (or arrays). The
            sharding says where a leaf goes; one without goes to the first device.

        Returns:
          None where there is no checkpoint at all.

        Raises:
          UserError: all are damaged, or the newest readable one is another model's.
            Nothing on disk has changed then.
        """
        self._settle()
        wanted = _wanted(abstract_state)
        damaged: dict[int, str] = {}
        for step in reversed(processes.from_first(self.steps())):
            try:
                leaves = self._try_to_read(step, wanted)
                break
            except DamagedError as error:
                damaged[step] = str(error)
        else:
            if not damaged:
                return None
            listed = ", ".join(f"{bad} ({why})" for bad, why in damaged.items())
            raise UserError(
                f"no checkpoint in {self._directory} can be restored: {listed}; "
                "nothing was moved or deleted, so bring a backup or use a new directory"
            )
        for bad, why in damaged.items():
            self._say(
                f"checkpoint {bad} is damaged ({why}); {self._set_aside(bad)}; "
                f"going on from checkpoint {step}"
            )
        if damaged:
            self._discard_writer()  # it would still count the steps that were moved
        structure = jax.tree.structure(abstract_state)
        return step, jax.tree.unflatten(structure, [leaves[name] for name in wanted])

    def restore_part(self, step: int, part: str, abstract_part: Any) -> Any:
        """Return one part of a checkpoint, such as its `ema`; change nothing on disk.

        Another process may be training into the directory. Only the part is read, and
        each of its leaves is checked.

        Args:
          step: which checkpoint.
          part: the name of a field of the state.
          abstract_part: that field's tree, as in `restore_latest`.

        Raises:
          DamagedError: the part is damaged, or the checkpoint was deleted meanwhile.
          UserError: it is another model's.
        """
        wanted = {f"{part}.{k}": x for k, x in _wanted(abstract_part).items()}
        leaves = self._try_to_read(step, wanted, f"{part}.")
        structure = jax.tree.structure(abstract_part)
        return jax.tree.unflatten(structure, [leaves[name] for name in wanted])

    def read_part(self, step: int, part: str, abstract_part: Any) -> Any | None:
        """Do as `restore_part` does, but say of a damaged one that it is passed over.

        Returns None then. Raises UserError if it is another model's.
        """
        try:
            return self.restore_part(step, part, abstract_part)
        except DamagedError as error:
            # A running job deletes its oldest ones.
            gone = step not in self.steps()
            why = "was deleted meanwhile" if gone else f"is damaged ({error})"
            self._say(f"checkpoint {step} {why} and is passed over")
            return None

    def newest_whole(
        self, part: str, abstract_part: Any, step: int | None = None
    ) -> tuple[int, Any]:
        """Return the step and a part of the newest checkpoint that can be read.

        Args:
          part, abstract_part: as for `restore_part`.
          step: try this one alone.

        Raises:
          UserError: there is none, or it is another model's.
        """
        for candidate in self.candidates(step):
            found = self.read_part(candidate, part, abstract_part)
            if found is not None:
                return candidate, found
        raise UserError(
            f"no checkpoint in {self._directory} could be read; nothing was moved or "
            "deleted"
        )

    def _try_to_read(
        self, step: int, wanted: dict[str, Any], prefix: str = ""
    ) -> dict[str, jax.Array]:
        """Do as `_read` does, but raise only UserError or, on all hosts, DamagedError.

        Whatever damaged files can make Orbax raise becomes the latter.
        """
        problem, leaves = "", {}
        with quiet.hushed():
            try:
                leaves = self._read(step, wanted, prefix)
            except UserError:
                raise
            except Exception as error:
                problem = _short(error)
            if problem:
                gc.collect()
        if _on_any_process(bool(problem)):
            raise DamagedError(problem or "unreadable on another host")
        return leaves

    def _read(
        self, step: int, wanted: dict[str, Any], prefix: str
    ) -> dict[str, jax.Array]:
        """Return the checked leaves of one checkpoint, or raise whatever is wrong.

        `wanted` must hold all leaves whose names begin with `prefix`.
        """
        options = ocp.CheckpointManagerOptions(
            read_only=True, lightweight_initialize=True
        )
        with ocp.CheckpointManager(self._directory, options=options) as reader:
            args = ocp.args.Composite(integrity=ocp.args.JsonRestore())
            sealed = reader.restore(step, args=args).integrity
            record = sealed["leaves"]
            if sealed["seal"] != integrity.seal(step, record):
                raise DamagedError("the record of its leaves does not hold")
            there = {name for name in record if name.startswith(prefix)}
            for name in [*wanted, *sorted(there - wanted.keys())]:
                was = record[name][0] if name in record else "nothing"
                now = integrity.describe(wanted[name]) if name in wanted else "nothing"
                if was != now:
                    raise UserError(
                        f"checkpoint {step} holds {was} for {name} where this model "
                        f"has {now}; use the config that it was trained with, or a "
                        "new directory"
                    )
            restore_args = jax.tree.map(
                lambda x: ocp.ArrayRestoreArgs(
                    sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
                ),
                wanted,
            )
            part = ocp.args.PyTreeRestore(
                wanted, restore_args=restore_args, partial_restore=bool(prefix)
            )
            args = ocp.args.Composite(state=part)
            leaves = reader.restore(step, args=args).state
        found, _ = integrity.record(leaves)
        for name in wanted:
            if found[name] != record[name]:
                raise DamagedError(f"leaf {name}: checksum differs")
        return leaves

    def _set_aside(self, step: int) -> str:
        """Move a damaged step out of the way and say what became of it."""
        shelf = self._directory.parent / "damaged"
        names = [str(step), *(f"{step}-{copy}" for copy in range(2, 1000))]
        target = next(shelf / n for n in names if not (shelf / n).exists())
        done = f"it was moved to {target}"
        if jax.process_index() == 0:
            try:
                shelf.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(target)
            except OSError as error:
                done = f"it could not be moved to {target} ({error.strerror})"
        _on_any_process(False)  # all wait for the first
        return done

    def _writer(self) -> ocp.CheckpointManager:
        """Return the manager that writes, opened by the first save.

        Opening it deletes what an interrupted save left: a process that only reads must
        not do that to one that is training.
        """
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # no stop at some old damaged metadata
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
            quiet.leave_out_closed_loops()
        return self._manager

    def _discard_writer(self) -> None:
        manager, self._manager = self._manager, None
        if manager:
            with contextlib.suppress(Exception):  # it repeats what has been raised
                manager.close()

    def _settle(self) -> None:
        """Wait for the save under way and note it as committed, or raise its error."""
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._writer().wait_until_finished()
            if jax.process_index() == 0 and step not in self.steps():
                raise RuntimeError(f"Orbax did not commit checkpoint {step}")
        except Exception as error:
            raise self._failure(step, error) from error
        self._committed.append(step)

    def _failure(self, step: int, error: Exception) -> Exception:
        """Return the sentence for a write that the system refused, else `error`."""
        self._discard_writer()
        code = getattr(error, "errno", None)
        if found := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's
            code = int(found[1])
        if code is None:
            return error
        return UserError(
            f"checkpoint {step} could not be written: {os.strerror(code)}; the "
            "checkpoints before it are untouched; put that right and run the same "
            "command again"
        )


def _wanted(abstract_tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what to restore by name, each with a place to go to."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here)
        for name, x in integrity.named_leaves(abstract_tree).items()
    }


def _on_any_process(failed: bool) -> bool:
    """Whether this failed on any process: all of them must fall back together."""
    if jax.process_count() == 1:
        return failed
    return bool(multihost_utils.process_allgather(np.array(failed)).any())
