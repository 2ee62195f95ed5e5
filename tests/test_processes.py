"""Two real processes of four CPU devices each: they train, they are killed, go on."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sparse_flax import processes
from sparse_flax.data.batches import RandomWindows
from sparse_flax.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = """
from sparse_flax.config import defaults

def get_config():
    config = defaults()
    config.data.name = "bytes"
    config.data.path = "text.txt"
    config.model.context = 64
    config.model.layers = 1
    config.model.width = 16
    config.model.heads = 2
    config.model.patterns = "Strided(8)"
    config.model.dropout = 0.2
    config.model.dtype = "float32"
    config.mesh.data = 8
    config.train.steps = 12
    config.train.batch_size = 16
    config.optim.warmup_steps = 2
    config.eval.every_steps = 0
    config.eval.max_windows = 8
    config.eval.batch_size = 8
    config.eval.prompt_bytes = 20
    config.eval.sample_bytes = 0
    config.checkpoint.every_steps = 4
    config.log.every_steps = 1
    config.log.tensorboard = False
    return config
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a config, a text, and what was compiled before."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny.py").write_text(CONFIG)
    rng = random.Random(0)
    # So long that the evaluation of all of it cannot be over before it is stopped.
    (folder / "text.txt").write_text("".join(rng.choices("etaoin shr", k=20_000)) * 800)
    return folder


@pytest.fixture(scope="module")
def straight(here):
    """What two processes print, and the folder that they write, uninterrupted."""
    with Job(here, "straight") as job:
        job.end([0, 0])
    return job.text(0), job.text(1), here / "straight"


class Job:
    """Processes of one run, started as a scheduler would; what they print in files."""

    def __init__(
        self, here, workdir, *arguments, count=2, cluster=None, config=True, apart=()
    ):
        port = _free_port()
        self.logs = [here / f"{workdir}-{i}-{port}.log" for i in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            # What jax detects, not flags of our own.
            names = (cluster or _slurm)(index, count, port) if count > 1 else {}
            quick = {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                "JAX_COMPILATION_CACHE_DIR": str(here / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            where = apart[index] if apart else workdir
            command = [sys.executable, "-m", "sparse_flax.main", f"--workdir={where}"]
            command += ["--config=tiny.py"] * config
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *arguments],
                        cwd=here,
                        env=os.environ | quick | names,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def text(self, index):
        return self.logs[index].read_text()

    def wait_for(self, pattern, seconds=200):
        """Wait until the first process has said it."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text(0))):
            alive = self.processes[0].poll() is None
            assert alive and time.monotonic() < until, self.text(0)
            time.sleep(0.05)
        return found

    def end(self, expected, seconds=200):
        """Wait until all have ended, each with its status, or with one of several."""
        until = time.monotonic() + seconds
        statuses = [
            process.wait(max(until - time.monotonic(), 0.1))
            for process in self.processes
        ]
        time.sleep(0.2)  # what outlives one that was killed may have the last word
        allowed = [each if isinstance(each, tuple) else (each,) for each in expected]
        assert all(map(tuple.__contains__, allowed, statuses)), (
            f"{statuses} {''.join(map(self.text, range(len(statuses))))}"
        )

    def kill_in_the_middle(self, victim, step):
        """Kill one with -9 in or after a step; return what another one said then."""
        self.wait_for(f"step {step}/")
        time.sleep(random.random() / 2)
        os.kill(self.processes[victim].pid, signal.SIGKILL)
        # Of the death of process 0 either jax hears first, and aborts, or we do.
        aborted = (-signal.SIGABRT, 1) if victim == 0 else 1
        expected = [aborted, aborted]
        expected[victim] = -signal.SIGKILL
        self.end(expected, seconds=60)
        return self.text(1 - victim)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _slurm(index, count, port):
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": f"{count}",
        "SLURM_PROCID": f"{index}",
        "SLURM_LOCALID": f"{index}",
        "JAX_COORDINATOR_PORT": f"{port}",
    }


def _own(index, count, port):
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": f"{count}",
        "JAX_PROCESS_ID": f"{index}",
    }


def test_own_rows_are_those_of_the_whole_batch():
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    options = {"batch_size": 6, "context": 64, "seed": 3, "steps": 9}
    whole = RandomWindows(data, **options)
    part = RandomWindows(data, **options, rows=np.array([1, 4, 5]))
    for step in range(9):
        assert (part[step] == whole[step][[1, 4, 5]]).all()


def test_who_takes_part(monkeypatch):
    for name in [*processes.OWN, "TPU_WORKER_HOSTNAMES", *_slurm(0, 2, 1)]:
        monkeypatch.delenv(name, raising=False)
    assert processes.detect() is None
    with pytest.raises(UserError, match="--distributed=on, but neither SLURM"):
        processes.start("on", print)
    for name, value in _slurm(1, 2, 1234).items():
        monkeypatch.setenv(name, value)
    assert processes.detect() == ("localhost:1234", 2, 1, [1])
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(UserError, match="not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROC"):
        processes.detect()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=2 must be a number below"):
        processes.detect()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert processes.detect() == ("a:1", 2, 1, None)


def fingerprint(text):
    return re.search("parameters fingerprint: (.*)", text)[1]


def rows(folder, name="metrics.jsonl"):
    lines = (folder / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def of_gloo(line):
    """Whether Gloo printed the line: its threads write over each other, so that
    a line may hold any piece of "[Gloo] Rank 1 is connected to 7 peer ranks.
    Expected number of connected peer ranks is : 7", or none of it."""
    its = "Gloo Rank is connected to peer ranks Expected number of"
    return set(re.findall("[A-Za-z]+", line)) <= set(its.split())


@pytest.mark.slow
def test_two_processes_train_and_one_speaks(straight):
    first, second, folder = straight
    assert "process 0 of 2 on" in first and "waits for the others at" in first
    assert "finished at step 12" in first
    rest = [line for line in second.splitlines() if not of_gloo(line)]
    assert len(rest) == 1 and "process 1 of 2" in rest[0], second
    found = [(row["step"], row["split"]) for row in rows(folder)]
    trained = [(step, "train") for step in range(1, 13)]
    assert found == [(0, "validation"), *trained, (12, "validation"), (12, "test")]
    steps = {entry.name for entry in (folder / "checkpoints").iterdir()}
    assert steps == {"4", "8", "12"}


def test_what_nobody_expected_is_shown_before_one_of_several_ends():
    script = """if True:
        import os, sys
        from sparse_flax import main, processes

        def run(argv):
            raise RuntimeError("the peer is gone")

        def end(status, sentence):
            sys.stdout.write(f"told the others: {sentence}")
            sys.stdout.flush()
            os._exit(status)

        main.main, processes.count, processes.fail = run, lambda: 2, end
        sys.argv = ["main"]
        main.entry_point()
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert done.stdout == "told the others: RuntimeError: the peer is gone"
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: process 0 of 2 failed (RuntimeError: the peer is gone); the same "
        "command on all hosts goes on from the last checkpoint"
    )


@pytest.mark.slow
def test_killed_and_told_to_stop_it_goes_on_and_nothing_is_lost(here, straight):
    often = "--config.checkpoint.every_steps=2"
    with Job(here, "killed", often) as job:
        text = job.kill_in_the_middle(1, random.randint(3, 6))
    # Either we hear nothing of it any more, or what the devices wait for breaks off.
    why = r"process 1 on .* no sign of life .* ends, too|process 0 of 2 failed \(.*\)"
    assert re.search(f"error: ({why}); the same command on all hosts goes", text), text

    # Stopped in an evaluation, which goes on long enough.
    whole = "--config.eval.every_steps=1", "--config.eval.max_windows=0"
    with Job(here, "killed", *whole, cluster=_own) as job:
        step = int(job.wait_for("step ([0-9]+)/")[1])
        job.processes[random.randrange(2)].send_signal(signal.SIGTERM)
        job.end([128 + signal.SIGTERM] * 2)
    assert f"stopped by SIGTERM at step {step};" in job.text(0), job.text(0)
    assert (here / "killed" / "checkpoints" / str(step)).is_dir()
    last = rows(here / "killed")[-1]
    assert (last["step"], last["split"]) == (step, "train")

    with Job(here, "killed", often) as job:
        text = job.kill_in_the_middle(0, random.randint(step + 1, 10))
        assert f"from the checkpoint at step {step}" in job.text(0)
    assert re.search("(because process 0 was|ends, too); the same command", text), text

    with Job(here, "killed", "--config.eval.sample_bytes=3") as job:
        job.end([0, 0])
    assert "from the checkpoint at step" in job.text(0)
    assert fingerprint(job.text(0)) == fingerprint(straight[0])
    assert len((here / "killed" / "sample.txt").read_bytes()) == 20 + 3


@pytest.mark.slow
def test_goes_on_with_other_processes_and_devices(here, straight):
    shutil.copytree(straight[2], here / "fewer")
    for step in (8, 12):
        shutil.rmtree(here / "fewer" / "checkpoints" / str(step))
    with Job(here, "fewer", "--config.mesh.data=4", count=1) as job:
        job.end([0])
    assert "from the checkpoint at step 4" in job.text(0)
    fewer, more = rows(here / "fewer"), rows(straight[2])
    assert len(fewer) == len(more) > 12
    for ours, theirs in zip(fewer, more, strict=True):
        assert ours["step"] == theirs["step"] and ours["split"] == theirs["split"]
        # Other sums, so equal but for rounding.
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-4)

    # And what one process has written, two read.
    follow = "--mode=eval", "--follow", "--config.mesh.data=8"
    with Job(here, "fewer", *follow, config=False) as job:
        job.end([0, 0])
    scored = rows(here / "fewer", "eval.jsonl")
    assert [row["step"] for row in scored] == [4, 8, 12]
    last = scored[-1]["bits_per_byte"]
    assert last == pytest.approx(fewer[-1]["bits_per_byte"], rel=1e-5)


@pytest.mark.slow
def test_a_folder_of_each_host_is_refused_on_all(here):
    with Job(here, "mine", apart=["mine", "yours"]) as job:
        job.end([2, 2])
    for index in range(2):
        assert "is not the folder that" in job.text(index)
        assert "all hosts share" in job.text(index)


# ---- What they tell each other, as one of them sees it ----------------------------


class Answers:
    """The key-value store of two processes, the other of which has been here."""

    def __init__(self, others):
        self.others, self.told = others, {}

    def key_value_set(self, key, value):
        self.told[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        return self.told.get(key) or json.dumps(self.others)


@pytest.fixture
def as_process(monkeypatch):
    def become(index, others):
        answers = Answers(others)
        for name, value in (("_index", index), ("_count", 2), ("_client", answers)):
            monkeypatch.setattr(processes, name, value)
        return answers

    return become


def test_what_must_be_the_same_everywhere_is(as_process):
    as_process(0, ["one", "host-b"])
    processes.same_everywhere("one", "other data")
    as_process(0, ["two", "host-b"])
    with pytest.raises(UserError, match="process 1 on host-b has other data than"):
        processes.same_everywhere("one", "other data")


def test_what_stops_the_first_stops_the_others(as_process):
    answers = as_process(0, None)
    with pytest.raises(UserError, match="no data"), processes.first_before_the_rest():
        raise UserError("no data")
    assert list(answers.told.values()) == ['"no data"']
    as_process(1, "no data")
    with pytest.raises(UserError, match="no data"), processes.first_before_the_rest():
        raise AssertionError("went on")
