"""Configurations: derived values, sentences for mistakes, and the command line."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_flax import config as config_lib
from sparse_flax import config_checks, dry_run
from sparse_flax.attention import Fixed, Strided
from sparse_flax.config import FIXED, changes, check_preset, defaults, flatten
from sparse_flax.config_checks import finalize
from sparse_flax.errors import UserError

ROOT = Path(__file__).parents[1]
PRESETS = {"enwik8": ["shared", "colab"], "imagenet64": ["302m"]}
PRESETS |= {"books": ["shared", "short", "small"], "text8": ["shared", "colab"]}
PRESETS |= {"cifar10": ["merged", "laptop", "short", "half_hour", "colab"]}
PRESETS |= {"images": ["laptop", "small"]}
PRESETS |= {"music": ["262144", "1048576", "laptop", "short", "small", "colab"]}
ALL = [
    (path.stem, preset)
    for path in sorted((ROOT / "configs").glob("*.py"))
    for preset in ["", *PRESETS.get(path.stem, [])]
]


def get_config(name, preset=""):
    return importlib.import_module(f"configs.{name}").get_config(preset)


def changed(**values):
    """The defaults with options changed: group__name=value."""
    config = defaults()
    for name, value in values.items():
        group, _, option = name.partition("__")
        if option:
            config[group][option] = value
        else:
            config[group] = value
    return config


# ---- What is derived ---------------------------------------------------------------


def test_fills_in_what_was_left_open():
    config = changed(
        model__width=96,
        model__context=1000,
        train__batch_size=6,
        model__patterns="Fixed(128, 32)",
    )
    done, _ = finalize(config)
    assert (done.model.qk_width, done.model.feed_forward) == (96, 384)
    assert tuple(done.model.position_shape) == (8, 128)
    assert done.eval.batch_size == 6
    assert done.is_locked
    assert config.model.qk_width == 0, "the argument was changed"


def test_leaves_alone_what_was_given():
    values = {
        "model__qk_width": 64,
        "model__feed_forward": 100,
        "model__position_shape": (32, 32, 2),
        "eval__batch_size": 2,
    }
    done, _ = finalize(changed(**values))
    for name, value in values.items():
        assert done.get_ref(name.split("__")[0]).get()[name.split("__")[1]] == value


@pytest.mark.parametrize(
    ("patterns", "shape"),
    [
        ("Strided(100)", (21, 100)),
        ("Local(64), Columns(128)", (32, 64)),
        ("PerHead((Columns(50), Local(3)))", (41, 50)),
        ("Dense()", (45, 46)),
        ("Local(5000)", (1, 2048)),
    ],
)
def test_lays_tokens_out_in_rows_of_a_stride(patterns, shape):
    done, _ = finalize(changed(model__patterns=patterns))
    assert tuple(done.model.position_shape) == shape


def test_finalizing_twice_changes_nothing():
    once, _ = finalize(get_config("quickstart"))
    twice, notices = finalize(once)
    assert twice.to_dict() == once.to_dict()
    assert not notices


def test_shortens_a_warm_up_longer_than_the_run_and_says_so():
    done, notices = finalize(changed(optim__warmup_steps=5000, train__steps=1000))
    assert done.optim.warmup_steps == 100
    (notice,) = [n for n in notices if "warmup" in n]
    assert "5,000" in notice and "1,000" in notice and "100 instead" in notice
    done, notices = finalize(changed(optim__warmup_steps=1000, train__steps=1000))
    assert done.optim.warmup_steps == 1000
    assert not notices
    done, _ = finalize(changed(optim__warmup_steps=5, train__steps=3))
    assert done.optim.warmup_steps == 1


def test_shortens_a_sample_that_does_not_fit_and_says_so():
    config = changed(model__context=301, eval__prompt_bytes=256, eval__sample_bytes=46)
    done, notices = finalize(config)
    assert (done.eval.prompt_bytes, done.eval.sample_bytes) == (150, 46)
    assert any("prompt_bytes=256" in n and "context=301" in n for n in notices)
    config.eval.sample_bytes = 45
    done, notices = finalize(config)
    assert (done.eval.prompt_bytes, done.eval.sample_bytes) == (256, 45)
    assert not any("prompt_bytes" in n for n in notices)


def test_describes_the_model():
    config = changed(
        model__patterns="Strided(16), Fixed(8, 4)",
        model__attention="reference",
        model__dropout=0.5,
    )
    model = config_lib.model_config(finalize(config)[0])
    assert model.patterns == (Strided(16), Fixed(8, 4))
    assert (model.implementation, model.dropout) == ("reference", 0.5)
    model = config_lib.model_config(finalize(defaults())[0])
    assert model.implementation is None
    assert hash(model) == hash(config_lib.model_config(finalize(defaults())[0]))


# ---- Mistakes ----------------------------------------------------------------------


def refused(config):
    with pytest.raises(UserError) as error:
        finalize(config)
    assert "\n" not in str(error.value)
    return str(error.value)


NUMBERS = [
    ("model.context", 0),
    ("model.layers", -1),
    ("model.heads", 0),
    ("train.steps", 0),
    ("train.batch_size", -8),
    ("checkpoint.keep", 0),
    ("log.every_steps", 0),
    ("mesh.data", 0),
    ("mesh.fsdp", -1),
    ("mesh.tensor", 0),
    ("mesh.context", 0),
    ("seed", -1),
    ("model.qk_width", -1),
    ("model.feed_forward", -1),
    ("optim.warmup_steps", -1),
    ("optim.weight_decay", -0.1),
    ("optim.weight_decay", float("nan")),
    ("optim.weight_decay", float("inf")),
    ("eval.every_steps", -1),
    ("eval.batch_size", -1),
    ("eval.max_windows", -1),
    ("eval.min_context", -1),
    ("eval.min_context", 2048),
    ("eval.prompt_bytes", -1),
    ("eval.sample_bytes", -1),
    ("checkpoint.every_steps", -1),
    ("sample.count", 0),
    ("sample.number", 0),
    ("sample.top_k", -1),
    ("sample.top_k", 257),
    ("data.size", 64),
    ("data.rate", 24_000),
    ("sample.seed", -1),
    ("sample.temperature", 0.0),
    ("sample.top_p", 0.0),
    ("sample.top_p", 1.5),
    ("optim.learning_rate", 0.0),
    ("optim.learning_rate", float("nan")),
    ("optim.epsilon", 0.0),
    ("optim.clip_norm", float("inf")),
    ("model.dropout", 1.0),
    ("model.dropout", -0.1),
    ("model.dropout", float("nan")),
    ("optim.beta1", 1.0),
    ("optim.beta2", -1.0),
    ("optim.ema_decay", 1.5),
]
FITS = [
    ("model.width", 0, {"model.heads": 1}),
    ("model.width", 500, {"model.heads": 8}),
    ("model.width", 3, {"model.heads": 8}),
    ("model.qk_width", 30, {}),
    ("model.layers", 7, {"model.patterns": "Local(4), Columns(4)"}),
    ("model.layers", 1, {"model.patterns": "Local(4), Columns(4)"}),
    ("model.position_shape", (10, 10), {}),
    ("model.position_shape", (-64, -64), {}),
    ("model.position_shape", (0, 4096), {}),
    ("model.position_shape", (64.0, 32.0), {}),
    ("model.position_shape", ("a", "b"), {}),
    ("train.batch_size", 9, {"mesh.data": 2, "mesh.fsdp": 2}),
    ("eval.batch_size", 2, {"mesh.data": 2, "mesh.fsdp": 2}),
    ("train.accumulate", 3, {"train.batch_size": 8}),
    ("train.accumulate", 4, {"train.batch_size": 8, "mesh.data": 4}),
    ("model.width", 12, {"mesh.fsdp": 8, "model.heads": 6}),
    ("model.heads", 3, {"mesh.tensor": 2, "model.width": 12}),
    ("model.feed_forward", 101, {"mesh.tensor": 4}),
    ("model.context", 1001, {"mesh.context": 4}),
    ("mesh.tensor", 4, {"model.patterns": "Fixed(8, 4, rotate=True)"}),
    (
        "mesh.tensor",
        2,
        {
            "model.patterns": "PerHead((Local(4), Local(5), Local(6)))",
            "model.heads": 8,
        },
    ),
]


def test_every_number_has_a_rule():
    """And the lists of rules none that no option has."""
    lists = ("AT_LEAST_1", "AT_LEAST_0", "ABOVE_0", "FRACTIONS")
    ruled = [name for one in lists for name in getattr(config_checks, one)]
    numbers = {
        name
        for name, value in flatten(defaults().to_dict()).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert len(set(ruled)) == len(ruled) and set(ruled) == numbers


DEFAULTS = flatten(defaults().to_dict())
for too_low, names in (
    (0, config_checks.AT_LEAST_1 + config_checks.ABOVE_0),
    (-1, config_checks.AT_LEAST_0),
):
    NUMBERS += [
        (name, type(DEFAULTS[name])(too_low))
        for name in names
        if name != "model.width"  # in FITS, as heads have to divide it
    ]
NUMBERS = list(dict.fromkeys(NUMBERS))


@pytest.mark.parametrize(
    ("name", "value", "others"), [(*case, {}) for case in NUMBERS] + FITS
)
def test_a_number_that_breaks_a_rule_gets_a_sentence_whose_advice_helps(
    name, value, others
):
    values = others | {"model.patterns": others.get("model.patterns", "Dense()")}
    values = {key.replace(".", "__"): x for key, x in values.items()}
    key = name.replace(".", "__")
    sentence = refused(changed(**values, **{key: value}))
    assert sentence.startswith(f"{name}={value} ")
    advice = re.search(r"; try (?:mesh\.tensor=)?(\S+)(?: or (\S+))?", sentence)
    assert advice, sentence
    for valid in filter(None, advice.groups()):
        finalize(changed(**values, **{key: ast.literal_eval(valid)}))


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("init", "codex", ["code", "paper"]),
        ("dtype", "float8", ["bfloat16", "float16", "float32"]),
        ("remat", "some", ["none", "full", "attention", "attention+mlp", "products"]),
        ("attention", "fast", ["", "gathered", "reference"]),
    ],
)
def test_a_choice_that_does_not_exist_gets_a_list_of_those_that_do(
    name, value, choices
):
    sentence = refused(changed(**{f"model__{name}": value}))
    assert sentence.startswith(f"model.{name}={value!r} ")
    for choice in choices:
        assert repr(choice) in sentence
        finalize(changed(**{f"model__{name}": choice}))
    assert "'ema', 'raw'" in refused(changed(eval__weights="best"))
    assert "'test', 'validation'" in refused(changed(eval__split="train"))


def test_blocks_that_would_cross_devices_get_a_sentence():
    sentence = refused(changed(model__patterns="Strided(768)", mesh__context=2))
    assert "strides of 768 would cross devices; try 512, or mesh.context=1" in sentence
    finalize(changed(model__patterns="Strided(512)", mesh__context=2))


@pytest.mark.parametrize(
    ("patterns", "hint"),
    [
        ("Strided(0)", "stride=0 must be .* try 1"),
        ("Fixd(8, 2)", "did you mean 'Fixed'"),
        ("Fixed(8, 3, rotate=True)", "summary=3 .* try 2"),
        ("Local(", "not readable"),
        ("", "not readable"),
    ],
)
def test_a_pattern_that_does_not_exist_gets_a_sentence(patterns, hint):
    sentence = refused(changed(model__patterns=patterns))
    assert re.match(f"model.patterns: .*{hint}", sentence)


# ---- Another run in the same place -------------------------------------------------


def saved(config):
    return json.loads(json.dumps(config.to_dict()))


def test_defaults_survive_json():
    assert flatten(saved(defaults())) == flatten(defaults().to_dict())
    done, _ = finalize(defaults())
    assert changes(saved(done), done) == []


def test_options_that_may_not_change_exist():
    assert set(FIXED) < set(flatten(defaults().to_dict()))


def test_a_run_older_than_an_option_had_its_default():
    new, _ = finalize(defaults())
    old = saved(new)
    del old["model"]["embedding_std"]
    assert changes(old, new) == []
    new, _ = finalize(changed(model__embedding_std=0.1))
    with pytest.raises(UserError, match=r"embedding_std=0\.1, but .*; use 0\.0"):
        changes(old, new)


@pytest.mark.parametrize("name", FIXED)
def test_refuses_to_go_on_with_another_model_or_data_order(name):
    new, _ = finalize(defaults())
    old = saved(new)
    group, _, option = name.rpartition(".")
    holder = old[group] if group else old
    holder[option] = was = ["another"]
    with pytest.raises(UserError) as error:
        changes(old, new)
    now = flatten(new.to_dict())[name]
    assert str(error.value).startswith(f"{name}={now!r}, ")
    assert f"{name}={was!r}" in str(error.value)
    assert f"use {was!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_reports_other_changes():
    old = saved(finalize(defaults())[0])
    new = defaults()
    new.train.steps, new.model.dropout, new.data.path = 2000, 0.1, "elsewhere"
    new.optim.warmup_steps = 100
    del old["log"]["tensorboard"]
    assert changes(old, finalize(new)[0]) == [
        "log.tensorboard: unset -> True",
        "model.dropout: 0.0 -> 0.1",
        "train.steps: 1000 -> 2000",
    ]


# ---- The files ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_every_config_is_valid(name, preset):
    done, notices = finalize(get_config(name, preset))
    assert flatten(done.to_dict()).keys() == flatten(defaults().to_dict()).keys()
    assert not notices


def test_presets_differ():
    for name, presets in PRESETS.items():
        for preset in presets:
            assert get_config(name).model != get_config(name, preset).model
    assert "rotate" in get_config("enwik8").model.patterns


@pytest.mark.parametrize("name", sorted({name for name, _ in ALL}))
def test_a_preset_that_does_not_exist_gets_those_that_do(name):
    with pytest.raises(UserError, match="preset 'nope' does not exist") as error:
        get_config(name, "nope")
    there = ", ".join(map(repr, PRESETS.get(name, []))) or "none"
    assert str(error.value).endswith(f": {there}")


def test_a_preset_of_several():
    assert check_preset("b", "a", "b") == "b"
    assert check_preset("", "a", "b") == ""
    with pytest.raises(UserError, match="'a', 'b'"):
        check_preset("c", "a", "b")


# ---- Sizes and costs ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset", "parameters"),
    [
        ("enwik8", "shared", "94,949,888"),
        ("cifar10", "", "59,196,928"),
        ("imagenet64", "302m", "302,959,616"),
        ("quickstart", "", None),
    ],
)
def test_a_dry_run_says_what_a_model_has_and_costs(name, preset, parameters):
    lines = []
    dry_run.show_costs(finalize(get_config(name, preset))[0], say=lines.append)
    sizes = [line.split() for line in lines if " x " in line or "_D" in line]
    total = sum(int(size[-1].replace(",", "")) for size in sizes)
    assert f"parameters: {total:,}" in lines
    assert parameters in (None, f"{total:,}")
    config = get_config(name, preset)
    tokens = config.model.context * config.train.batch_size
    assert f"tokens a step: {tokens:,}" in lines
    assert any("keys/query" in line for line in lines)
    flops = float(next(x for x in lines if "FLOPs a step" in x).split()[3])
    # Six a parameter and token, and attention on top, but none for the tables.
    assert 0.9 < flops / (6 * tokens * total) < 5


def test_a_dry_run_tells_what_was_changed():
    lines = []
    small = {"model__layers": 1, "model__width": 8, "model__context": 512}
    dry_run.run(changed(optim__warmup_steps=5000, **small), say=lines.append)
    assert lines[0].startswith("NOTE: optim.warmup_steps=5,000")


def test_a_pattern_that_is_dense_is_told():
    patterns = "Dense(), Local(100), PerHead((Local(99), Dense())), Strided(400)"
    config = changed(model__patterns=patterns, model__context=100, model__layers=4)
    _, notices = finalize(config)
    said = [notice for notice in notices if "sees all of" in notice]
    assert said == [
        f"{pattern} sees all of model.context=100, as Dense() does"
        for pattern in ("Local(window=100)", "Strided(stride=400)")
    ]


@pytest.mark.parametrize("name", ["seed", "sample.seed"])
def test_seeds_fit_a_key(name):
    with pytest.raises(UserError, match=f"^{name}=4294967296 must be below"):
        finalize(changed(**{name.replace(".", "__"): 2**32}))


# ---- The command line --------------------------------------------------------------

COMMANDS = {
    "--config=configs/quickstart.py --mode=dry_run --config.model.layers=1": "276,480",
    "--config=configs/quickstart.py --config.model.widht=1": 'did you mean "width"',
    "--config=configs/enwik8.py --config.train.steps=1e3": "whole number; try 1000",
    "--config=configs/enwik8.py --config.model.dropout=no": "dropout=no must be a",
    "--config=configs/quickstart.py --nope=1": "'nope'",
    "--config=configs/nope.py --mode=dry_run": "configs/nope.py",
    "--config=configs/enwik8.py:nope": "this config has: 'shared'",
    "--config=configs/quickstart.py stray": "'stray' is not a flag",
    "--config=configs/quickstart.py --config.seed=x": "seed=x must be a whole number",
    "--mode=dry_run": "--config is missing",
}


@pytest.fixture(scope="module")
def answers():
    """Run every command, two at a time."""
    commands, results = list(COMMANDS), {}
    for pair in zip(commands[::2], commands[1::2], strict=True):
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "sparse_flax.main", *command.split()],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in pair
        ]
        for command, process in zip(pair, processes, strict=True):
            out, err = process.communicate(timeout=60)
            results[command] = process.returncode, out, err
    return results


@pytest.mark.parametrize("command", list(COMMANDS)[1:])
def test_a_mistake_on_the_command_line_gets_one_sentence(answers, command):
    status, out, err = answers[command]
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert COMMANDS[command] in err
    assert "\\n" not in err and "Traceback" not in err


def test_a_dry_run_from_the_command_line(answers):
    status, out, err = answers[next(iter(COMMANDS))]
    assert status == 0, err
    assert "parameters: 276,480\n" in out and "no accelerator here" in out
