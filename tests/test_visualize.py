"""Masks, learned attention and curves: what is drawn is what the arrays say."""

import base64
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import wave

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from matplotlib.colors import to_rgb
from matplotlib.patches import PathPatch
from PIL import Image

from sparse_flax import config as config_lib
from sparse_flax import exported, visualize
from sparse_flax.attention import (
    Columns,
    Dense,
    Fixed,
    Local,
    PerHead,
    Strided,
    sparse_attention,
)
from sparse_flax.config_checks import finalize
from sparse_flax.decoder import layer_by_layer
from sparse_flax.errors import UserError
from sparse_flax.generate import inputs
from sparse_flax.model import ModelConfig
from sparse_flax.visualize import over
from sparse_flax.visualize.__main__ import entry_point, main

CONFIG = ModelConfig(
    context=48,
    layers=2,
    width=16,
    heads=4,
    qk_width=8,
    feed_forward=24,
    patterns=(Local(1),),
    position_shape=(6, 8),
    dtype="float32",
)
TEXT = b"who sees\nwhom, and what it saw before that\n...."
IMAGE = np.random.default_rng(1).integers(0, 256, (4, 4, 3)).astype(np.uint8)


def model_of(*patterns, **changes):
    return noisy_model(dataclasses.replace(CONFIG, patterns=patterns, **changes))


def sentence(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".")
    for part in parts:
        assert part in text


# --- attention


@pytest.mark.parametrize(
    "patterns",
    [
        (Fixed(8, 2, rotate=True),),
        (Columns(6), PerHead((Local(5), Strided(4)))),
    ],
    ids=str,
)
def test_rows_are_the_attention_of_the_model(patterns):
    """With values of 0 and 1, what attention gives are its weights."""
    model = model_of(*patterns)
    position = 43
    rows = visualize.attention_rows(model, TEXT, position)
    inputs_BT = inputs(np.frombuffer(TEXT + b"?", np.uint8)[None].astype(np.int32))
    T, expected = inputs_BT.shape[1], []
    for pattern, (q, k, _) in layer_by_layer(model, inputs_BT):
        eye = jnp.broadcast_to(jnp.eye(T)[None, :, None], (1, T, 4, T))
        out = sparse_attention(q, k, eye, pattern, implementation="reference")
        expected += list(np.asarray(out)[0, position])
    assert [(row.layer, row.head) for row in rows] == [
        (layer, head) for layer in range(2) for head in range(4)
    ]
    for row, weights_T in zip(rows, expected, strict=True):
        pattern = patterns[row.layer % len(patterns)]
        assert list(row.keys_S) == list(np.nonzero(pattern.mask(T, row.head)[-5])[0])
        np.testing.assert_allclose(row.weights_S, weights_T[row.keys_S], atol=1e-6)
    # Some of them; and nothing from the position on matters.
    (one,) = visualize.attention_rows(
        model, TEXT[:position] + b"????", position, layers=[1], heads=[2]
    )
    np.testing.assert_allclose(one.weights_S, rows[6].weights_S, atol=1e-6)


def test_bfloat16_and_the_byte_after_the_last():
    model = model_of(Dense(), dtype="bfloat16")
    for given, last in ((TEXT[:9], 9), (TEXT.ljust(48), 47)):
        row, *_ = visualize.attention_rows(model, given)
        assert list(row.keys_S) == list(range(last + 1))
        assert row.weights_S.sum() == pytest.approx(1)


def test_white_is_the_pixel_that_is_looked_at():
    """Local(1) sees only the byte before the one that is predicted."""
    figure = visualize.attention(model_of(Local(1)), IMAGE, (2, 0), layers=[1])
    assert len(figure.axes) == 4
    assert figure.axes[3].get_title() == "layer 1, head 3\nmost 100.0%"
    shown = np.asarray(figure.axes[0].images[0].get_array())
    expected = IMAGE / 255 * over.DIM
    expected[1, 3] = 1  # the last pixel of row 1
    expected[2, 1:] = IMAGE[2, 1:] / 255 * over.UNSEEN
    expected[3] = IMAGE[3] / 255 * over.UNSEEN
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert figure.axes[0].patches[0].get_xy() == (-0.5, 1.5)
    start = visualize.attention(model_of(Local(1)), IMAGE, 0).axes[0]
    assert "most 0.0%, start 100.0%" in start.get_title()


def shaded(axes):
    """The (column, line) and opacity of each shaded cell, and of the frame."""
    width, height = over.OverText.CELL
    cells, frame = {}, None
    for patch in axes.patches:
        if isinstance(patch, PathPatch):
            continue
        at = round(patch.get_x() / width), round(patch.get_y() / height)
        if patch.get_fill():
            assert patch.get_facecolor()[:3] == pytest.approx(to_rgb(over.SHADE))
            cells[at] = patch.get_facecolor()[3]
        else:
            frame = at
    return cells, frame


def test_shaded_are_the_bytes_that_are_looked_at():
    model = model_of(Strided(4))
    axes = visualize.attention(model, TEXT, 14, layers=[0], heads=[1]).axes[0]
    (row,) = visualize.attention_rows(model, TEXT, 14, layers=[0], heads=[1])
    assert list(row.keys_S) == [2, 6, 10, 11, 12, 13, 14]
    # TEXT has nine bytes in its first line; the second begins with byte 9.
    places = [(1, 0), (5, 0), (0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]
    cells, frame = shaded(axes)
    opacity = np.sqrt(row.weights_S / row.weights_S.max())
    expected = dict(zip(places, opacity, strict=True))
    assert cells == pytest.approx({k: v for k, v in expected.items() if v > 0.02})
    assert frame == (5, 1)
    # Fewer bytes begin elsewhere, and the rest is told.
    axes = visualize.attention(model, TEXT, 14, layers=[0], heads=[1], shown=5).axes[0]
    cells, frame = shaded(axes)
    assert frame == (5, 0) and set(cells) <= {(n, 0) for n in range(5)}
    assert f"earlier {row.weights_S[:2].sum():.1%}" in axes.get_title()


def test_white_is_the_moment_that_is_listened_to():
    levels = np.full(48, 128, np.uint8)
    figure = visualize.attention(model_of(Local(1)), levels, 24, kind="audio", rate=24)
    axes = figure.axes[0]
    veil = np.asarray(axes.images[1].get_array())[0]
    assert veil.shape == (48, 4)
    assert list(np.nonzero(veil[:, :3].sum(-1))[0]) == [23]
    assert (veil[25:, 3] > 0.8).all() and (veil[:23, 3] < 0.5).all()
    assert axes.lines[0].get_xdata() == pytest.approx([1, 1])  # second


def test_spreads_over_many_layers():
    model = model_of(Local(3), layers=20)
    figure = visualize.attention(model, TEXT, heads=[0])
    named = [int(re.search(r"\d+", a.get_title())[0]) for a in figure.axes]
    assert named == [0, 3, 5, 8, 11, 14, 16, 19]


def test_what_attention_cannot_show_is_a_sentence():
    model = model_of(Local(1))
    draw = visualize.attention
    for call, parts in (
        (lambda: draw(model, TEXT, 99), ["position 99 is outside of the 47", "try 47"]),
        (lambda: draw(model, TEXT, -1), ["position -1", "try 0"]),
        (lambda: draw(model, TEXT, layers=[2]), ["layer 2", "2 layers", "try 1"]),
        (lambda: draw(model, TEXT, heads=[9]), ["head 9", "4 heads", "try 3"]),
        (lambda: draw(model, TEXT * 2), ["94 bytes", "context of 48"]),
        (lambda: draw(model, IMAGE, (4, 0)), ["(4, 0)", "4 x 4", "up to 3"]),
        (lambda: draw(model, IMAGE[:3]), ["36 bytes are no square image"]),
        (lambda: draw(model, TEXT, (1, 2)), ["is for images"]),
        (lambda: draw(model, TEXT, kind="film"), ["kind='film'", "'audio'"]),
        (lambda: draw(model, IMAGE / 255), ["content of float64", "is not bytes"]),
    ):
        sentence(call, *parts)


# --- masks


def states(axes):
    return np.asarray(axes.images[0].get_array())


def test_masks_and_what_two_layers_reach():
    cycle = (Columns(4), PerHead((Local(2), Fixed(4, 1))))
    figure = visualize.masks(cycle, 12, heads=4)
    grid = np.array(figure.axes).reshape(2, 3)
    titles = [[axes.get_title().split("\n")[0] for axes in row] for row in grid]
    assert titles == [
        ["all heads", "", "in two layers"],
        ["head 0, 2", "head 1, 3", "in two layers"],
    ]
    assert "2.0 keys a query, 31% of dense" in grid[0, 0].get_title()
    seen = [cycle[0].mask(12), cycle[1].mask(12, 0), cycle[1].mask(12, 1)]
    shown = [grid[0, 0], grid[1, 0], grid[1, 1]]
    for axes, mask in zip(shown, seen, strict=True):
        np.testing.assert_array_equal(states(axes) == 3, mask)
        np.testing.assert_array_equal(states(axes) == 0, np.triu(np.ones((12, 12)), 1))
    layers = [seen[0], seen[1] | seen[2]]
    for n, axes in enumerate(grid[:, 2]):
        reached = np.zeros((12, 12), bool)
        for i, j in zip(*np.nonzero(layers[n]), strict=True):
            reached[i] |= layers[1 - n][j]  # what the layer before has brought to j
        np.testing.assert_array_equal(states(axes) >= 2, reached)
        np.testing.assert_array_equal(states(axes) == 3, layers[n])
        assert f"{reached.sum() / 78:.0%} of the past" in axes.get_title()


def test_masks_from_text_and_their_size():
    figure = visualize.masks("Fixed(64, 8)", two_steps=False)
    assert len(figure.axes) == 1 and states(figure.axes[0]).shape == (256, 256)
    assert "Fixed(64, 8)\n" in figure.axes[0].get_ylabel()
    sentence(lambda: visualize.masks("Fixd(64, 8)"), "did you mean 'Fixed'")
    sentence(lambda: visualize.masks(["Local(3)"]), "'Local(3)' is no pattern")
    sentence(lambda: visualize.masks(()), "no pattern")
    sentence(lambda: visualize.masks(Dense(), 2000), "tokens=2000", "try 1024")
    sentence(lambda: visualize.masks(Dense(), 0), "tokens=0", "try 2")
    sentence(lambda: visualize.masks(Dense(), heads=0), "heads=0", "try 1")


# --- curves


def write_run(folder, kind, bits):
    folder.mkdir()
    record = {"format": "sparse_flax run", "data": {}, "config": {}}
    record["config"]["data"] = {"kind": kind}
    (folder / "config.json").write_text(json.dumps(record))
    rows = [
        {"step": step, "split": split, "bits_per_byte": bits / (step + 1)}
        for step in (0, 10, 20)
        for split in ("train", "validation")
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"torn')
    return folder


def test_curves_of_one_run_and_many(tmp_path):
    one = write_run(tmp_path / "one", "text", 8)
    two = write_run(tmp_path / "two", "audio", 4)
    axes = visualize.curves([one, two / "metrics.jsonl"], first=10).axes[0]
    assert axes.get_ylabel() == "bits per byte"
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["one train", "one validation", "two train", "two validation"]
    for line, bits in zip(axes.lines, (8, 8, 4, 4), strict=True):
        np.testing.assert_allclose(line.get_xdata(), [10, 20])
        np.testing.assert_allclose(line.get_ydata(), [bits / 11, bits / 21])
    assert len({line.get_color() for line in axes.lines}) == 4
    named = visualize.curves({"mine": str(one)}).axes[0].lines
    assert named[1].get_label() == "mine validation" and len(named[1].get_xdata()) == 3
    pictures = write_run(tmp_path / "pictures", "image", 8)
    draw = visualize.curves
    sentence(lambda: draw([one, pictures]), "one is in bits per byte", "per dim")
    sentence(lambda: draw(tmp_path), "holds no metrics.jsonl")
    sentence(lambda: draw(one, first=30), "no rows from step 30 on; try 10")
    sentence(lambda: draw([]), "no run is given")


# --- the command line


@pytest.fixture(scope="module", params=["text", "image", "audio"])
def exported_model(request, tmp_path_factory):
    """A kind of data, a folder with some, and that of a model of it."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    config = config_lib.defaults()
    config.data.name = {"text": "bytes", "image": "images", "audio": "audio"}[kind]
    config.data.folder = str(root / "cache")
    config.model.update(context=48, layers=1, width=16, heads=2, dtype="float32")
    config.model.patterns = "Local(8)"
    (root / "data").mkdir()
    if kind == "text":
        (root / "data" / "a.txt").write_bytes(TEXT * 100)
    if kind == "image":
        config.data.size = 4
        for n in range(40):
            Image.fromarray(np.roll(IMAGE, n)).save(root / "data" / f"{n}.png")
    if kind == "audio":
        config.data.rate = 1000
        with wave.open(str(root / "data" / "a.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            samples = 9000 * np.sin(np.arange(80_000) / 9)
            file.writeframes(samples.astype("<i2").tobytes())
    config, _ = finalize(config)
    model = noisy_model(config_lib.model_config(config))
    exported.save(root / "model", model, config, {"step": 7})
    return kind, root


def test_the_command_looks_at_what_is_given(exported_model, tmp_path, capsys):
    kind, root = exported_model
    given = sorted((root / "data").iterdir())[0]
    position = {"text": "5", "image": "1,2", "audio": "0.01s"}[kind]
    model, output = f"--model={root / 'model'}", tmp_path / "a.png"
    options = [f"--position={position}", "--heads=1", f"--output={output}"]
    main(["attention", model, f"--file={given}", *options])
    said = capsys.readouterr().out
    assert "(step 7)" in said and f"looking at         {given}" in said
    with Image.open(output) as image:
        assert image.format == "PNG" and min(image.size) > 50
    # A held-out piece, as a page that stands alone.
    page = tmp_path / "a.html"
    held_out = [f"--data={root / 'data'}", "--piece=2", f"--output={page}"]
    main(["attention", model, *held_out])
    assert "piece 2 of " in capsys.readouterr().out
    text = page.read_text()
    assert "http" not in text and "piece 2 of " in text
    content = base64.b64decode(re.search('base64,([^"]+)', text)[1])
    assert Image.open(io.BytesIO(content)).format == "PNG"

    def look(*arguments):
        return lambda: main(["attention", model, *arguments])

    sentence(look("--file=nothing"), "--file=nothing cannot be read")
    sentence(look(f"--file={given}", "--position=x"), "--position=x is not readable")
    sentence(look(f"--file={given}", "--layers=1"), "layer 1 is outside", "try 0")
    sentence(look(f"--file={given}", "--heads=a"), "--heads=a is not readable")
    sentence(look(f"--data={root / 'data'}", "--piece=0"), "--piece=0", "try 1")
    sentence(look(f"--file={given}", "--shown=0"), "shown=0 must", "try 1024")
    sentence(look(f"--data={root / 'data'}", "--piece=9999"), "--piece=9999", "try --p")
    if kind != "text":
        sentence(look("--text=a"), "--text is for models of text")
    else:
        sentence(look("--text=a", f"--file={given}"), "two texts")
        sentence(look(), "--data=")
        main(["attention", model, "--text=abc", "--checkpoint_step=7", *options[2:]])
        sentence(look("--checkpoint_step=8"), "step 8", "which holds step 7")


def test_the_command_line_in_sentences(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", "text", 8)
    main(["curves", "run"])
    assert (tmp_path / "curves.png").exists()
    sentence(lambda: main([]), "required: COMMAND")
    sentence(lambda: main(["paint"]), "invalid choice: 'paint'")
    sentence(lambda: main(["masks", "Dense()", "--tokens=x"]), "--tokens", "'x'")
    sentence(lambda: main(["masks", "Dense()", "--output=a.gif"]), "try a.png")
    sentence(lambda: main(["masks", "Dense()", "--output=no/a.png"]), "make no first")
    sentence(lambda: main(["attention"]), "name a run's --workdir")
    sentence(lambda: main(["attention", "--workdir=no"]), "no holds no run")
    monkeypatch.setattr(sys, "argv", ["visualize", "masks", "Strided(x)"])
    with pytest.raises(SystemExit, match="2"):
        entry_point()
    said = capsys.readouterr().err
    assert said.startswith("error: pattern") and said.count("\n") == 1


def test_without_a_screen(tmp_path):
    """No pyplot, whatever the environment says about screens."""
    command = [sys.executable, "-m", "sparse_flax.visualize", "masks", "Strided(4)"]
    env = {**os.environ, "MPLBACKEND": "TkAgg"} | {"DISPLAY": ""}
    run = {"env": env, "cwd": tmp_path, "capture_output": True, "text": True}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(command, **run)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "masks.png").exists()
