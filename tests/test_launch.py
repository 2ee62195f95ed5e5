"""The launchers: what they would run, and their files; nothing of a cloud is here."""

import os
import shlex
import subprocess
import sysconfig
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
        *("create", "ssh", "ssh", "describe", "ssh"),
    ]


def test_gke_by_xpk_and_by_a_jobset():
    image = "--image=registry/sparse-flax"
    (xpk,) = dry_run("gke.sh", "xpk", image, "--cluster=c", "--", *FLAGS)
    assert xpk[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--docker-image=registry/sparse-flax"} <= set(xpk)
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
        (["tpu.sh", "craete"], "craete is neither an action nor an option"),
        (["gke.sh", "apply"], "--image=... is missing"),
        (["gke.sh", "xpk", "--image=i"], "--cluster=... is missing"),
        (["gke.sh", "--zoen=x"], "--zoen=x is neither"),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, sentence):
    said = dry_run(*arguments)
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
