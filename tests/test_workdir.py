"""A working directory is ours, agreed with, and never half written."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from sparse_flax.config import defaults
from sparse_flax.data.bytes import Splits
from sparse_flax.errors import UserError
from sparse_flax.workdir import WorkDir, write_atomically


def splits(content=b"a", source="here"):
    parts = [np.frombuffer(content * n, np.uint8) for n in (90, 5, 5)]
    return Splits("bytes", source, *parts, fingerprint=content.hex() * 32)


def config(**changes):
    changed = ConfigDict(defaults().to_dict())
    changed.update_from_flattened_dict(changes)
    return changed


def begun(path, **changes):
    """Return a folder in which a run has begun."""
    workdir = WorkDir(path)
    workdir.save_config(config(**changes), splits())
    workdir.close()
    return path


def listing(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    workdir = WorkDir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert workdir.agree(config(), splits()) == []
    workdir.save_config(config(seed=7), splits())
    record = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert record["format"] == "sparse_flax run"
    assert record["config"]["seed"] == 7
    assert record["data"] == {"source": "here", "fingerprint": "61" * 32, "bytes": 100}


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert WorkDir("~/run").path == tmp_path / "run"


def test_agreeing_writes_nothing(tmp_path):
    before = listing(begun(tmp_path))
    assert WorkDir(tmp_path).agree(config(**{"train.steps": 5}), splits()) == [
        "train.steps: 1000 -> 5"
    ]
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model.width": 256}, ["model.width=256", "model.width=128"]),
        ({"seed": 3}, ["seed=3", "seed=0"]),
        ({"train.batch_size": 4}, ["train.batch_size=4", "train.batch_size=8"]),
    ],
)
def test_what_may_not_change_is_named_with_both_values(tmp_path, change, names):
    begun(tmp_path)
    with pytest.raises(UserError) as error:
        WorkDir(tmp_path).agree(config(**change), splits())
    assert all(name in str(error.value) for name in names)


def test_data_are_known_by_their_content(tmp_path):
    begun(tmp_path)
    workdir = WorkDir(tmp_path)
    assert workdir.agree(config(), splits(source="there")) == [
        "data: here -> there, same bytes"
    ]
    with pytest.raises(UserError, match="100 bytes, fingerprint 626262") as error:
        workdir.agree(config(), splits(b"b", "there"))
    assert "has read here (100 bytes, fingerprint 616161" in str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "text"},
        {"checkpoints/1": "?", "metrics.jsonl": ""},
        {"config.json": "{}"},
        {"config.json": "[1]"},
        {"config.json": '{"format": "another", "data": {}, "config": {}}'},
        {"config.json": '{"format": "sparse_flax run"}'},
        {"config.json": '{"format": "sparse_fl'},
        {"config.json": b"\xff\xfe"},
    ],
)
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"config\.json.*; .* an empty or a new"):
        WorkDir(tmp_path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("left", [["lock"], ["config.json.new"], []])
def test_what_a_start_that_was_killed_leaves_is_not_foreign(tmp_path, left):
    for name in left:
        (tmp_path / name).write_bytes(b"")
    assert WorkDir(tmp_path).agree(config(), splits()) == []


def test_a_path_that_cannot_be_a_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/dev/null/run")):
        with pytest.raises(UserError, match="cannot be written to"):
            WorkDir(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_one_process_at_a_time(tmp_path):
    begun(tmp_path)
    first = WorkDir(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(UserError, match="is in use by another process"):
        WorkDir(tmp_path)
    assert listing(tmp_path) == before
    first.close()
    WorkDir(tmp_path).close()


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_refused_write_leaves_the_old_file(tmp_path, monkeypatch, fails):
    write_atomically(tmp_path / "x", b"old")

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, refuse)
    with pytest.raises(UserError, match="x could not be written: No space left on"):
        write_atomically(tmp_path / "x", b"new")
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"old"
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]
