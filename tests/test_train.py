"""A run ends the same however often it was stopped, and loses nothing on the way."""

import errno
import importlib.util
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from sparse_flax import config as config_lib
from sparse_flax import optim, sample, state
from sparse_flax.checkpoint import Checkpointer
from sparse_flax.config_checks import finalize
from sparse_flax.data.batches import evaluation_windows
from sparse_flax.data.bigram import bigram_bits_per_byte
from sparse_flax.errors import UserError
from sparse_flax.integrity import fingerprint, named_leaves
from sparse_flax.sharding import make_mesh
from sparse_flax.stopping import StopRequest
from sparse_flax.train import Trainer

ROOT = Path(__file__).parents[1]
TINY = {
    "data.name": "bytes",
    "model.context": 64,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.patterns": "Strided(8)",
    "model.dropout": 0.2,
    "train.steps": 12,
    "eval.every_steps": 5,
    "eval.max_windows": 12,
    "eval.prompt_bytes": 20,
    "eval.sample_bytes": 30,
    "checkpoint.every_steps": 4,
    "checkpoint.keep": 20,
    "log.every_steps": 3,
    "optim.warmup_steps": 2,
}
KEYS = [
    "step",
    "split",
    "bits_per_byte",
    "weights",
    "windows",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "tokens_per_s",
    "mfu",
]


def write_text(path, size=20_000):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 8))) for _ in range(99)]
    path.write_text(" ".join(rng.choices(words, k=size // 2))[:size])
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def tiny(text, **changes):
    """Return the quickstart's config, much smaller; `train__steps` is train.steps."""
    spec = importlib.util.spec_from_file_location("q", ROOT / "configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(TINY | {"data.path": str(text)} | dotted)
    return config


class StopAt(StopRequest):
    """A SIGTERM that comes at the nth time that anyone looks."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def __bool__(self):
        self.looks -= 1
        if self.looks == 0:
            self.signal = "SIGTERM"
        return super().__bool__()


def run(workdir, config, stop_at=0):
    """Run, until the nth look at the stop request if given; return what was said."""
    lines = []
    trainer = Trainer(config, str(workdir), say=lines.append)
    if stop_at:
        trainer.stop = StopAt(stop_at)
    trainer.run()
    return lines


def stop_at_step(workdir, config, step):
    """Run, and be told to stop while `step` is being worked on."""
    trainer = Trainer(config, str(workdir), say=lambda line: None)
    account_for = trainer.account_for

    def then_stop(values):
        account_for(values)
        if values["step"] == step:
            trainer.stop.signal = "SIGTERM"

    trainer.account_for = then_stop
    trainer.run()
    return trainer


def rows(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def untimed(workdir):
    return [{**row, "tokens_per_s": None, "mfu": None} for row in rows(workdir)]


def print_of(lines):
    found = [x for x in lines if x.startswith("parameters fingerprint: ")]
    assert len(found) == 1
    assert len(found[0].removeprefix("parameters fingerprint: ")) == 64
    return found[0]


def last_state(workdir, config):
    """Restore the newest checkpoint: parameters, averages, moments and the step."""
    config, _ = finalize(config)
    with jax.set_mesh(make_mesh()):
        checkpoints = Checkpointer(workdir / "checkpoints")
        optimizer = optim.make_optimizer(config.optim)
        key = jax.random.split(jax.random.key(config.seed))[0]
        model = config_lib.model_config(config)
        return checkpoints.restore_latest(state.abstract(model, optimizer, key))


def listing(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def contents(folder):
    return {name: content for name, (_, content) in listing(folder).items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text):
    """A run that nobody interrupted: its working directory and what it said."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    lines = run(workdir, tiny(text))
    return workdir, lines


@pytest.fixture
def copied(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    return tmp_path / "run"


def assert_same_end(workdir, lines, straight, config):
    assert print_of(lines) == print_of(straight[1])
    assert untimed(workdir) == untimed(straight[0])
    (step, ours), (_, theirs) = (last_state(w, config) for w in (workdir, straight[0]))
    assert step == 12
    for name, leaf in named_leaves(theirs).items():
        assert fingerprint(named_leaves(ours)[name]) == fingerprint(leaf), name
    sample = "sample.txt"
    assert (workdir / sample).read_bytes() == (straight[0] / sample).read_bytes()


# ---- Stopping and going on -----------------------------------------------------------


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stopped_at_random_moments_ends_the_same(tmp_path, text, straight, seed):
    rng, stopped = random.Random(seed), 0
    for _ in range(50):
        lines = run(tmp_path / "run", tiny(text), stop_at=rng.randrange(2, 15))
        if not lines[-1].startswith("stopped by SIGTERM at step "):
            break
        stopped += 1
    assert stopped > 2
    assert_same_end(tmp_path / "run", lines, straight, tiny(text))


@pytest.mark.parametrize("step", [4, 5, 7, 12])
def test_a_run_stopped_at_any_kind_of_step_ends_the_same(
    tmp_path, text, straight, step
):
    trainer = stop_at_step(tmp_path / "run", tiny(text), step)
    stopped_at = trainer.step
    assert stopped_at in (step, step + 1)
    assert trainer.checkpoints.steps()[-1] == stopped_at
    lines = run(tmp_path / "run", tiny(text))
    said = f"resume             from the checkpoint at step {stopped_at}"
    assert said in lines
    assert_same_end(tmp_path / "run", lines, straight, tiny(text))


def test_saves_before_it_evaluates(tmp_path, text):
    """An evaluation may be interrupted; a checkpoint has to be there by then."""
    config = tiny(text, checkpoint__every_steps=4, eval__every_steps=4)
    trainer, calls = Trainer(config, str(tmp_path / "run"), say=str), []
    real = {name: getattr(trainer, name) for name in ("save", "evaluate")}
    for name in real:

        def call(*args, name=name):
            calls.append((trainer.step, name))
            return real[name](*args)

        setattr(trainer, name, call)
    trainer.run()
    assert calls == [
        (0, "evaluate"),
        *((step, name) for step in (4, 8, 12) for name in ("save", "evaluate")),
        (12, "evaluate"),
    ]


def test_speed_is_in_tokens_and_without_pauses(tmp_path, text):
    config = tiny(text, checkpoint__every_steps=4, eval__every_steps=4)
    trainer = Trainer(config, str(tmp_path / "run"), say=str)
    evaluate, paused = trainer.evaluate, []

    def counted(split):
        before = trainer.clock._paused
        evaluate(split)
        paused.append(trainer.clock._paused == before)  # it is inside of a pause

    trainer.evaluate, trainer.clock.rate = counted, lambda: 3.0
    trainer.run()
    assert all(paused) and trainer.clock._paused > 0
    speeds = {r["tokens_per_s"] for r in rows(tmp_path / "run") if r["tokens_per_s"]}
    assert speeds == {3.0 * config.train.batch_size * config.model.context}


def test_a_second_ctrl_c_acts_at_once():
    former = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    stop.listen()
    assert signal.getsignal(signal.SIGINT) != former
    signal.raise_signal(signal.SIGINT)
    assert stop and stop.status == 130
    assert signal.getsignal(signal.SIGINT) == former


def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path, text, straight):
    workdir, lines = tmp_path / "run", []
    trainer = Trainer(tiny(text), str(workdir), say=lines.append)
    put_off = trainer.evaluate

    def evaluate(split):
        if trainer.step == 5:
            trainer.stop.signal = "SIGINT"
        put_off(split)

    trainer.evaluate = evaluate
    trainer.run()
    assert lines[-1].startswith("stopped by SIGINT at step 5")
    assert f"saved {workdir / 'checkpoints' / '5'}" in lines
    assert [r["step"] for r in rows(workdir) if r["split"] == "validation"] == [0]
    lines = run(workdir, tiny(text))
    assert_same_end(workdir, lines, straight, tiny(text))


def test_being_stopped_in_the_sample_leaves_the_end_to_the_next_run(
    copied, text, straight
):
    trainer = Trainer(tiny(text), str(copied), say=(lines := []).append)
    sample = trainer.sample

    def stopped():
        trainer.stop.signal = "SIGTERM"
        return sample()

    trainer.sample = stopped
    trainer.run()
    assert lines[-1].startswith("stopped by SIGTERM at step 12")
    assert not any("fingerprint" in line for line in lines)
    assert_same_end(copied, run(copied, tiny(text)), straight, tiny(text))


def test_a_finished_run_says_so_and_changes_nothing(copied, text, straight):
    before = contents(copied)
    lines = run(copied, tiny(text))
    assert "finished at step 12" in lines
    assert print_of(lines) == print_of(straight[1])
    assert contents(copied) == before


def test_more_steps_go_on(copied, text):
    before = untimed(copied)
    lines = run(copied, tiny(text, train__steps=15))
    place = lines.index("changed since the last run: train.steps: 12 -> 15")
    assert lines[place + 1].startswith("NOTE: its cosine now ends there")
    assert "resume             from the checkpoint at step 12" in lines
    assert "finished at step 15" in lines
    assert untimed(copied)[: len(before)] == before
    later = [(r["step"], r["split"]) for r in rows(copied)[len(before) :]]
    assert later == [(15, "train"), (15, "validation"), (15, "test")]


def test_fewer_steps_than_were_done_change_no_parameter(copied, text, straight):
    lines = run(copied, tiny(text, train__steps=8))
    assert "finished at step 12, past train.steps=8" in lines
    assert print_of(lines) == print_of(straight[1])


def test_rows_of_steps_that_are_done_again_are_replaced(copied, text, straight):
    shutil.rmtree(copied / "checkpoints" / "12")
    shutil.rmtree(copied / "checkpoints" / "8")
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "spl')  # a kill tore it
    lines = run(copied, tiny(text))
    assert "resume             from the checkpoint at step 4" in lines
    assert_same_end(copied, lines, straight, tiny(text))


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(copied, text, straight):
    newest = copied / "checkpoints" / "12"
    for path in newest.rglob("d/*"):  # not all of which is read, so all of it
        data = bytearray(path.read_bytes())
        for eighth in range(1, 8):
            data[len(data) * eighth // 8] ^= 1
        path.write_bytes(data)
    lines = run(copied, tiny(text))
    (said,) = [line for line in lines if line.startswith("checkpoint 12 is damaged")]
    assert said.endswith("going on from checkpoint 8")
    assert (copied / "damaged" / "12").is_dir()
    assert_same_end(copied, lines, straight, tiny(text))


def test_a_run_without_its_checkpoints_starts_afresh(copied, text, straight):
    shutil.rmtree(copied / "checkpoints")
    lines = run(copied, tiny(text))
    assert "resume             no checkpoint here: starting afresh" in lines
    assert_same_end(copied, lines, straight, tiny(text))


# ---- What may change between runs ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("model.width", 16, 32),
        ("model.layers", 1, 2),
        ("model.context", 64, 32),
        ("model.patterns", "'Strided(stride=8)'", "Local(8)"),
        ("train.batch_size", 2, 4),
        ("seed", 0, 1),
    ],
)
def test_what_would_change_shapes_or_data_is_refused(straight, text, name, was, now):
    before = listing(straight[0])
    with pytest.raises(UserError) as error:
        run(straight[0], tiny(text, **{name: now}))
    said = str(error.value)
    assert f"{name}={was}" in said
    assert str(now).replace("(8)", "(window=8)") in said
    assert listing(straight[0]) == before


def test_other_data_are_refused_and_moved_data_are_not(copied, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[:-1] + b"!")
    before = listing(copied)
    with pytest.raises(UserError) as error:
        run(copied, tiny(other))
    assert str(other) in str(error.value)
    assert str(text) in str(error.value)
    assert "20,000 bytes, fingerprint " in str(error.value)
    assert listing(copied) == before
    moved = shutil.copy(text, tmp_path / "moved.txt")
    lines = run(copied, tiny(moved))
    assert f"changed since the last run: data: {text} -> {moved}, same bytes" in lines
    assert "finished at step 12" in lines


@pytest.mark.slow
def test_what_may_change_is_said(copied, text):
    shutil.rmtree(copied / "checkpoints" / "12")
    changes = {
        "eval.every_steps": (5, 3),
        "eval.weights": ("ema", "raw"),
        "log.every_steps": (3, 1),
        "log.tensorboard": (True, False),
        "checkpoint.every_steps": (4, 5),
        "mesh.data": (1, 2),
    }
    lines = run(copied, tiny(text, **{name: new for name, (_, new) in changes.items()}))
    said = {x for x in lines if x.startswith("changed since the last run: ")}
    assert said == {
        f"changed since the last run: {name}: {old} -> {new}"
        for name, (old, new) in changes.items()
    }
    weights = {r["step"]: r["weights"] for r in rows(copied) if r["split"][0] == "v"}
    assert weights == {0: "ema", 5: "ema", 9: "raw", 12: "raw"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mesh.data": 64, "train.batch_size": 64, "eval.batch_size": 64}, "devices"),
        ({"model.context": 1 << 15, "model.width": 2}, "longer than"),
    ],
)
def test_a_start_that_was_refused_leaves_the_folder_free(
    tmp_path, text, change, sentence
):
    """Also while someone still holds the error, as a notebook does."""
    with pytest.raises(UserError, match=sentence) as held:
        run(tmp_path / "run", tiny(text, **change))
    assert [x.name for x in (tmp_path / "run").iterdir()] in ([], ["lock"])
    Trainer(tiny(text), str(tmp_path / "run"), say=lambda line: None).opened.close()
    assert held


def test_a_start_that_is_interrupted_leaves_the_folder_free(
    tmp_path, text, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparse_flax.train.bigram.baseline", interrupt)
        with pytest.raises(KeyboardInterrupt) as held:
            run(tmp_path / "run", tiny(text))
    Trainer(tiny(text), str(tmp_path / "run"), say=lambda line: None).opened.close()
    assert held


# ---- What is not finite, and a full disk ---------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    ("rate", "every", "sentence"),
    [
        (1e30, {}, "step 2: the loss is nan bits per byte and the gradient norm nan; "),
        (1e30, {"eval.every_steps": 1}, "step 1: the validation score is nan bits per"),
        (
            1e30,
            {"checkpoint.every_steps": 1},
            "step 1: the loss after it is not finite",
        ),
        pytest.param(
            *(1e39, {}, "the first parameter whose value is not finite is "),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(
                1e39,
                {"checkpoint.every_steps": 1},
                "step 1: the loss after it is not finite",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_not_saved(
    tmp_path, text, rate, every, sentence
):
    config = tiny(text, optim__learning_rate=rate, optim__warmup_steps=0, **every)
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", config)
    assert sentence in str(error.value)
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert all(math.isfinite(row["bits_per_byte"]) for row in rows(tmp_path / "run"))


def test_a_loss_that_is_not_finite_names_the_parameter_and_keeps_what_was_saved(
    copied, text
):
    shutil.rmtree(copied / "checkpoints" / "12")
    config = tiny(text)
    trainer = Trainer(config, str(copied), say=lambda line: None)
    up = trainer.state.model.blocks.up_DF
    poisoned = np.array(up[...])
    poisoned[0, 3, 7] = np.nan
    up[...] = jax.device_put(poisoned, up[...].sharding)
    with pytest.raises(UserError) as error:
        trainer.run()
    said = str(error.value)
    assert "step 9: the loss is nan" in said
    assert "value is not finite is blocks.up_DF; nothing was saved after step 8" in said
    step, restored = last_state(copied, config)
    assert step == 8
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored))


@pytest.mark.parametrize("refused", ["config.json", "metrics.jsonl", "loss.png"])
def test_a_full_disk_is_a_sentence(tmp_path, text, monkeypatch, refused):
    real = os.replace

    def replace(source, target):
        if Path(target).name == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match=f"{refused} could not be written: No space"):
        run(tmp_path / "run", tiny(text))
    monkeypatch.undo()
    assert "finished at step 12" in run(tmp_path / "run", tiny(text))


# ---- What is said and written --------------------------------------------------------


def test_the_metrics_are_as_promised(straight, text):
    found = rows(straight[0])
    assert all(list(row) == KEYS for row in found)
    train, validation = (
        {r["step"]: r for r in found if r["split"] == split}
        for split in ("train", "validation")
    )
    assert list(train) == [1, 3, 6, 9, 12]
    assert list(validation) == [0, 5, 10, 12]
    assert found[0] == dict.fromkeys(KEYS) | {
        "step": 0,
        "split": "validation",
        "bits_per_byte": pytest.approx(8.0, abs=1e-5),
        "windows": 12,
        "weights": "ema",
    }
    for row in train.values():
        assert row["weights"] == "raw"
        assert row["tokens_per_s"] > 0
        assert row["grad_norm"] > 0
        assert row["mfu"] is None  # there is no peak of a CPU
    assert train[1]["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)
    assert train[1]["learning_rate"] == pytest.approx(4e-3 / 2)
    assert validation[12]["bits_per_byte"] < 7.5


def test_what_is_said(straight, text):
    workdir, lines = straight
    assert lines[0] == f"working directory  {workdir}"
    starts = ["versions ", "devices ", "peak ", "data ", "parameters ", "patterns "]
    starts += ["tokens a step ", "resume ", "step 0: validation 8.000 bits/byte (ema"]
    places = [next(i for i, x in enumerate(lines) if x.startswith(s)) for s in starts]
    assert places == sorted(places)
    assert f"jax {jax.__version__}" in lines[places[0]]
    assert "128 (2 sequences of 64)" in lines[places[6]]
    for step in (4, 8, 12):
        assert lines.count(f"saved {workdir / 'checkpoints' / str(step)}") == 1
    data = np.frombuffer(text.read_bytes(), np.uint8)
    scored = np.concatenate(evaluation_windows(data[18_000:19_000], 64, 12))
    bigram = bigram_bits_per_byte(data[:18_000], scored)
    assert f"bigram table       {bigram:.3f} bits/byte on the same windows" in lines
    for name in ("checkpoints/12", "metrics.jsonl", "loss.png"):
        assert any(line.endswith(f" {workdir / name}") for line in lines)
    assert lines[-1] == print_of(lines)


def test_the_fingerprint_is_of_the_raw_parameters(straight, text):
    _, restored = last_state(straight[0], tiny(text))
    raw, averaged = fingerprint(restored.model), fingerprint(restored.ema)
    assert print_of(straight[1]) == f"parameters fingerprint: {raw}"
    assert raw != averaged


def test_the_working_directory_holds_what_it_should(straight, text):
    workdir, _ = straight
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "sample.txt",
        "tensorboard",
        "lock",
    }
    saved = json.loads((workdir / "config.json").read_text())["config"]
    assert saved["train"]["steps"] == 12
    assert saved["model"]["feed_forward"] == 64  # 0 was resolved
    assert saved["eval"]["batch_size"] == 2
    sample, validation = (
        (workdir / "sample.txt").read_bytes(),
        text.read_bytes()[18000:],
    )
    assert sample[:20] == validation[:20]
    assert len(sample) == 50


def test_other_evaluations(tmp_path, text):
    """Raw weights, only at the end, no TensorBoard, no sample."""
    config = tiny(
        text,
        eval__every_steps=0,
        eval__weights="raw",
        eval__sample_bytes=0,
        checkpoint__every_steps=0,
        log__tensorboard=False,
    )
    run(tmp_path / "run", config)
    found = [r for r in rows(tmp_path / "run") if r["split"] == "validation"]
    assert [(r["step"], r["weights"]) for r in found] == [(0, "raw"), (12, "raw")]
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "sample.txt").exists()
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["12"]


def test_a_warm_up_longer_than_the_run_is_shortened_aloud(tmp_path, text):
    lines = []
    config = tiny(text, optim__warmup_steps=99)
    Trainer(config, str(tmp_path / "run"), say=lines.append).opened.close()
    (note,) = [line for line in lines if line.startswith("NOTE: ")]
    assert "optim.warmup_steps=99 is longer than train.steps=12" in note
    assert note.endswith("warming up for 1 instead")


def test_a_very_small_file_works(tmp_path):
    small = b"to be or not to be, " * 5
    (tmp_path / "small.txt").write_bytes(small)
    lines = run(tmp_path / "run", tiny(tmp_path / "small.txt", eval__samples=2))
    print_of(lines)
    written = (tmp_path / "run" / "sample.txt").read_bytes().split(sample.BETWEEN)
    assert [part[:5] for part in written] == [small[90:95]] * 2
    assert written[0] != written[1]
