"""Sets of tensorflow-datasets, really written and read, without TensorFlow."""

import functools
import hashlib
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparse_flax.config import defaults
from sparse_flax.data import archives, builders, bytes, prepare, prepared
from sparse_flax.errors import UserError
from sparse_flax.train import Trainer
from sparse_flax.workdir import WorkDir

ROOT = Path(__file__).parents[1]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sentence(call, *needed):
    """Check that a call ends in one sentence that holds all that is needed."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".")
    for part in needed:
        assert str(part) in text
    return text


def assert_same(one, other):
    for piece in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(one, piece), getattr(other, piece))
    assert one.fingerprint == other.fingerprint


@pytest.fixture
def text(tmp_path):
    """A file of 5,003 bytes."""
    path = tmp_path / "text.bin"
    noise(5003).tofile(path)
    return str(path)


@pytest.fixture
def store(tmp_path):
    """Where TFDS has its sets, and `prepare` with it."""
    folder = str(tmp_path / "sets")
    said = []
    run = functools.partial(prepare.prepare, data_dir=folder, say=said.append)
    run.folder, run.said = folder, said
    return run


class Various(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set as other people write them, which TFDS shuffles."""

    VERSION = tfds.core.Version("2.0.0")

    def __init__(self, *, features, splits, **kwargs):
        self._given, self._records = features, splits
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self._given)
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._records}

    def _generate_examples(self, split):
        yield from enumerate(self._records[split])

    # TFDS looks for checksums with a package that it does not require.
    url_infos = {}  # noqa: RUF012


def various(folder, features, **splits):
    Various(features=features, splits=splits, data_dir=folder).download_and_prepare()


# --- bytes


def test_a_file_reads_back_the_same_in_every_respect(store, text, monkeypatch, capfd):
    monkeypatch.setattr(builders, "RECORD", 7)  # 643 records, in 13 files
    monkeypatch.setattr(builders, "_SHARD", 350)
    monkeypatch.setattr(builders, "_BATCH", 100)
    store("bytes/mine", text)
    folder = Path(store.folder, "bytes", "mine", "1.0.0")
    assert len(list(folder.glob("bytes-train.array_record-*"))) == 13
    assert store.said == [
        f"prepared: {folder} (train 4,502, validation 250, test 251)",
        f"train on it with --config.data.name=tfds:bytes/mine "
        f"--config.data.path={store.folder}",
    ]
    out, err = capfd.readouterr()
    assert out == ""
    assert all(
        line.startswith("writing bytes/mine/1.0.0 ") for line in err.splitlines()
    )
    assert "100%" in err.splitlines()[-1]
    original = bytes.load("bytes", text)
    for name in ("bytes/mine", "bytes/mine:1.0.0", "bytes/mine:1.*.*"):
        found = bytes.load(f"tfds:{name}", store.folder)
        assert_same(found, original)
        assert found.source == f"tensorflow-datasets bytes/mine/1.0.0, {folder}"
        assert found.notice == "" and not found.train.flags.writeable
    assert capfd.readouterr() == ("", "")


def test_tfds_itself_reads_it(store, text):
    store("bytes", text)
    source = tfds.data_source("bytes", split="train", data_dir=store.folder)
    (record,) = source
    np.testing.assert_array_equal(record["bytes"], noise(5003)[:4502])


def test_tfds_default_folder(store, text, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", store.folder)
    store("bytes", text, data_dir="")
    assert store.said[1] == "train on it with --config.data.name=tfds:bytes"
    assert_same(bytes.load("tfds:bytes"), bytes.load("bytes", text))


def test_preparing_twice_compares(store, text, tmp_path):
    store("bytes", text)
    before = Path(store.folder, "bytes", "1.0.0", "dataset_info.json").stat()
    store("bytes", text)
    assert store.said[2].startswith("already there: ")
    assert Path(store.folder, "bytes", "1.0.0", "dataset_info.json").stat() == before
    (tmp_path / "other").write_bytes(noise(5003, seed=1).tobytes())
    sentence(
        lambda: store("bytes", str(tmp_path / "other")),
        "is already prepared, of other content",
        "--name=bytes/OTHER",
    )


@pytest.fixture
def genuine(tmp_path, monkeypatch):
    """A zip whose 2,000 bytes pass for enwik8."""
    data = noise(2000, seed=8).tobytes()
    archive = archives.Archive(
        urls=("http://127.0.0.1:9/enwik8.zip",),
        zip_sha256="",
        size=2000,
        algorithm="sha256",
        digest=hashlib.sha256(data).hexdigest(),
    )
    monkeypatch.setitem(archives.ARCHIVES, "enwik8", archive)
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as file:
        file.writestr("enwik8", data)
    return tmp_path / "enwik8.zip"


def test_enwik8_from_a_zip(store, genuine):
    store("enwik8", folder=str(genuine.parent))
    found = bytes.load("tfds:enwik8", store.folder)
    assert_same(found, bytes.load("enwik8", str(genuine)))
    assert [found.train.size, found.validation.size] == [1800, 100]
    store("enwik8", str(genuine))
    assert store.said[2].startswith("already there: ")


def test_what_is_not_enwik8_is_not_stored_as_enwik8(store, genuine, text):
    sentence(
        lambda: store("enwik8", text),
        "NOT enwik8",
        "5,003 bytes instead of 2,000",
        f"--name=bytes/OTHER --path={text}",
    )
    assert not Path(store.folder).exists()


# --- sets that others prepared


@pytest.mark.parametrize("seed", [0, 1])
def test_texts_are_joined_with_newlines_in_stored_order(tmp_path, seed):
    texts = [f"né {i * (seed + 1)}" for i in range(50)]
    records = [{"text": t, "title": "x", "label": 1} for t in texts]
    features = {"text": tfds.features.Text(), "title": tfds.features.Text()}
    features["label"] = tfds.features.ClassLabel(num_classes=2)
    folder = str(tmp_path / "sets")
    various(folder, features, train=records, valid=records[:9], test=records[:1])
    found = bytes.load("tfds:various", folder)
    joined = found.train.tobytes().decode().split("\n")
    assert sorted(joined) == sorted(texts) and joined != texts  # TFDS has shuffled
    assert joined == [
        record["text"].decode()
        for record in tfds.data_source("various", split="train", data_dir=folder)
    ]
    assert sorted(found.validation.tobytes().decode().split("\n")) == sorted(texts[:9])
    assert found.test.tobytes().decode() == texts[0]
    assert found.notice == ""


@pytest.mark.parametrize(
    ("splits", "sizes", "notice"),
    [
        ({"train": 1000}, (900, 50, 50), "for validation and test, so the last 10% of"),
        ({"train": 1000, "test": 70}, (950, 50, 70), "for validation, so the last 5%"),
        ({"train": 1000, "val": 70}, (950, 70, 50), "for test, so the last 5% of"),
        ({"train": 99, "val": 3, "test": 4, "extra": 5}, (99, 3, 4), "not read is ext"),
    ],
)
def test_missing_splits_are_carved_from_the_end_and_said(
    tmp_path, splits, sizes, notice
):
    data = {split: noise(1, size, seed=size) for split, size in splits.items()}
    feature = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="zlib")
    records = {split: [{"b": row} for row in part] for split, part in data.items()}
    various(str(tmp_path), {"b": feature}, **records)
    found = bytes.load("tfds:various", str(tmp_path))
    assert (found.train.size, found.validation.size, found.test.size) == sizes
    assert notice in found.notice and "\n" not in found.notice
    carved = [found.train]
    carved += [found.validation] if "val" not in splits else []
    carved += [found.test] if "test" not in splits else []
    np.testing.assert_array_equal(np.concatenate(carved), data["train"][0])


def test_plain_uint8_vectors_are_joined_with_nothing(tmp_path):
    feature = tfds.features.Tensor(shape=(4,), dtype=np.uint8)
    rows = noise(30, 4)
    records = [{"b": row} for row in rows]
    various(str(tmp_path), {"b": feature}, train=records)
    found = bytes.load("tfds:various", str(tmp_path))
    joined = np.concatenate([found.train, found.validation, found.test])
    assert sorted(joined.reshape(30, 4).tolist()) == sorted(rows.tolist())


def test_sets_that_are_not_bytes_or_texts(tmp_path, store):
    load = functools.partial(bytes.load, "tfds:various")
    text = tfds.features.Text()
    one = {"a": "x" * 9, "b": "y" * 9, "n": 1}
    various(str(tmp_path / "two"), {"a": text, "b": text, "n": np.int64}, train=[one])
    sentence(
        lambda: load(str(tmp_path / "two")), "a, b would do", "(a, b, n)", "'text'"
    )
    various(str(tmp_path / "none"), {"n": np.int64}, train=[{"n": 1}])
    sentence(lambda: load(str(tmp_path / "none")), "none would do", "bytes or texts")
    various(str(tmp_path / "test"), {"text": text}, test=[{"text": "x" * 99}])
    sentence(lambda: load(str(tmp_path / "test")), "no split called 'train', only test")
    various(str(tmp_path / "small"), {"text": text}, train=[{"text": "x" * 20}])
    sentence(lambda: load(str(tmp_path / "small")), "18, 1, 1 bytes", "2 of each")


# --- images


@pytest.mark.parametrize("labels", [False, True])
def test_images_come_back_with_their_splits_and_labels(tmp_path, store, labels):
    folder = tmp_path / "arrays"
    folder.mkdir()
    arrays = {"train": noise(40, 3, 5, 2), "test": noise(7, 3, 5, 2, seed=1)}
    for split, array in arrays.items():
        np.save(folder / f"{split}.npy", array)
        if labels:
            np.save(
                folder / f"{split}_labels.npy", np.arange(len(array), dtype=np.int8)
            )
    store("images/mine", str(folder))
    where = Path(store.folder, "images", "mine", "1.0.0")
    assert store.said == [f"prepared: {where} (train 40, test 7)"]
    found = prepared.read_images("images/mine", store.folder)
    np.testing.assert_array_equal(found.train, arrays["train"][:38])
    np.testing.assert_array_equal(found.validation, arrays["train"][38:])
    np.testing.assert_array_equal(found.test, arrays["test"])
    assert "for validation, so the last 5% of its train split" in found.notice
    source = tfds.data_source("images/mine", split="train", data_dir=store.folder)
    assert ("label" in source[0]) == labels
    if labels:
        assert [record["label"] for record in source] == list(range(40))
    sentence(
        lambda: bytes.load("tfds:images/mine", store.folder),
        "images/mine/1.0.0 is a set of images; say so with --config.data.kind=image",
    )


def test_one_file_of_images_is_split_in_order(tmp_path, store):
    images = noise(40, 4, 4, 3)
    np.save(tmp_path / "all.npy", images)
    store("images", str(tmp_path / "all.npy"))
    found = prepared.read_images("images", store.folder)
    assert (len(found.train), len(found.validation), len(found.test)) == (36, 2, 2)
    joined = np.concatenate([found.train, found.validation, found.test])
    np.testing.assert_array_equal(joined, images)
    assert found.notice == ""
    sentence(
        lambda: prepared.read_images("images/no", store.folder),
        f"(in {store.folder}/images there is 1.0.0)",
    )


def test_arrays_that_are_no_images(tmp_path, store):
    make = functools.partial(store, "images", str(tmp_path))
    sentence(make, tmp_path / "train.npy", "No such file")
    np.save(tmp_path / "train.npy", noise(9, 4))
    sentence(make, "uint8 (9, 4)", "uint8 [N, H, W, C]")
    np.save(tmp_path / "train.npy", noise(9, 4, 4, 3).astype(np.float32))
    sentence(make, "float32 (9, 4, 4, 3)")
    (tmp_path / "train.npy").write_bytes(b"nonsense")
    sentence(make, "cannot be read")
    with open(tmp_path / "train.npy", "wb") as file:
        np.savez(file, noise(9, 4, 4, 3))
    sentence(make, "an .npz")
    np.save(tmp_path / "train.npy", noise(9, 4, 4, 3))
    np.save(tmp_path / "test.npy", noise(9, 4, 5, 3))
    sentence(make, "(9, 4, 5, 3) in test", "(4, 4, 3) of train")
    np.save(tmp_path / "test.npy", noise(9, 4, 4, 3))
    np.save(tmp_path / "train_labels.npy", np.arange(9))
    sentence(make, "test_labels.npy", "integers [N]")
    np.save(tmp_path / "test_labels.npy", np.arange(8))
    sentence(make, "8 labels for the 9 images in test")
    np.save(tmp_path / "few.npy", noise(9, 4, 4, 3))
    sentence(lambda: store("images", str(tmp_path / "few.npy")), "(0, 4, 4, 3)")
    sentence(lambda: store("images", str(tmp_path / "no")), "--path=", "does not exist")
    assert not Path(store.folder).exists()


# --- what cannot be read or written


def test_sets_that_are_not_there(store, text):
    load = functools.partial(bytes.load, path=store.folder)
    command = "python -m sparse_flax.data.prepare"
    at = f"--data_dir={store.folder}"
    sentence(lambda: load("tfds:enwik8"), f"`{command} --name=enwik8 {at}`")
    sentence(
        lambda: load("tfds:bytes/a:1.0.0"),
        f"`{command} --name=bytes/a --path=PATH {at}`",
    )
    sentence(
        lambda: load("tfds:lm1b"),
        f"tfds.builder('lm1b', data_dir='{store.folder}', file_format='array_record')",
        "with tensorflow and",
    )
    store("bytes/mine", text)
    there = f"(in {store.folder}/bytes there is mine)"
    sentence(lambda: load("tfds:bytes"), "is not in", there)
    sentence(lambda: load("tfds:bytes/mine:2.0.0"), "is not in", there)


@pytest.mark.parametrize("name", ["", "a b", "a/", "../a", "a:1", "a:b", "a/b/c=1"])
def test_names_that_are_none(name):
    sentence(lambda: bytes.load(f"tfds:{name}"), f"'tfds:{name}'", "tfds:NAME/CONFIG")


def test_damaged_sets_and_other_formats(store, text, monkeypatch, capfd):
    store("bytes", text)
    capfd.readouterr()
    load = functools.partial(bytes.load, "tfds:bytes", store.folder)
    folder = Path(store.folder, "bytes", "1.0.0")
    (records,) = folder.glob("bytes-test.*")
    good = records.read_bytes()
    middle = len(good) // 2
    records.write_bytes(good[:middle] + b"?" + good[middle + 1 :])
    sentence(load, folder, "is damaged", "prepare the set again")
    records.write_bytes(good[: len(good) // 2])
    sentence(load, folder, "is damaged")
    records.unlink()
    sentence(load, folder, "is damaged")
    description = folder / "dataset_info.json"
    info = json.loads(description.read_text())
    description.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    sentence(
        load, "tfrecord files", "without TensorFlow only array_record", "another folder"
    )
    description.write_text("{")
    sentence(load, "cannot be read", "prepare it again")
    assert capfd.readouterr() == ("", "")


def test_larger_than_the_memory(store, text, monkeypatch):
    store("bytes", text)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 9}.get)
    sentence(lambda: bytes.load("tfds:bytes", store.folder), "there are 90", "smaller")


def test_progress_where_it_takes_long(store, text, monkeypatch, capsys):
    store("bytes", text)
    capsys.readouterr()
    monkeypatch.setattr(prepared, "_SHOWN", 0)
    bytes.load("tfds:bytes", store.folder)
    assert "reading bytes/1.0.0 train 0.0 MB of 0.0, 100%" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_without_the_packages(store, text, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    needed = f"{package} is not installed", "pip install tensorflow-datasets array_reco"
    sentence(lambda: bytes.load("tfds:bytes"), *needed)
    sentence(lambda: store("bytes", text), *needed)


def test_a_folder_that_cannot_be_written_to(store, text):
    sentence(
        lambda: store("bytes", text, data_dir=text),
        f"--data_dir={text} cannot be written to",
        "Not a directory",
    )


# --- the command, and training


def command(tmp_path, *arguments, **options):
    code = (
        "import signal, sys; from sparse_flax.data import prepare\n"
        # What a shell starts in the background ignores it, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: prepare.entry_point()\n"
        "finally: assert 'tensorflow' not in sys.modules"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        **options,
    )


def test_the_command(tmp_path, text):
    done = command(tmp_path, "--name=bytes/a-1", f"--path={text}", "--data_dir=sets")
    out, err = done.communicate()
    assert done.returncode == 0
    assert out.startswith("prepared: sets/bytes/a-1/1.0.0 (train 4,502, validation 250")
    assert {line.split()[0] for line in err.splitlines()} == {"writing"}
    assert_same(
        bytes.load("tfds:bytes/a-1", str(tmp_path / "sets")), bytes.load("bytes", text)
    )


@pytest.mark.parametrize(
    ("argument", "needed"),
    [
        ("--path=x", "--name is missing; use one of enwik8, text8, bytes, images"),
        ("--nam=bytes", "Unknown command line flag 'nam'"),
        ("bytes", "'bytes' is not a flag"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, argument, needed):
    done = command(tmp_path, argument)
    out, err = done.communicate()
    (said,) = err.splitlines()
    assert (done.returncode, out) == (2, "")
    assert said.startswith("error: ") and needed in said


def test_what_cannot_be_prepared_is_a_sentence(store, tmp_path):
    sentence(lambda: store("lm1b"), "is none of enwik8, ", "tfds.builder('lm1b', data_")
    sentence(lambda: store("enwik8/x"), "--name=enwik8/x must be", "try enwik8")
    sentence(lambda: store("bytes/a.b"), "of letters, digits, _ and -")
    sentence(lambda: store("bytes"), "--path is missing")
    text = sentence(lambda: store("bytes", str(tmp_path / "no")), "--path=", "exist")
    assert "data.path" not in text


def test_interrupted_it_keeps_nothing(tmp_path):
    with open(tmp_path / "zeros", "wb") as file:
        file.truncate(300_000_000)
    running = command(tmp_path, "--name=bytes", "--path=zeros", "--data_dir=sets")
    assert running.stderr.readline().startswith("writing bytes/1.0.0 ")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate()
    assert running.returncode == 130
    assert err.splitlines()[-1] == "interrupted; run the same command again"
    assert "Traceback" not in err
    assert list((tmp_path / "sets" / "bytes").iterdir()) == []


def test_it_trains_on_the_set_as_on_the_file(tmp_path, store, text):
    store("bytes", text)
    config = defaults()
    changes = {
        "data.name": "tfds:bytes",
        "data.path": store.folder,
        "model.context": 64,
        "model.layers": 1,
        "model.width": 16,
        "model.heads": 2,
        "model.patterns": "Strided(8)",
        "train.steps": 2,
        "train.batch_size": 2,
        "eval.max_windows": 2,
        "eval.sample_bytes": 0,
    }
    config.update_from_flattened_dict(changes)
    said = []
    trainer = Trainer(config, str(tmp_path / "run"), say=said.append)
    trainer.run()
    assert any("tensorflow-datasets bytes/1.0.0, " in line for line in said)
    assert any(line.startswith("finished at step 2") for line in said)
    assert "tensorflow" not in sys.modules
    # The run may go on from the file.
    lines = WorkDir(tmp_path / "run").agree(trainer.config, bytes.load("bytes", text))
    assert lines[-1].endswith(f"bytes/1.0.0 -> {text}, same bytes")
