"""Two real processes of four CPU devices each: they train, they are killed, go on."""

import json
import os
import random
import re
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
    config.eval.every_steps = 6
    config.eval.max_windows = 16
    config.eval.batch_size = 8
    config.eval.prompt_bytes = 20
    config.eval.sample_bytes = 0
    config.checkpoint.every_steps = 4
    config.log.every_steps = 1
    return config
"""
LONG = ("--config.train.steps=100000", "--config.checkpoint.every_steps=20")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a config, a text, and what was compiled before."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny.py").write_text(CONFIG)
    rng = random.Random(0)
    (folder / "text.txt").write_text("".join(rng.choices("etaoin shr", k=20_000)))
    return folder


class Job:
    """Processes of one run, started as a scheduler would; what they print in files."""

    def __init__(self, here, workdir, *arguments, count=2, cluster=None, **options):
        port = _free_port()
        self.logs = [here / f"{workdir}-{i}-{port}.log" for i in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            # What jax detects, not flags of our own.
            names = (cluster or _slurm)(index, count, port) if count > 1 else {}
            quiet = {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COMPILATION_CACHE_DIR": str(here / f"compiled-{count}"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            where = options.get("workdirs", [workdir] * count)[index]
            command = [sys.executable, "-m", "sparse_flax.main", f"--workdir={where}"]
            if not any("--config=" in argument for argument in arguments):
                command.append("--config=tiny.py")
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *arguments],
                        cwd=here,
                        env=os.environ | quiet | names,
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

    def wait_for(self, pattern, index=0, seconds=100):
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text(index))):
            alive = self.processes[index].poll() is None
            assert alive and time.monotonic() < until, self.text(index)
            time.sleep(0.05)
        return found

    def end(self, seconds=120):
        """Return the exit statuses, once all have ended."""
        until = time.monotonic() + seconds
        return [
            process.wait(max(until - time.monotonic(), 0.1))
            for process in self.processes
        ]


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


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_train_and_one_speaks(here):
    short = "--config.train.steps=4", "--config.model.dropout=0.0"
    with Job(here, "whole", *short) as job:
        assert job.end() == [0, 0], job.text(0) + job.text(1)
    first, second = job.text(0), job.text(1)
    assert "process 0 of 2 on" in first and "waits for the others at" in first
    assert "finished at step 4" in first
    # Gloo prints for itself.
    rest = [line for line in second.splitlines() if "Gloo" not in line]
    assert len(rest) == 1 and "process 1 of 2" in rest[0], second
    steps = [row["step"] for row in rows(here / "whole") if row["split"] == "train"]
    assert steps == [1, 2, 3, 4]
    assert (here / "whole" / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_killed_and_gone_on_with_nothing_is_lost(here):
    with Job(here, "straight") as job:
        assert job.end() == [0, 0], job.text(0) + job.text(1)
        expected = fingerprint(job.text(0))
    victim = random.randrange(2)
    with Job(here, "killed") as job:
        job.wait_for(f"step {random.randrange(5, 12)}/12")
        os.kill(job.processes[victim].pid, signal.SIGKILL)
        statuses = job.end()
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] != 0, statuses
    with Job(here, "killed", cluster=_own) as job:
        assert job.end() == [0, 0], job.text(0) + job.text(1)
    assert re.search("from the checkpoint at step (4|8)", job.text(0))
    assert fingerprint(job.text(0)) == expected


@pytest.mark.slow
def test_goes_on_as_another_number_of_processes(here):
    with Job(here, "moved", "--config.train.steps=4") as job:
        assert job.end() == [0, 0], job.text(0) + job.text(1)
    with Job(here, "moved", "--config.train.steps=8", count=1) as job:
        assert job.end() == [0], job.text(0)
        assert "from the checkpoint at step 4" in job.text(0)
    with Job(here, "alone", "--config.train.steps=4", count=1) as job:
        assert job.end() == [0], job.text(0)
    moved, alone = rows(here / "moved"), rows(here / "alone")
    # The same mesh, its sums over other wires: equal but for rounding.
    for ours, theirs in zip(moved, alone, strict=False):
        assert ours["step"] == theirs["step"] and ours["split"] == theirs["split"]
        if ours["step"] <= 4 and ours["split"] == "train":
            both = ours["bits_per_byte"], theirs["bits_per_byte"]
            assert both[0] == pytest.approx(both[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_left_ends_within_a_minute_and_says_why(here, victim):
    with Job(here, f"left-{victim}", *LONG) as job:
        job.wait_for("step 3/")
        os.kill(job.processes[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        statuses = job.end(60)
        assert time.monotonic() - began < 60
    time.sleep(0.5)  # what outlives it may have the last word
    text = job.text(1 - victim)
    assert statuses[1 - victim] != 0 and "Traceback" not in text, text
    said = "ends, too" if victim else "or because process 0 was"
    assert said in text and "goes on from the last checkpoint" in text, text


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_saves_the_same_step_everywhere(here, told):
    name = f"told-{told}"
    with Job(here, name, *LONG) as job:
        job.wait_for("step 3/")
        job.processes[told].send_signal(signal.SIGTERM)
        assert job.end() == [0, 0], job.text(0) + job.text(1)
    step = re.search("stopped by SIGTERM at step ([0-9,]+)", job.text(0))[1]
    assert (here / name / "checkpoints" / step).is_dir()


@pytest.mark.slow
def test_sigterm_during_an_evaluation_gives_it_up(here):
    (here / "long.txt").write_bytes((here / "text.txt").read_bytes() * 60)
    options = "--config.data.path=long.txt", "--config.eval.max_windows=0"
    # Of 900 batches of eight windows.
    with Job(here, "evaluating", *LONG, *options) as job:
        job.wait_for("resume   ")
        time.sleep(3)
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.end() == [0, 0], job.text(0) + job.text(1)
    assert "stopped by SIGTERM at step 0" in job.text(0)


@pytest.mark.slow
def test_a_folder_of_each_host_is_refused_on_all(here):
    with Job(here, "mine", workdirs=["mine", "yours"]) as job:
        assert job.end() == [2, 2]
    for index in range(2):
        assert "is not the folder that" in job.text(index)
        assert "all hosts share" in job.text(index)


@pytest.mark.slow
def test_an_evaluation_over_processes(here):
    with Job(here, "scored") as job:
        assert job.end() == [0, 0], job.text(0) + job.text(1)
    found = []
    for count in (2, 1):
        with Job(here, "scored", "--mode=eval", "--config=tiny.py", count=count) as job:
            assert set(job.end()) == {0}, job.text(0)
    lines = (here / "scored" / "eval.jsonl").read_text().splitlines()
    found = [json.loads(line)["bits_per_byte"] for line in lines]
    assert len(found) == 2 and found[0] == pytest.approx(found[1], rel=1e-5)
