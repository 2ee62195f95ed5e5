"""What a run writes down: every row once, readable by others."""

import json
import struct
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from test_model import TINY

from sparse_flax import flops, progress
from sparse_flax.data.bigram import Baseline
from sparse_flax.metrics import (
    COLUMNS,
    MetricsLog,
    first_not_finite,
    read_rows,
    train_row,
)
from sparse_flax.workdir import WorkDir

ROW = {"bits_per_byte": 2.5, "weights": "raw", "tokens_per_s": 10.0, "mfu": None}


@pytest.fixture
def workdir(tmp_path):
    return WorkDir(tmp_path)


def log(workdir, step=0, tensorboard=False):
    return MetricsLog(workdir, step=step, tensorboard=tensorboard)


def read_events(folder):
    """Read every event, in the order in which TensorBoard does."""
    events = []
    for path in sorted(folder.iterdir()):
        assert "tfevents" in path.name
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            (crc,) = struct.unpack("<I", data[12 + size : 16 + size])
            assert crc == masked_crc32c(data[12 : 12 + size])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_a_row_has_every_column_in_order(tmp_path, workdir):
    log(workdir).write(step=3, split="train", **ROW)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert tuple(row) == COLUMNS
    assert row == dict.fromkeys(COLUMNS) | {"step": 3, "split": "train"} | ROW


def test_going_on_drops_later_rows_and_a_torn_one(tmp_path, workdir):
    first = log(workdir)
    for step in (0, 1, 2, 3):
        first.write(step=step, split="train", **ROW)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "bits\x00\xff')
    again = log(workdir, step=2)
    assert [row["step"] for row in again.rows] == [0, 1, 2]
    again.write(step=3, split="train", **ROW)
    assert read_rows(tmp_path / "metrics.jsonl") == again.rows
    assert [row["step"] for row in again.rows] == [0, 1, 2, 3]


def test_a_row_is_found_by_split_and_step(workdir):
    metrics = log(workdir)
    metrics.write(step=1, split="train", **ROW)
    assert metrics.find(split="train", step=1) == metrics.rows[0]
    assert metrics.find(split="train", step=2) is None
    assert metrics.find(split="validation", step=1) is None


def test_tensorboard_events_are_on_disk_after_each_row(tmp_path, workdir):
    metrics = log(workdir, tensorboard=True)
    assert not (tmp_path / "tensorboard").exists()
    metrics.write(step=3, split="train", **ROW)
    events = read_events(tmp_path / "tensorboard")
    assert events[0].file_version == "brain.Event:2"
    assert events[-1].step == 3
    assert abs(events[-1].wall_time - time.time()) < 60
    scalars = {v.tag: v.simple_value for v in events[-1].summary.value}
    assert scalars == {"train/bits_per_byte": 2.5, "train/tokens_per_s": 10.0}
    metrics.close()


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path, workdir):
    for first in (0, 2):
        metrics = log(workdir, step=first, tensorboard=True)
        metrics.write(step=first + 1, split="train", **ROW)
        metrics.write(step=first + 2, split="train", **ROW)
        metrics.close()
    starts = [
        event.step
        for event in read_events(tmp_path / "tensorboard")
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [1, 3]


def test_the_curve_is_a_picture(tmp_path, workdir):
    metrics = log(workdir)
    for step in range(5):
        metrics.write(step=step, split="train", **ROW)
    metrics.write(step=4, split="validation", **ROW)
    metrics.plot(tmp_path / "without.png")
    metrics.plot(tmp_path / "with.png", baseline=Baseline(3.7, "bigram table"))
    images = []
    for name in ("without.png", "with.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert image.size == (960, 540)
            images.append(image.convert("RGB"))
    for image in images:
        assert (0xC0, 0x39, 0x2B) in {colour for _, colour in image.getcolors(1 << 20)}
    assert images[0].tobytes() != images[1].tobytes()


class Model(nnx.Module):
    def __init__(self):
        self.a_D = nnx.Param(jnp.zeros(2))
        self.b_D = nnx.Param(jnp.zeros(2))
        self.c_D = nnx.Param(jnp.zeros(2))


def test_the_first_bad_parameter_is_named():
    model, good = Model(), [True, True, True]
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]
    ]
    assert names == ["a_D", "b_D", "c_D"]
    assert "every parameter and gradient is finite" in first_not_finite(model, good)
    said = first_not_finite(model, [True, False, False])
    assert said == "the first parameter whose gradient is not finite is b_D"
    model.c_D[...] = jnp.array([0.0, jnp.inf])
    said = first_not_finite(model, [True, False, False])
    assert said == "the first parameter whose value is not finite is c_D"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.6, "1h00m"),
        (5 * 3600 + 12 * 60 + 59, "5h12m"),
        (86399.9, "1d00h"),
        (2 * 86400 + 3 * 3600, "2d03h"),
    ],
)
def test_durations(seconds, said):
    assert progress.duration(seconds) == said


def test_the_progress_line():
    row = {
        "bits_per_byte": 2.3456,
        "learning_rate": 5e-4,
        "grad_norm": 0.456,
        "tokens_per_s": 123_456.0,
        "mfu": None,
    }
    said = progress.line(1_500, 12_000, row, 200)
    assert said == (
        "step 1,500/12,000 (12.5%) | 2.346 bits/byte | lr 5.00e-04 | grad 0.46 | "
        "123.5k tok/s | eta 3m20s"
    )
    said = progress.line(1, 2, row | {"tokens_per_s": 12.3, "mfu": 0.4567}, 0)
    assert said.endswith("grad 0.46 | 12 tok/s | MFU 45.7% | eta 0s")


def test_the_clock_leaves_pauses_out_of_the_rate_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = progress.Clock()
    clock.start(10)
    now[0] += 4
    with clock.pause():
        now[0] += 6
    clock.tick(12)
    assert clock.rate() == pytest.approx(2 / 4)
    assert clock.left(12, 22) == pytest.approx(10 * 5)
    for step in range(13, 13 + clock.WINDOW):
        now[0] += 1
        clock.tick(step)
    assert clock.rate() == pytest.approx(1)  # the slower start is out of the window
    assert clock.left(20, 20) == 0


def test_mfu_is_of_all_devices_of_the_mesh():
    h200 = types.SimpleNamespace(device_kind="NVIDIA H200")
    mesh = types.SimpleNamespace(devices=np.array([h200] * 4), size=4)
    values = dict.fromkeys(("bits_per_byte", "learning_rate", "grad_norm"), 1.0)
    row = train_row(values | {"skipped": False}, 10.0, TINY, mesh)
    assert row["tokens_per_s"] == 10 * TINY.context
    assert row["mfu"] == pytest.approx(
        10 * flops.train_flops(TINY) / (4 * 989.5e12), 1e-2
    )
