"""Several processes as one run: their start, what they tell each other, their end.

Everything goes through the key-value store of jax's coordinator, so that it works
before and beside the devices. With one process, every function here returns at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sparse_flax.errors import UserError, one_line

ALIVE_EVERY = 1.0  # seconds between two signs of life
SILENCE = 25  # seconds without one after which a process counts as dead
# The same for jax, should our own watch hang. Its own 100 and 300 s are long to wait.
HEARTBEAT_SECONDS = 50
SHUTDOWN_SECONDS = 45
ANSWER_SECONDS = 24 * 3600  # a process may be busy; the watch sees whether it lives
PREFIX = "sparse_flax"
GO_ON = "the same command on all hosts goes on from the last checkpoint"
# What a cluster that jax does not know may say instead.
OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_index, _count = 0, 1
_client: Any = None
_asked = 0
_watch: _Watch | None = None


def index() -> int:
    """Return the number of this process; 0 writes and speaks for all."""
    return _index


def count() -> int:
    """Return how many processes there are."""
    return _count


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return _index == 0


# ---- Start -------------------------------------------------------------------------


def start(mode: str, say: Callable[[str], None]) -> None:
    """Join the other processes of the job, before anything touches a device.

    Args:
      mode: auto: if the surroundings name more than one process; on: in any case; off:
        never.
      say: takes the line that says who is waited for.

    Raises:
      UserError: the surroundings are contradictory or name nobody though they should,
        or the others did not come.
    """
    global _index, _count, _client, _watch
    if mode == "off":
        return
    found = detect()
    if found is None and mode == "on":
        raise UserError(
            "--distributed=on, but neither SLURM, Open MPI, Kubernetes nor a TPU pod "
            f"is here; set {', '.join(OWN[:-1])} and {OWN[-1]}, or use "
            "--distributed=auto"
        )
    if found is None or (mode == "auto" and found[1] == 1):
        return
    import jax
    from jax._src import distributed

    address, number, process, local = found
    say(
        f"process {process} of {number} on {socket.gethostname()} waits for the others "
        f"at {address}"
    )
    began = time.monotonic()
    # Of two programs that CPUs run at a time, one process may begin the first and
    # another the second, and each wait for the other. Accelerators keep the order.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            address,
            number,
            process,
            local_device_ids=local,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        what = one_line(error)[:200]
        raise UserError(
            f"process {process} of {number} could not join the others at {address}: "
            f"{what}; see that every process was started and that {address} can be "
            "reached from each host, or use --distributed=off for this one alone"
        ) from error
    _index, _count, _client = process, number, distributed.global_state.client
    _watch = _Watch()
    if is_first():
        say(f"{number} processes met after {time.monotonic() - began:.1f} s")


def detect() -> tuple[str, int, int, list[int] | None] | None:
    """Return coordinator, number of processes, which of them this is, and its devices.

    As jax detects SLURM, Open MPI, Kubernetes and TPU pods, or as the variables in
    `OWN` say; None where there is no cluster.

    Raises:
      UserError: there seems to be one, but who belongs to it cannot be found out.
    """
    given = {name: os.environ[name] for name in OWN if os.environ.get(name)}
    if OWN[1] in given or OWN[2] in given:
        if missing := [name for name in OWN if name not in given]:
            raise UserError(
                f"{', '.join(given)} is set, but not {', '.join(missing)}; set all of "
                f"{', '.join(OWN)} or none"
            )
        try:
            number, process = int(given[OWN[1]]), int(given[OWN[2]])
        except ValueError:
            number = process = -1
        if not 0 <= process < number:
            raise UserError(
                f"{OWN[2]}={given[OWN[2]]} must be a number below {OWN[1]}="
                f"{given[OWN[1]]} and from 0; try {OWN[2]}=0"
            )
        return given[OWN[0]], number, process, None
    if os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") == 0:
        alone = "TPU_WORKER_HOSTNAMES" in os.environ
        if alone and "MEGASCALE_COORDINATOR_ADDRESS" not in os.environ:
            return None  # one TPU host, such as a notebook's; jax would go on asking
    from jax._src.clusters import ClusterEnv

    try:
        address, number, process, local = (
            ClusterEnv.auto_detect_unset_distributed_params(
                given.get(OWN[0]), None, None, None, None, 300
            )
        )
    except Exception as error:  # of each kind of cluster its own
        what = one_line(f"{type(error).__name__}: {error}")[:200]
        raise UserError(
            f"this looks like one of several hosts, but which cannot be found out "
            f"({what}); set {', '.join(OWN)}, or --distributed=off for this host alone"
        ) from error
    if address is None or number is None or process is None:
        return None
    return address, number, process, list(local) if local else None


# ---- What they tell each other -----------------------------------------------------


def from_first(value: Any) -> Any:
    """Return what process 0 gives, made of what JSON can hold; all of them call."""
    if _count == 1:
        return value
    key = _next_key()
    if is_first():
        _client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client.blocking_key_value_get(key, ANSWER_SECONDS * 1000))


def gather(value: Any) -> list[Any]:
    """Return what each process gives, in their order; all call, and wait for all."""
    if _count == 1:
        return [value]
    key = _next_key()
    _client.key_value_set(f"{key}/{_index}", json.dumps(value))
    answers = (
        _client.blocking_key_value_get(f"{key}/{process}", ANSWER_SECONDS * 1000)
        for process in range(_count)
    )
    return [json.loads(answer) for answer in answers]


def wait_for_all() -> None:
    """Return once all processes have come here."""
    gather(None)


@contextlib.contextmanager
def first_before_the_rest() -> Iterator[None]:
    """Let process 0 through alone, such as to download; then the others at once.

    If it fails there, so do the others, by the same UserError.
    """
    if not is_first() and (problem := from_first("")):
        raise UserError(problem)
    try:
        yield
    except UserError as error:
        if is_first():
            from_first(str(error))
        raise
    if is_first():
        from_first("")


def same_everywhere(value: str, what: str) -> None:
    """Raise UserError on all processes if one gives another value than the first."""
    host = socket.gethostname()
    first, *others = gather([value, host])
    for number, (other, there) in enumerate(others, 1):
        if other != first[0]:
            raise UserError(
                f"process {number} on {there} has {what} than process 0 on {first[1]} "
                f"({other[:12]} and {first[0][:12]}); give all the same"
            )


def _next_key() -> str:
    global _asked
    _asked += 1
    return f"{PREFIX}/asked/{_asked}"


# ---- End ---------------------------------------------------------------------------


class _Watch:
    """Ends this process, with a sentence, once another one is dead.

    A process that waits for a dead one in a collective waits inside of C++, where no
    exception reaches it.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._host = socket.gethostname()
        # When the coordinator is killed, jax aborts this process from a thread of its
        # own, which nothing in here outlives. The shell does, and then has the word.
        self._epitaph = subprocess.Popen(
            ["sh", "-c", 'read word || echo "$0" >&2', f"error: {self._ending()}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say that this process is well and done, and watch no more."""
        self._ended.set()
        self._thread.join(5)
        self._tell("done")

    def _ending(self) -> str:
        return (
            f"process {_index} of {_count} on {self._host} was ended from outside, or "
            f"because process 0 was; {GO_ON}"
        )

    def silence_epitaph(self) -> None:
        """Let nothing be said when this process ends, as it has been."""
        with contextlib.suppress(OSError):
            self._epitaph.communicate(b"known\n")

    def _tell(self, what: str) -> None:
        key = f"{PREFIX}/alive/{_index}"
        _client.key_value_set(key, json.dumps([self._host, what]), True)

    def _run(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        beats = 0
        while not self._ended.wait(ALIVE_EVERY):
            beats += 1
            try:
                self._tell(f"{beats}")
                there = _client.key_value_dir_get(f"{PREFIX}/alive/")
            except Exception as error:
                if self._ended.is_set():
                    return
                what = one_line(error)[:160]
                _end_now(f"process 0 cannot be reached any more ({what})")
            now = time.monotonic()
            for key, told in there:
                process, (host, what) = key.rpartition("/")[2], json.loads(told)
                if what.startswith("failed"):
                    # What is wrong on all, each of them says by itself.
                    if self._ended.wait(2 * ALIVE_EVERY):
                        return
                    why = what.removeprefix("failed ")
                    _end_now(f"process {process} on {host} ended: {why}")
                if what == "done" or seen.get(process, ("", 0.0))[0] != what:
                    seen[process] = (what, now)
                if now - seen[process][1] > SILENCE:
                    _end_now(
                        f"process {process} on {host} has given no sign of life for "
                        f"{SILENCE} s"
                    )

    def fail(self, sentence: str) -> None:
        """Tell the others why this process ends."""
        self._ended.set()
        self._thread.join(5)
        with contextlib.suppress(Exception):
            self._tell(f"failed {sentence}")
            if is_first():  # with which all that was told goes
                time.sleep(4 * ALIVE_EVERY)


def _end_now(sentence: str) -> None:
    print(
        f"error: {sentence}; process {_index} ends, too; {GO_ON}",
        file=sys.stderr,
        flush=True,
    )
    if _watch:
        _watch.silence_epitaph()
    os._exit(1)


def fail(status: int, sentence: str) -> None:
    """Tell the others and end at once; return if there are none.

    An ordinary exit would wait for processes that wait for this one.
    """
    if _watch is None:
        return
    _watch.fail(sentence)
    _watch.silence_epitaph()
    sys.stdout.flush()
    os._exit(status)


def finish() -> None:
    """Wait for the others to finish, and part from them."""
    global _watch
    if _watch is None:
        return
    import jax

    wait_for_all()
    _watch.stop()
    wait_for_all()
    _watch.silence_epitaph()
    _watch = None
    jax.distributed.shutdown()
