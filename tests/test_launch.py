"""The launchers: what they would run, and their files; nothing of a cloud is here."""

import os
import shlex
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
FLAGS = ["--config=configs/enwik8.py", "--config.model.patterns=Fixed(128, 32)"]


def dry_run(script, *arguments):
    """The commands that a script prints, each as its words; or why it prints none."""
    done = subprocess.run(
        [ROOT / "launch" / script, "--dry-run", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": "python3"},
    )
    if done.returncode:
        assert done.returncode == 2 and not done.stdout
        return done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_a_tpu_from_its_creation_to_its_end():
    where = ["sparse-flax", "--zone=us-west4-a"]
    begin = ["gcloud", "compute", "tpus", "tpu-vm"]
    (create,) = dry_run("tpu.sh", "create", "--type=v5litepod-16", "--spot")
    assert create[:6] == [*begin, "create", where[0]]
    assert {"--accelerator-type=v5litepod-16", "--spot", where[1]} <= set(create)
    share = "--share=10.0.0.2:/runs"
    (setup,) = dry_run("tpu.sh", "setup", "--source=https://some/where", share)
    assert setup[4:8] == ["ssh", *where, "--worker=all"]
    for step in ("git clone --quiet https://some/where", "'jax[tpu]'", "mount -t nfs"):
        assert step in setup[-1]
    (logs,) = dry_run("tpu.sh", "logs")
    assert logs[-2:] == ["--worker=0", "--command=tail -n 100 -F run.log"]
    (delete,) = dry_run("tpu.sh", "delete", "--name=other")
    assert delete == [*begin, "delete", "other", where[1], "--quiet"]


def test_what_a_tpu_runs_is_what_was_asked_for(tmp_path):
    (run,) = dry_run("tpu.sh", "run", "--", *FLAGS)
    command = run[-1].removeprefix("--command=")
    # As on a host of the TPU: a clone beside an environment whose python tells.
    (tmp_path / "sparse_flax").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    python.chmod(0o755)
    subprocess.run(["bash", "-c", f"{command} wait"], cwd=tmp_path, check=True)
    told = (tmp_path / "run.log").read_text().splitlines()
    assert told == ["-m", "sparse_flax.main", *FLAGS]
    assert (tmp_path / "run.status").read_text() == "3\n"


def test_a_tpu_that_is_kept_does_all_of_it():
    kept = dry_run("tpu.sh", "keep", "--source=URL", "--", *FLAGS)
    assert [line[4] for line in kept if line] == [
        *("describe", "create", "ssh", "ssh", "ssh"),
    ]


# Stands for Google's: says what it was told to do, in a file, and answers by a script,
# a line a minute: the state, or the error, and what the run says.
GCLOUD = r"""#!/usr/bin/env bash
cd "$(dirname "$0")"
minute=$(cat minute)
answer() { sed -n "${minute}p" "$1"; }
case "$4 $*" in
    describe*) state=$(answer states)
        case $state in *ERROR*) echo "$state" >&2; exit 1 ;; esac
        echo "$state" ;;
    ssh*run.status\ 2*) answer ends ;;
    ssh*apt*) echo setup >> did; [[ $(answer setups) != fails ]] ;;
    ssh*) echo run >> did ;;
    *) echo "$4" >> did; [[ $(answer creates) != fails ]] ;;
esac
"""
SLEEP = '#!/bin/sh\ncd "$(dirname "$0")"; m=$(cat minute); echo $((m + 1)) > minute\n'
MISSING = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource"


@pytest.mark.parametrize(
    ("minutes", "did", "status"),
    [
        # Each minute: the state, how the run ended, whether setup and create work.
        (
            [
                (MISSING, "", "", "fails"),  # no machine is free
                (MISSING, "", "", ""),
                ("READY", "none", "fails", ""),  # not yet reachable
                ("READY", "none", "", ""),
                ("READY", "", "", ""),
                ("ERROR: the network is down", "", "", ""),
                ("READY", "143", "", ""),  # it saved at a notice
                ("PREEMPTED", "", "", ""),
                ("READY", "none", "", ""),
                ("READY", "1", "", ""),  # another host was lost
                ("READY", "0", "", ""),
            ],
            "create create setup setup run setup run delete create setup run setup run",
            0,
        ),
        # What an earlier run left is not this one's; a mistake is not made twice.
        ([("READY", "0", "", ""), ("READY", "2", "", "")], "setup run", 2),
        # One that goes on is watched.
        ([("READY", "", "", ""), ("READY", "0", "", "")], "", 0),
        ([("READY", "1", "", "")] * 12, "setup run " * 10, 1),
    ],
    ids=["through everything", "stale", "watched again", "ten failures"],
)
def test_a_tpu_is_kept_until_the_run_ends(tmp_path, minutes, did, status):
    for name, text in {"gcloud": GCLOUD, "sleep": SLEEP, "minute": "1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name, column in zip(
        ["states", "ends", "setups", "creates"], zip(*minutes, strict=True), strict=True
    ):
        (tmp_path / name).write_text("\n".join(column) + "\n")
    done = subprocess.run(
        [ROOT / "launch/tpu.sh", "keep", "--source=URL", "--", *FLAGS],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=60,
    )
    told = tmp_path / "did"
    assert (told.read_text().split() if told.exists() else []) == did.split()
    assert done.returncode == status, done.stdout + done.stderr


def test_gke_by_xpk_and_by_a_jobset():
    image = "--image=registry/sparse-flax"
    where = "--cluster=c", "--storage=runs"
    (xpk,) = dry_run("gke.sh", "xpk", image, *where, "--", *FLAGS)
    assert xpk[:3] == ["xpk", "workload", "create"]
    assert {*where, "--docker-image=registry/sparse-flax"} <= set(xpk)
    assert {"--max-restarts=1000", "--restart-on-exit-codes=1"} <= set(xpk)
    command = xpk[-1].removeprefix("--command=")
    assert shlex.split(command) == ["python", "-m", "sparse_flax.main", *FLAGS]
    printed = subprocess.run(
        [ROOT / "launch/gke.sh", "--dry-run", "apply", image, "--", *FLAGS],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    jobset = yaml.safe_load(printed)
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "sparse-flax"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == FLAGS
    assert container["image"] == "registry/sparse-flax"
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] * chips == int(rows) * int(columns)
    assert job["parallelism"] == job["completions"]
    # A user's mistake ends the job, and all else begins it again.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2] and rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_slurm_starts_what_was_asked_for():
    (srun,) = dry_run("slurm.sh", *FLAGS)
    begin = ["srun", "--kill-on-bad-exit=1", "python3", "-m", "sparse_flax.main"]
    assert srun == [*begin, *FLAGS]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tpu.sh"], "say what to do: create, setup"),
        (["tpu.sh", "setup"], "--source=URL is missing"),
        (["tpu.sh", "run"], "nothing to run"),
        (["tpu.sh", "keep", "--", "--config=x"], "--source=URL is missing"),
        (["tpu.sh", "craete"], "craete is neither an action nor an option"),
        (["gke.sh", "apply"], "--image=... is missing"),
        (["gke.sh", "xpk", "--image=i"], "--cluster=... is missing"),
        (["gke.sh", "--zoen=x"], "--zoen=x is neither"),
        (["turns.sh", "ten", "out", *FLAGS], "call it as launch/turns.sh SECONDS OUT"),
        (["turns.sh", "10", "out", *FLAGS], "--workdir=FOLDER"),
        (["turns.sh", "10", "out", "--mode=eval", "--workdir=x"], "leave it out"),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, sentence):
    said = dry_run(*arguments)
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "left", "requeued"),
    [(143, 100, True), (143, 5000, False), (0, 100, False), (1, 100, False)],
    ids=["its time is over", "scancel", "finished", "failed"],
)
def test_slurm_queues_again_what_ran_out_of_time(tmp_path, status, left, requeued):
    for name, text in {"srun": f"exit {status}", "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + left)}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "launch/slurm.sh", *FLAGS],
        capture_output=True,
        text=True,
        env=os.environ | job | path,
    )
    assert (done.stdout, done.returncode) == ("requeue 7\n" * requeued, status)


def test_turns_are_to_train_to_score_and_to_sample():
    flags = [*FLAGS, "--workdir=w"]
    train, score, sample = dry_run("turns.sh", "10", "out", *flags)
    begin = ["python3", "-m", "sparse_flax.main"]
    assert train == [*begin, *flags]
    assert score == [*begin, "--mode=eval", *flags, "--config.eval.max_windows=0"]
    assert sample == [*begin, "--mode=sample", *flags]


def test_a_turn_goes_on_where_the_last_one_was_stopped(tmp_path):
    run, out = tmp_path / "runs" / "mine", tmp_path / "out"
    # Trains until it is stopped, the first time; everything else is done at once.
    stand_in = f"""#!/bin/sh
        mkdir -p {run}
        echo "$*" >> {tmp_path}/calls
        [ -e {run}/loss.png ] && exit 0
        touch {run}/loss.png
        trap 'exit 143' TERM
        sleep 30 & wait
    """
    (tmp_path / "python").write_text(stand_in)
    (tmp_path / "python").chmod(0o755)

    def turn(seconds):
        return subprocess.run(
            [ROOT / "launch/turns.sh", seconds, out, f"--workdir={run}"],
            env=os.environ | {"PYTHON": str(tmp_path / "python")},
            capture_output=True,
            text=True,
        )

    first = turn("5")
    assert first.returncode == 75
    assert first.stdout == "trained: out of time; the same command goes on\n"
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "loss.png"]
    assert [turn("60").returncode for _ in range(2)] == [0, 0]
    main = f"-m sparse_flax.main --workdir={run}"
    evaluate = main.replace("--workdir", "--mode=eval --workdir")
    sample = main.replace("--workdir", "--mode=sample --workdir")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [main, main, f"{evaluate} --config.eval.max_windows=0", sample]
