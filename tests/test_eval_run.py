"""Scoring the checkpoints of a run, also of one that is under way."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import last_state, listing, rows, tiny, write_text

from sparse_flax import eval_run
from sparse_flax.data.batches import evaluation_batches
from sparse_flax.errors import UserError
from sparse_flax.eval_run import EvalRun
from sparse_flax.evaluate import bits_per_byte
from sparse_flax.sharding import make_mesh
from sparse_flax.train import Trainer
from sparse_flax.workdir import WorkDir

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    Trainer(tiny(text, eval__sample_bytes=0), str(workdir), say=lambda line: None).run()
    return workdir


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(eval_run, "POLL_SECONDS", 0.05)


def found(workdir):
    return [json.loads(line) for line in (workdir / "eval.jsonl").open()]


def scored(workdir, config, step=None):
    EvalRun(config, str(workdir), say=(lines := []).append).run(step)
    return found(workdir)[-1], lines


def test_agrees_with_the_evaluation_of_training(copied, text):
    (row,) = [row for row in rows(copied) if row["split"] == "test"]
    ours, _ = scored(copied, tiny(text))
    assert ours["bits_per_byte"] == pytest.approx(row["bits_per_byte"], abs=1e-6)
    assert (ours["step"], ours["windows"], ours["whole"]) == (12, 12, False)
    first = [row for row in rows(copied) if row["split"] == "validation"][1]
    assert first["step"] == 5  # evaluated, but not saved
    raw, _ = scored(copied, tiny(text, eval__weights="raw", eval__split="validation"))
    assert (raw["weights"], raw["split"]) == ("raw", "validation")
    assert raw["bits_per_byte"] != ours["bits_per_byte"]
    earlier, _ = scored(copied, tiny(text), step=4)
    assert earlier["step"] == 4
    assert earlier["bits_per_byte"] > ours["bits_per_byte"]


def test_scores_the_whole_split_on_a_mesh_beside_a_running_job(copied, text):
    before = listing(copied)
    job = WorkDir(copied)  # which holds the lock
    changes = {"eval__max_windows": 0, "eval__min_context": 48}
    alone, lines = scored(copied, tiny(text, **changes))
    mesh = {"mesh__fsdp": 2, "eval__batch_size": 4}
    together, _ = scored(copied, tiny(text, **changes, **mesh))
    job.close()
    assert alone["bits_per_byte"] == pytest.approx(together["bits_per_byte"], abs=1e-3)
    assert (alone["bytes_scored"], alone["windows"]) == (1000, 60)
    assert alone["bytes_per_s"] * alone["seconds"] == pytest.approx(1000)
    assert lines[-1].startswith(f"step 12: test {alone['bits_per_byte']:.4f} bits/byte")
    assert "minimum context 48 of 64, the last 16 bytes" in lines[-1]
    assert listing(copied).items() - before.items() == {
        item for item in listing(copied).items() if item[0].endswith("eval.jsonl")
    }


@pytest.mark.parametrize(("weights", "field"), [("ema", "ema"), ("raw", "model")])
def test_scores_the_weights_that_are_named(copied, text, weights, field):
    row, _ = scored(copied, tiny(text, eval__weights=weights))
    _, restored = last_state(copied, tiny(text))
    data = np.frombuffer(text.read_bytes(), np.uint8)[19_000:]
    batches = evaluation_batches(data, batch_size=4, context=64, max_windows=12)
    with jax.set_mesh(make_mesh()):
        score = bits_per_byte(
            getattr(restored, field), batches, count=3, stop=False, say=print
        )
    assert row["bits_per_byte"] == pytest.approx(score, abs=1e-5)


def test_a_part_with_a_minimum_of_context_counts_what_it_scored(copied, text):
    row, _ = scored(copied, tiny(text, eval__max_windows=10, eval__min_context=48))
    assert (row["windows"], row["bytes_scored"]) == (10, 10 * 16)


def test_passes_over_what_it_cannot_read_and_moves_nothing(copied, text):
    for step in (8, 12):
        for path in (copied / "checkpoints" / str(step)).rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 8])
    before = listing(copied)
    row, lines = scored(copied, tiny(text))
    assert row["step"] == 4
    assert [line.split(" (")[0] for line in lines if "passed over" in line] == [
        "checkpoint 12 is damaged",
        "checkpoint 8 is damaged",
    ]
    assert before.items() <= listing(copied).items()
    ours = EvalRun(tiny(text), str(copied), say=(lines := []).append)
    shutil.rmtree(copied / "checkpoints" / "4")
    with jax.set_mesh(ours.mesh):
        assert ours.checkpoints.read_part(4, *ours._part()) is None
    assert lines[-1] == "checkpoint 4 was deleted meanwhile and is passed over"
    with pytest.raises(UserError, match=r"no checkpoint .* could be read"):
        ours.run()


def test_follows_a_job_in_training_to_its_end(tmp_path, text):
    workdir, lines = tmp_path / "run", []
    trainer = Trainer(
        tiny(text, eval__sample_bytes=0), str(workdir), say=lambda line: None
    )
    go = threading.Event()
    job = threading.Thread(target=lambda: go.wait(60) and trainer.run())
    job.start()

    def say(line):
        lines.append(line)
        if line.startswith("waiting for a checkpoint after step 0; the run ends at st"):
            go.set()

    EvalRun(tiny(text), str(workdir), say=say).follow()
    job.join()
    assert go.is_set()
    assert lines[-1] == "the run has ended at step 12; all is scored"
    assert [row["step"] for row in found(workdir)] == [4, 8, 12]
    # Each once, by the same protocol; by another one again.
    EvalRun(tiny(text), str(workdir), say=(lines := []).append).follow()
    assert lines[-1] == "the run has ended at step 12; all is scored"
    assert len(found(workdir)) == 3
    raw = tiny(text, eval__weights="raw")
    EvalRun(raw, str(workdir), say=lines.append).follow()
    assert [row["step"] for row in found(workdir)[3:]] == [4, 8, 12]


def test_stops_when_told_and_says_so(copied, text):
    ours = EvalRun(tiny(text), str(copied), say=(lines := []).append)
    ours.stop.signal = "SIGINT"
    ours.follow()
    assert lines[-1] == "stopped by SIGINT"
    assert not (copied / "eval.jsonl").exists()
    (copied / "eval.jsonl").write_text("")
    ours.run()
    where = f"what was scored before is in {copied / 'eval.jsonl'}"
    assert lines[-1] == f"stopped by SIGINT; {where}"
    assert not (copied / "eval.jsonl").read_text()


def test_a_row_after_a_torn_one_is_whole(copied, text):
    (copied / "eval.jsonl").write_text('{"step": 1')
    EvalRun(tiny(text), str(copied), say=lambda line: None).run()
    torn, row = (copied / "eval.jsonl").read_text().splitlines()
    assert (torn, json.loads(row)["step"]) == ('{"step": 1', 12)


def test_knows_which_figure_of_the_paper_is_comparable(copied, text):
    ours = EvalRun(tiny(text), str(copied), say=lambda line: None)
    assert ours._paper() is None
    ours.protocol |= {"context": 12288, "min_context": 6144, "whole": True}
    assert ours._paper() is None
    object.__setattr__(ours.splits, "name", "enwik8")
    assert ours._paper() == "0.9952"
    ours.protocol["min_context"] = 6000
    assert ours._paper() is None
    object.__setattr__(ours.splits, "name", "cifar10")
    assert ours._paper() is None  # as far as is known, not all of its images
    object.__setattr__(ours.splits, "published", {"test": len(ours.data)})
    assert ours._paper() == "2.80"


def test_what_is_not_there_is_a_sentence(copied, tmp_path, text):
    with pytest.raises(UserError, match=r"holds no run .* train first"):
        EvalRun(tiny(text), str(tmp_path / "none"), say=print)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match=r"model.width=32, but the run .* use 16"):
        EvalRun(tiny(text, model__width=32), str(copied), say=print)
    ours = EvalRun(tiny(text), str(copied), say=print)
    with pytest.raises(UserError, match=r"=7 is not in .* 4, 8, 12; try 8"):
        ours.run(step=7)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match=r"holds no checkpoint yet; .* --follow"):
        ours.run()


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", "sparse_flax.main", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_from_the_command_line_the_run_itself_is_the_config(copied):
    changes = ["--config.eval.min_context=32", "--config.eval.max_windows=0"]
    result = command("--mode=eval", f"--workdir={copied}", *changes)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith("step 12: test ")
    (row,) = found(copied)
    assert (row["min_context"], row["bytes_scored"]) == (32, 1000)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mode=eval"], "or name a run's --workdir"),
        (["--mode", "eval", "--workdir", "none"], "--workdir=none holds no run"),
        (
            ["--follow", "--config=configs/quickstart.py"],
            "does nothing in --mode=train",
        ),
    ],
)
@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_a_sentence(arguments, sentence):
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    (said,) = result.stderr.splitlines()
    assert said.startswith("error: ") and sentence in said
