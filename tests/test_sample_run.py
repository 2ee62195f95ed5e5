"""--mode=sample: what is written follows from checkpoint, prompt and seed alone."""

import jax
import numpy as np
import pytest
from test_eval_run import command, copied, text, trained  # noqa: F401, fixtures
from test_train import listing, tiny

from sparse_flax import export_run, exported, train
from sparse_flax.errors import UserError
from sparse_flax.eval_run import EvalRun
from sparse_flax.sample import BETWEEN
from sparse_flax.sample_run import SampleRun
from sparse_flax.trained import load
from sparse_flax.workdir import WorkDir


def sampled(workdir, config, step=None):
    lines = []
    SampleRun(config, str(workdir), say=lines.append).run(step)
    return (workdir / "generated.txt").read_bytes().split(BETWEEN), lines


def options(text, **changes):  # noqa: F811
    named = {f"sample__{name}": value for name, value in changes.items()}
    return tiny(text, **{"sample__count": 20, "sample__prompt": "the "} | named)


def test_the_same_seed_writes_the_same_beside_a_running_job(copied, text):  # noqa: F811
    before = listing(copied)
    job = WorkDir(copied)  # which holds the lock
    three, lines = sampled(copied, options(text, number=3))
    job.close()
    assert [len(x) for x in three] == [24] * 3 and len(set(three)) == 3
    assert all(x.startswith(b"the ") for x in three)
    assert "checkpoint         12 (ema weights)" in lines
    second, _ = sampled(copied, options(text, seed=1))
    assert second == three[1:2]
    assert sampled(copied, options(text), step=4)[0] != three[:1]
    left = {name for name, _ in listing(copied).items() - before.items()}
    assert left == {str(copied / "generated.txt")}


def test_follows_the_model_as_far_as_it_is_told(copied, text, tmp_path):  # noqa: F811
    """Of the likeliest byte alone there is one sample, whatever the seed."""
    first, _ = sampled(copied, options(text, top_k=1, number=2))
    assert first[0] == first[1]
    assert sampled(copied, options(text, top_p=1e-6))[0] == first[:1]
    assert sampled(copied, options(text, temperature=1e-3))[0] == first[:1]
    (tmp_path / "prompt.txt").write_bytes(b"the ")
    file = {"prompt": "", "prompt_file": str(tmp_path / "prompt.txt")}
    assert sampled(copied, options(text, top_k=1, **file))[0] == first[:1]
    # It is what the model itself says.
    ours = EvalRun(tiny(text), str(copied), say=lambda line: None)
    with jax.set_mesh(ours.mesh):
        step, model = ours.checkpoints.newest_whole(*ours._part())
        assert step == 12
        (row,) = model.generate([b"the "], 20, top_k=1)
        assert row.tobytes() == first[0][4:]


def test_a_notebook_gets_the_weights_of_a_run(copied, text, tmp_path):  # noqa: F811
    """Off the mesh: outside of one they work."""
    model, config = load(str(copied), say=(lines := []).append)
    assert lines == [f"checkpoint         12 (ema weights) of {copied}"]
    assert config.train.steps == 12
    written, _ = sampled(copied, options(text, top_k=1))
    (row,) = model.generate([b"the "], 20, top_k=1)
    assert row.tobytes() == written[0][4:]
    # To go on with a run that is finished is to have its weights.
    same = train.run(tiny(text, eval__sample_bytes=0), str(copied), say=lambda x: None)
    earlier, _ = load(str(copied), 4, say=lines.append)
    leaves = [jax.tree.leaves(x) for x in (model, same, earlier)]
    assert all(map(np.array_equal, leaves[0], leaves[1]))
    assert not all(map(np.array_equal, leaves[0], leaves[2]))
    with pytest.raises(UserError, match=r"checkpoint_step=5 is not in .* try 4"):
        load(str(copied), 5)
    with pytest.raises(UserError, match="holds no run"):
        load(str(tmp_path / "none"))


def test_what_cannot_be_is_a_sentence(copied, text):  # noqa: F811
    for changes, sentence in (
        ({"count": 61}, "sample.count=61 bytes after a prompt of 4 .* sample.count=60"),
        ({"prompt": "x" * 64}, "prompt of 64 .* try a prompt of 44 bytes or fewer"),
        ({"prompt_file": "none"}, "two prompts; give one"),
        (
            {"prompt": "", "prompt_file": "none"},
            "none cannot be read .* of a file",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            SampleRun(options(text, **changes), str(copied), say=print)
    with pytest.raises(UserError, match=r"model\.width=32, but the run"):
        SampleRun(tiny(text, model__width=32), str(copied), say=print)


def test_an_exported_model_is_sampled_from_the_command_line(copied, text, tmp_path):  # noqa: F811
    model = tmp_path / "small"
    result = command("--mode=export", f"--workdir={copied}", f"--model={model}")
    assert (result.returncode, result.stderr) == (0, "")
    assert "checkpoint         12 (ema weights)" in result.stdout
    for private in (copied, text):
        assert str(private) not in (model / "config.json").read_text()
    changes = ["--config.sample.prompt=to be", "--config.sample.count=9"]
    out = f"--workdir={tmp_path / 'out'}"
    result = command("--mode=sample", f"--model={model}", out, *changes)
    assert (result.returncode, result.stderr) == (0, "")
    (row,) = exported.load(model).generate([b"to be"], 9)
    assert (tmp_path / "out" / "generated.txt").read_bytes() == b"to be" + row.tobytes()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    error = command("--mode=export", f"--workdir={copied}").stderr
    assert "name it with --model=FOLDER" in error
    with pytest.raises(UserError, match="holds files of something else"):
        export_run.run(tiny("x"), str(copied), str(tmp_path / "else"))


def test_an_export_replaces_its_own_run_s_and_no_other_s(copied, tmp_path, text):  # noqa: F811
    model = tmp_path / "small"
    for steps in (12, 15):
        config = tiny(text, train__steps=steps, eval__max_windows=1)
        export_run.run(config, str(copied), str(model), say=str)
    before = (model / "config.json").read_bytes()
    another = tiny(text, optim__learning_rate=0.5)
    with pytest.raises(UserError, match="of another run, at its step 12; name a new"):
        export_run.run(another, str(copied), str(model), say=str)
    assert (model / "config.json").read_bytes() == before


def test_from_the_command_line_without_a_config(copied):  # noqa: F811
    changes = ["--config.sample.prompt=to be", "--config.sample.count=9"]
    result = command("--mode=sample", f"--workdir={copied}", *changes)
    assert (result.returncode, result.stderr) == (0, "")
    assert len((copied / "generated.txt").read_bytes()) == 14
    assert result.stdout.splitlines()[-1].endswith("generated.txt")
