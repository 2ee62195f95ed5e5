"""The command line, with real signals, real kills and a disk that is really full."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_flax.workdir import WorkDir

ROOT = Path(__file__).parents[1]
CONFIG = """
from sparse_flax.config import check_preset, defaults

def get_config(preset=""):
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
    config.train.steps = 12
    config.train.batch_size = 2
    config.optim.warmup_steps = 2
    config.eval.every_steps = 6
    config.eval.batch_size = 1
    config.eval.prompt_bytes = 20
    config.eval.sample_bytes = 20
    config.checkpoint.every_steps = 4
    config.log.every_steps = 1
    if check_preset(preset, "wide"):
        config.model.width = 32
    return config
"""


def environment(folder):
    quiet = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return os.environ | quiet | cache


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a config and a text of which 800 windows are held out."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "tiny.py").write_text(CONFIG)
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 8))) for _ in range(99)]
    text = " ".join(rng.choices(words, k=512_000))[:1_024_000]
    (folder / "text.txt").write_text(text)
    return folder


def command(here, *arguments, config="tiny.py"):
    main = [sys.executable, "-m", "sparse_flax.main", f"--config={config}"]
    return {"args": [*main, *arguments], "cwd": here, "env": environment(here)}


def finish(here, *arguments, **options):
    return subprocess.run(
        **command(here, *arguments), capture_output=True, text=True, **options
    )


def start(here, *arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(**command(here, *arguments), **pipes)


def wait_for(process, beginning):
    """Read what a run says up to the line that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"never said {beginning!r}; {process.stderr.read()}")


def print_of(said):
    (found,) = re.findall(r"^parameters fingerprint: ([0-9a-f]{64})$", said, re.M)
    return found


def rows(workdir):
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{**row, "tokens_per_s": None} for row in found]


def assert_refused(result, *sentences):
    """One sentence on standard error, status 2, no traceback anywhere."""
    assert result.returncode == 2, result.stderr
    (said,) = result.stderr.splitlines()
    assert said.startswith("error: ")
    for sentence in sentences:
        assert sentence in said
    assert "Traceback" not in result.stdout


def test_without_a_flag_it_asks_for_one(here):
    line = [sys.executable, "-m", "sparse_flax.main"]
    result = subprocess.run(
        line, capture_output=True, text=True, env=environment(here), cwd=here
    )
    assert_refused(result, "--config is missing; try --config=configs/quickstart.py")


@pytest.fixture(scope="module")
def straight(here):
    """The command as the README has it, never interrupted."""
    result = finish(here)
    assert result.returncode == 0, result.stderr
    return result


def assert_same_end(here, workdir, straight):
    result = finish(here, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert print_of(result.stdout) == print_of(straight.stdout)
    assert rows(workdir) == rows(here / "runs" / "tiny")
    return result.stdout


def test_it_trains_into_runs_and_says_only_what_it_should(here, straight):
    lines = straight.stdout.splitlines()
    assert lines[0] == "working directory  runs/tiny"
    assert (here / "runs" / "tiny" / "config.json").exists()
    assert lines[-1].startswith("parameters fingerprint: ")
    assert straight.stderr == ""


@pytest.mark.slow
def test_a_preset_has_a_folder_of_its_own_and_any_terminal_will_do(here):
    arguments = command(here, "--config.train.steps=1", config="tiny.py:wide")
    arguments["env"]["PYTHONIOENCODING"] = "ascii"
    result = subprocess.run(**arguments, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("working directory  runs/tiny-wide\n")
    saved = json.loads((here / "runs" / "tiny-wide" / "config.json").read_text())
    assert saved["config"]["model"]["width"] == 32
    assert print_of(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config.model.widht=3"], "widht"),
        (["--config.train.steps=soon"], "soon"),
        (["--mode=play"], "dry_run"),
        (["train"], "'train' is not a flag"),
        (["--config=missing.py"], "No such file or directory: 'missing.py'"),
        (["--config=missing.py", "--config.seed=1"], "No such file or directory: 'mis"),
        (["--config=."], "--config cannot be read: Is a directory: '.'"),
        (["--config=tiny.py:large"], "this config has: 'wide'"),
    ],
)
@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_a_sentence(here, arguments, sentence):
    assert_refused(finish(here, *arguments), sentence)


@pytest.mark.parametrize(
    "sent",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_in_training_saves_and_ends_well(here, tmp_path, straight, sent):
    process = start(here, f"--workdir={tmp_path / 'run'}")
    wait_for(process, "step 1/12")
    process.send_signal(sent)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + sent, "")
    assert "fingerprint" not in said
    stopped = re.search(rf"^stopped by {sent.name} at step (\d+);", said, re.M)
    step = stopped.group(1)
    assert f"saved {tmp_path / 'run' / 'checkpoints' / step}" in said.splitlines()
    said = assert_same_end(here, tmp_path / "run", straight)
    assert f"from the checkpoint at step {step}" in said


def test_sigterm_in_an_evaluation_saves_and_it_is_made_up_for(here, tmp_path, straight):
    workdir = tmp_path / "run"
    process = start(here, f"--workdir={workdir}")
    wait_for(process, "step 6/12")  # 800 windows are evaluated now
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert "stopped by SIGTERM at step 6;" in said
    assert f"saved {workdir / 'checkpoints' / '6'}" in said.splitlines()
    assert [r["step"] for r in rows(workdir) if r["split"] == "validation"] == [0]
    assert_same_end(here, workdir, straight)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(here, tmp_path, straight):
    """Most moments are in the middle of writing a checkpoint: each step makes one."""
    workdir, rng, killed = tmp_path / "run", random.Random(1), 0
    for first in ["step 0: ", "compiled ", "step 1/12", "step 3/12", "saved ", "step "]:
        process = start(
            here, f"--workdir={workdir}", "--config.checkpoint.every_steps=1"
        )
        wait_for(process, first)
        time.sleep(rng.random() / 10)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 4
    assert_same_end(here, workdir, straight)


def test_a_second_process_is_refused_and_changes_nothing(here, straight):
    workdir = WorkDir(here / "runs" / "tiny")
    before = (workdir.path / "config.json").stat().st_mtime_ns
    assert_refused(
        finish(here, "--config.train.steps=13"),
        "runs/tiny is in use by another process",
    )
    assert (workdir.path / "config.json").stat().st_mtime_ns == before
    workdir.close()


@pytest.mark.slow
@pytest.mark.parametrize("workdir", ["text.txt/run", "/proc/run", "."])
def test_a_folder_that_cannot_be_used_is_refused(here, workdir):
    before = sorted(path.name for path in here.iterdir())
    assert_refused(finish(here, f"--workdir={workdir}"), f"--workdir={workdir} ")
    assert sorted(path.name for path in here.iterdir()) == before


def limited(here, kilobytes, *arguments):
    """Run where no file may grow past so many kB, as if the disk were full."""
    options = command(here, *arguments)
    limit = f"ulimit -f {kilobytes}; exec " + '"$@"'
    options["args"] = ["bash", "-c", limit, "bash", *options["args"]]
    # A compiled program is such a file: those there are read, and none is written.
    options["env"]["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "3600"
    return subprocess.run(**options, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("kilobytes", "file"),
    [
        (1, "config.json could not be written: File too large"),
        pytest.param(
            8, "loss.png could not be written: File too large", marks=pytest.mark.slow
        ),
        pytest.param(
            60, "checkpoint 4 could not be written: File too", marks=pytest.mark.slow
        ),
    ],
)
def test_a_full_disk_is_a_sentence(here, tmp_path, straight, kilobytes, file):
    workdir = tmp_path / "run"
    # A checkpoint that is larger than the curve, where that is to fit.
    wider = ["--config.model.width=64"] if kilobytes == 60 else []
    result = limited(here, kilobytes, f"--workdir={workdir}", *wider)
    if wider:
        # Not all that tensorstore's threads print beside it can be kept off.
        assert result.returncode == 2 and f"error: {file}" in result.stderr
        assert finish(here, f"--workdir={workdir}", *wider).returncode == 0
    else:
        assert_refused(result, file)
        assert_same_end(here, workdir, straight)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", range(2, 12, 3))
def test_rows_that_do_not_fit_are_a_sentence(here, straight, tmp_path, kilobytes):
    """Of a run long enough that its metrics or events outgrow everything else."""
    del straight  # which is the run that goes on
    workdir = tmp_path / "run"
    shutil.copytree(here / "runs" / "tiny", workdir)
    more = ["--config.train.steps=500", "--config.eval.every_steps=0"]
    more += ["--config.checkpoint.every_steps=0", "--config.eval.max_windows=1"]
    result = limited(here, kilobytes, f"--workdir={workdir}", *more)
    assert_refused(result, "could not be written: File too large")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(here, tmp_path):
    process = start(here, f"--workdir={tmp_path / 'run'}")
    wait_for(process, "resume ")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 2
    assert errors.startswith("error: [Errno 32] Broken pipe")
    assert len(errors.splitlines()) == 1


def test_a_dry_run_whose_reader_goes_away_ends_without_a_word(here):
    process = start(here, "--mode=dry_run")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
