"""Images: from pictures, arrays and the official files, to batches and bits per dim."""

import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_config import get_config as config_of
from test_tfds import noise, sentence, various

from sparse_flax import evaluate
from sparse_flax.config import defaults
from sparse_flax.config_checks import finalize
from sparse_flax.data import (
    batches,
    bigram,
    cifar,
    folder,
    images,
    pictures,
    prepare,
    resized,
    sources,
)
from sparse_flax.data import bytes as bytes_of
from sparse_flax.data.folder import BadFileError
from sparse_flax.errors import UserError
from sparse_flax.eval_run import EvalRun
from sparse_flax.train import Trainer


def png(path, width, height, depth, colour, rows):
    """Write a PNG whose header says whatever is wanted."""

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def load(root, tmp_path, size=8, bad_files="skip", name="images"):
    return images.load(name, str(root), str(tmp_path / "data"), size, bad_files)


@pytest.fixture
def album(tmp_path):
    """Forty pictures of 8 x 8, by file name; each of one red."""
    for i in range(40):
        image_HWC = noise(8, 8, 3, seed=i)
        image_HWC[..., 0] = i
        save(tmp_path / "album" / f"{i % 4}" / f"{i}.png", image_HWC)
    return tmp_path / "album"


# --- one picture


def test_bytes_are_in_row_column_channel_order(tmp_path):
    image_HWC = noise(8, 8, 3)
    read_HWC, remarks = pictures.read(save(tmp_path / "a.png", image_HWC), 8)
    np.testing.assert_array_equal(read_HWC, image_HWC)
    assert remarks == []


def test_the_middle_square_is_scaled(tmp_path):
    image_HWC = np.zeros((30, 90, 3), np.uint8)
    image_HWC[:, 30:60] = (10, 20, 30)
    image_HWC[:, :30] = 255
    read_HWC, _ = pictures.read(save(tmp_path / "a.bmp", image_HWC), 10)
    assert (read_HWC == (10, 20, 30)).all() and read_HWC.shape == (10, 10, 3)


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    image_HWC = np.zeros((8, 8, 3), np.uint8)
    image_HWC[0] = 200  # on top, once it is turned by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    path = save(tmp_path / "a.png", image_HWC[::-1], exif=exif)
    np.testing.assert_array_equal(pictures.read(path, 8)[0], image_HWC)


def test_other_colours_become_rgb_with_a_remark(tmp_path):
    grey_HW = noise(8, 8)
    read_HWC, (remark,) = pictures.read(save(tmp_path / "g.png", grey_HW), 8)
    np.testing.assert_array_equal(read_HWC, np.stack([grey_HW] * 3, -1))
    assert "without colours" in remark

    palette = Image.fromarray(grey_HW, "L").convert("P")
    palette.save(tmp_path / "p.gif")
    read_HWC, (remark,) = pictures.read(tmp_path / "p.gif", 8)
    np.testing.assert_array_equal(read_HWC[..., 1], grey_HW)
    assert "palette" in remark

    rgba_HWC = noise(8, 8, 4)
    rgba_HWC[..., 3] = 255
    read_HWC, remarks = pictures.read(save(tmp_path / "o.png", rgba_HWC), 8)
    np.testing.assert_array_equal(read_HWC, rgba_HWC[..., :3])
    assert remarks == []  # nothing of it is transparent
    rgba_HWC[:4, :, 3] = 0
    read_HWC, (remark,) = pictures.read(save(tmp_path / "t.png", rgba_HWC), 8)
    assert (read_HWC[:4] == 255).all() and "over white" in remark
    np.testing.assert_array_equal(read_HWC[4:], rgba_HWC[4:, :, :3])


def make_bad(folder):
    """Write files that lie, each with what is said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    for suffix in ("png", "jpg"):
        whole = save(folder / f"whole.{suffix}", noise(64, 64, 3)).read_bytes()
        (folder / f"short.{suffix}").write_bytes(whole[: len(whole) // 2])
        (folder / f"whole.{suffix}").unlink()
    # Few bytes that ask for gigabytes, in the header and in what is packed.
    png(folder / "huge.png", 60_000, 60_000, 8, 2, bytes(1000))
    png(folder / "wide.png", 40_000, 3_000, 8, 2, bytes(1000))
    png(folder / "deep.png", 8, 8, 16, 2, bytes((1 + 8 * 6) * 8))
    Image.fromarray(noise(8, 8).astype(np.uint16)).save(folder / "grey16.png")
    (folder / "deep.ppm").write_bytes(b"P6 8 8 65535\n" + bytes(8 * 8 * 6))
    frames = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(3)]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    return {
        "empty.png": "is empty",
        "text.png": "is not a picture that can be read",
        "short.png": "is damaged (image file is truncated",
        "short.jpg": "is damaged (image file is truncated",
        "huge.png": "is too large",
        "wide.png": "has 40,000 x 3,000 pixels, and 100,000,000 in all are the most",
        "deep.png": "has colours of more than 8 bits",
        "grey16.png": "has colours of more than 8 bits",
        "deep.ppm": "has colours of more than 8 bits",
        "moves.gif": "holds several pictures",
    }


def test_files_that_lie_are_told_apart(tmp_path):
    for name, said in make_bad(tmp_path).items():
        with pytest.raises(BadFileError) as caught:
            pictures.read(tmp_path / name, 8)
        assert said in str(caught.value) and "\n" not in str(caught.value), name


def test_rows_of_160_bytes_are_no_16_bits(tmp_path):
    for width in 53, 54, 160:
        for suffix in "bmp", "tiff":
            image_HWC = noise(width, width, 3)
            path = save(tmp_path / f"{width}.{suffix}", image_HWC)
            np.testing.assert_array_equal(pictures.read(path, width)[0], image_HWC)
    (tmp_path / "160.ppm").write_bytes(b"P6 8 8 160\n" + bytes(8 * 8 * 3))
    assert not pictures.read(tmp_path / "160.ppm", 8)[0].any()


def test_a_phone_s_preview_behind_the_picture_is_left_out(tmp_path):
    first, second = (Image.fromarray(np.full((8, 8, 3), x, np.uint8)) for x in (9, 200))
    path = tmp_path / "phone.jpg"
    first.save(path, format="MPO", save_all=True, append_images=[second])
    assert (pictures.read(path, 8)[0] == 9).all()


# --- a folder


def test_a_folder_is_split_by_name_and_stays_so(album, tmp_path):
    found = load(album, tmp_path)
    reds = {
        split: set(getattr(found, split)[:, 0])
        for split in ("train", "validation", "test")
    }
    assert set.union(*reds.values()) == set(range(40)) and found.train.shape[1] == 192
    assert min(map(len, reds.values())) >= 1 and len(reds["train"]) > 30
    image_HWC = noise(8, 8, 3, seed=7)
    image_HWC[..., 0] = 7
    every = np.concatenate([found.train, found.validation, found.test])
    (row,) = np.flatnonzero(every[:, 0] == 7)
    np.testing.assert_array_equal(every[row], image_HWC.reshape(-1))

    for i in range(40, 60):  # others come, and one goes
        save(album / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    (album / "0" / "0.png").unlink()
    later = load(album, tmp_path)
    for split, old in reds.items():
        new = set(getattr(later, split)[:, 0])
        assert old - {0} == new & set(range(1, 40)), split
    assert later.fingerprint != found.fingerprint


def test_sub_folders_are_splits(album, tmp_path):
    for split, name in zip("0123", ("train", "val", "test", "more"), strict=True):
        (album / split).rename(album / name)
    found = load(album, tmp_path)
    assert sorted(found.validation[:, 0]) == list(range(1, 40, 4))
    assert sorted(found.test[:, 0]) == list(range(2, 40, 4))
    assert "10 other files in the folder are not read" in found.notice
    shutil.rmtree(album / "test")
    found = load(album, tmp_path)  # a tenth or so of train, then
    assert sorted([*found.train[:, 0], *found.test[:, 0]]) == list(range(0, 40, 4))
    (album / "train").rename(album / "Train")
    assert sorted(load(album, tmp_path).validation[:, 0]) == list(range(1, 40, 4))
    (album / "Train").rename(album / "training")
    with pytest.raises(UserError, match="sub-folder val and none that is named train"):
        load(album, tmp_path)


@pytest.mark.parametrize("count", range(3, 8))
def test_no_split_of_a_few_files_is_empty(tmp_path, count):
    for n in range(40):
        files = [tmp_path / f"{n}-{i}.png" for i in range(count)]
        parts = folder.files_by_split(tmp_path, files, "pictures")
        assert all(parts.values()) and sum(map(len, parts.values())) == count


def test_bad_files_are_left_out_counted_and_remembered(album, tmp_path, monkeypatch):
    bad = make_bad(album / "bad")
    (album / "readme.txt").write_text("not read")
    save(album / "grey.png", noise(8, 8))
    save(album / "small.png", noise(4, 4, 3))
    found = load(album, tmp_path)
    assert sum(map(len, (found.train, found.validation, found.test))) == 42
    assert "42 pictures" in found.source
    assert f"{len(bad)} of {42 + len(bad)} files are left out: bad/" in found.notice
    (listed,) = re.findall(r"; all are named in (\S+about.json); ", found.notice)
    assert all(name in Path(listed).read_text() for name in bad)
    assert "1 other files" in found.notice
    assert "1 pictures without colours" in found.notice
    assert "1 pictures smaller than 8 x 8" in found.notice

    def fail(*_):
        raise AssertionError("not from the cache")

    monkeypatch.setattr(pictures, "read", fail)
    again = load(album, tmp_path)
    assert again.fingerprint == found.fingerprint
    assert again.notice == found.notice
    # What was skipped before is still refused, and by the same sentence.
    sentence(
        lambda: load(album, tmp_path, bad_files="refuse"), "bad/", "bad_files=skip"
    )
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "data")
    sentence(
        lambda: load(album, tmp_path, bad_files="refuse"), "bad/", "bad_files=skip"
    )
    assert not list((tmp_path / "data" / "cache").iterdir())


def test_a_cache_that_is_cut_short_is_made_again(album, tmp_path):
    found = load(album, tmp_path)
    (cache,) = (tmp_path / "data" / "cache").iterdir()
    os.truncate(cache / "train", 100)
    assert load(album, tmp_path).fingerprint == found.fingerprint
    # A picture that was changed in place shows.
    save(album / "0" / "0.png", np.full((8, 8, 3), 9, np.uint8))
    assert load(album, tmp_path).fingerprint != found.fingerprint


def test_folders_that_will_not_do(tmp_path):
    (tmp_path / "none").mkdir()
    sentence(lambda: load(tmp_path / "none", tmp_path), "holds no pictures (.png, ")
    for i in range(2):
        save(tmp_path / "two" / f"{i}.png", noise(8, 8, 3))
    sentence(lambda: load(tmp_path / "two", tmp_path), "holds 2 pictures to train on")
    for i in range(3):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / f"{i}.png").write_text("x")
    sentence(
        lambda: load(tmp_path / "bad", tmp_path), "no images for train", "0.png is"
    )
    sentence(lambda: load("", tmp_path), "data.path='' is empty")
    one = tmp_path / "two" / "0.png"
    sentence(lambda: load(one, tmp_path), "is a single picture", f"path={one.parent}")
    (tmp_path / "data").rename(tmp_path / "other")
    (tmp_path / "data").write_text("a file")
    save(tmp_path / "two" / "2.png", noise(8, 8, 3))
    sentence(lambda: load(tmp_path / "two", tmp_path), "data.folder=", "cache")


# --- arrays and the official files


def test_arrays(tmp_path):
    all_NHWC = noise(40, 8, 8, 3)
    np.save(tmp_path / "all.npy", all_NHWC)
    found = load(tmp_path / "all.npy", tmp_path)
    np.testing.assert_array_equal(found.test, all_NHWC[38:].reshape(2, -1))
    assert "validation and test" not in found.notice
    (tmp_path / "some").mkdir()
    np.save(tmp_path / "some" / "train.npy", all_NHWC)
    np.save(tmp_path / "some" / "test.npy", all_NHWC[:3])
    found = load(tmp_path / "some", tmp_path)
    assert [len(found.train), len(found.validation), len(found.test)] == [38, 2, 3]
    assert "no array for validation, so the last 5%" in found.notice
    np.save(tmp_path / "few.npy", all_NHWC[:3])
    sentence(lambda: load(tmp_path / "few.npy", tmp_path), "few.npy", "validation")
    sentence(
        lambda: load(tmp_path / "some", tmp_path, size=9), "(8, 8, 3)", "(9, 9, 3)"
    )


def test_a_set_of_tfds(tmp_path):
    image = tfds.features.Tensor(shape=(32, 32, 3), dtype=np.uint8, encoding="bytes")
    features = {"image": image, "id": tfds.features.Text()}
    rows = noise(30, 32, 32, 3)
    shuffled = [{"image": rows[i], "id": f"train_{i:05}"} for i in range(30)[::-1]]
    various(str(tmp_path / "sets"), features, train=shuffled)
    name = "tfds:various"
    found = load(tmp_path / "sets", tmp_path, size=32, name=name)
    assert len(found.train) == 27 and "held out" in found.notice
    pieces = images.prepared.read_images(
        "various", str(tmp_path / "sets"), carve=False, by_id=True
    )
    np.testing.assert_array_equal(pieces.train, rows)


def test_a_prepared_set_is_read_as_the_command_that_is_said(tmp_path):
    np.save(tmp_path / "all.npy", noise(40, 8, 8, 3))
    said, sets = [], str(tmp_path / "sets")
    prepare.prepare(
        "images/mine", str(tmp_path / "all.npy"), data_dir=sets, say=said.append
    )
    assert said[1] == (
        "train on it with --config.data.name=tfds:images/mine "
        f"--config.data.path={sets} --config.data.size=8 --config=configs/images.py"
    )
    config = config_of("images")
    config.data.name, config.data.path, config.data.size = "tfds:images/mine", sets, 8
    found = sources.load(finalize(config)[0].data)
    np.testing.assert_array_equal(found.train, noise(40, 8, 8, 3)[:36].reshape(36, -1))
    assert found.amount("test") == "2 images"


def python2_batch(rows):
    """Pickle a batch as Python 2 did for the official files."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R(K\x01M"
        + struct.pack("<H", len(rows))
        + b"M\x00\x0c\x86cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", rows.size)
        + rows.tobytes()
        + b"tb"
    )
    label = text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + label + text(b"data") + array + b"u."


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Sixty images in the official files: folders and archives, by kind."""
    monkeypatch.setattr(cifar, "_ROWS", 10)
    monkeypatch.setattr(cifar, "PUBLISHED", {"train": 50, "test": 10})
    monkeypatch.setitem(images.HELD_OUT, "cifar10", 2)
    images_NHWC = noise(60, 32, 32, 3)
    planar = images_NHWC.transpose(0, 3, 1, 2).reshape(6, 10, 3072)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for kind in ("py", "bin"):
        folder = tmp_path / f"cifar-10-batches-{kind}"
        folder.mkdir()
        for name, rows in zip(names, planar, strict=True):
            labelled = np.concatenate([np.full((10, 1), 3, np.uint8), rows], 1)
            if kind == "py":
                (folder / name).write_bytes(python2_batch(rows))
            else:
                (folder / f"{name}.bin").write_bytes(labelled.tobytes())
        full = {"py": "python", "bin": "binary"}[kind]
        with tarfile.open(tmp_path / f"cifar-10-{full}.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
    return images_NHWC


def test_the_official_files_of_cifar10(official, tmp_path):
    flat = official.reshape(60, -1)
    held = np.random.RandomState(11172018).permutation(50)[:2]
    prints = set()
    folders = ["cifar-10-batches-py", "cifar-10-batches-bin", ""]
    for place in [*folders, "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"]:
        found = load(tmp_path / place, tmp_path, 32, name="cifar10")
        np.testing.assert_array_equal(found.test, flat[50:])
        np.testing.assert_array_equal(found.validation, flat[np.sort(held)])
        np.testing.assert_array_equal(found.train, np.delete(flat[:50], held, 0))
        assert found.notice == "" and found.amount("test") == "10 images"
        prints.add(found.fingerprint)
    assert len(prints) == 1
    # Without a path, from data.folder.
    assert images.load("cifar10", "", str(tmp_path), 32).fingerprint in prints


def test_a_part_of_cifar10_is_reported_as_one(official, tmp_path):
    (tmp_path / "part").mkdir()
    held = np.random.RandomState(11172018).permutation(50)[:2]
    for split, index in (("train", np.delete(np.arange(50), held[0])),
                         ("test", np.arange(50, 59))):  # fmt: skip
        np.save(tmp_path / "part" / f"{split}_images.npy", official[index])
        np.save(tmp_path / "part" / f"{split}_index.npy", index % 50)
    found = load(tmp_path / "part", tmp_path, 32, name="cifar10")
    assert found.amount("test") == "9 of 10 images"
    assert found.amount("validation") == "1 of 2 images"
    assert "49 of 50 training images and 9 of 10 test images" in found.notice
    np.testing.assert_array_equal(found.validation[0], official[held[1]].reshape(-1))
    np.save(tmp_path / "part" / "test_index.npy", np.zeros(9, int))
    sentence(
        lambda: load(tmp_path / "part", tmp_path, 32, name="cifar10"), "of its own"
    )


def test_a_pickle_of_cifar10_runs_nothing(official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    load_it = lambda: load(batch.parent, tmp_path, 32, name="cifar10")  # noqa: E731
    batch.write_bytes(pickle.dumps({"data": Evil()}))
    sentence(load_it, "test_batch is no batch of CIFAR-10 (it asks to run ", ".system)")
    assert not Path("ran").exists()
    # As newer Pythons and numpys store an array.
    rows = noise(10, 3072)
    batch.write_bytes(pickle.dumps({b"data": rows}, protocol=4))
    planar = rows.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1).reshape(10, -1)
    np.testing.assert_array_equal(load_it().test, planar)
    for other in ({}, {b"data": rows[:5]}, {b"data": rows.astype(np.int64)}, [1]):
        batch.write_bytes(pickle.dumps(other, protocol=4))
        sentence(load_it, "test_batch is no batch of CIFAR-10")
    batch.write_bytes(python2_batch(rows)[:-100])
    sentence(load_it, "test_batch is no batch of CIFAR-10")
    batch.unlink()
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    sentence(lambda: load(archive, tmp_path, 32, name="cifar10"), "cannot be unpacked")
    (tmp_path / "none").mkdir()
    sentence(
        lambda: load(tmp_path / "none", tmp_path, 32, name="cifar10"),
        "CIFAR-10 is not in",
        cifar.SITE,
    )


def test_npz_batches_of_imagenet(tmp_path, monkeypatch):
    monkeypatch.setattr(resized, "_ROWS", 7)
    images_NHWC = noise(66, 64, 64, 3)
    planar = images_NHWC.transpose(0, 3, 1, 2).reshape(66, -1)
    root = tmp_path / "npz"
    root.mkdir()
    # Ten comes after nine.
    for i, rows in enumerate(np.split(planar[:60], 10), 1):
        np.savez(root / f"train_data_batch_{i}.npz", data=rows, labels=np.arange(6))
    np.savez_compressed(root / "val_data.npz", data=planar[60:])
    found = load(root, tmp_path, 64, name="imagenet64")
    held = images.held_out(3, 60)
    flat = images_NHWC.reshape(66, -1)
    np.testing.assert_array_equal(found.train, flat[:60][~held])
    np.testing.assert_array_equal(found.validation, flat[:60][held])
    np.testing.assert_array_equal(found.test, flat[60:])
    assert "not comparable" in found.notice
    np.savez(root / "val_data.npz", data=planar[60:, :5])
    sentence(
        lambda: load(root, tmp_path, 64, name="imagenet64"), "val_data.npz is no b"
    )
    (root / "val_data.npz").write_bytes(b"PK")
    sentence(
        lambda: load(root, tmp_path, 64, name="imagenet64"), "val_data.npz is no b"
    )
    (root / "val_data.npz").unlink()
    sentence(lambda: load(root, tmp_path, 64, name="imagenet64"), "both are needed")


# --- batches, evaluation, training


def test_an_epoch_visits_every_image_once_in_a_fresh_order():
    data_NT = np.repeat(np.arange(10, dtype=np.uint8)[:, None], 12, 1)
    take = {"batch_size": 4, "context": 12, "seed": 3, "start": 0, "steps": 5}
    given = [b["targets_BT"] for b in batches.train_batches(data_NT, **take)]
    rows = np.concatenate(given)
    assert (rows == rows[:, :1]).all()  # no row is of two images
    epochs = rows[:, 0].reshape(2, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(10)).any()
    later = [
        b["targets_BT"] for b in batches.train_batches(data_NT, **take | {"start": 3})
    ]
    np.testing.assert_array_equal(np.concatenate(later), rows[12:])
    sentence(
        lambda: batches.train_batches(data_NT, **take | {"context": 6}), "the 12 bytes"
    )


def test_evaluation_scores_every_image_once():
    data_NT = noise(5, 12)
    given = [*batches.evaluation_batches(data_NT, batch_size=2, context=12)]
    rows = np.concatenate([batch["targets_BT"] for batch in given])
    weights = np.concatenate([batch["weights_BT"] for batch in given])
    np.testing.assert_array_equal(rows[:5], data_NT)
    assert (weights[:5] == 1).all() and (weights[5:] == 0).all() and len(rows) == 6


def test_the_baseline_of_images_pairs_neighbouring_pixels():
    data_NT = np.tile(np.array([1, 2, 3], np.uint8), (50, 8))
    data_NT[25:] += 100
    other = np.roll(data_NT, 25, 0)
    assert bigram.bigram_bits_per_byte(data_NT, other, 3) < 0.5
    by_hand = np.stack([data_NT[0], data_NT[30]])
    each = [bigram.bigram_bits_per_byte(data_NT, row[None], 3) for row in by_hand]
    both = bigram.bigram_bits_per_byte(data_NT, by_hand, 3)
    assert both == pytest.approx(np.mean(each))


def test_the_baseline_scores_the_images_that_are_evaluated(monkeypatch):
    data_NT = np.tile(noise(60, 3), 8)  # a colour is that of the next pixel
    given = data_NT[:40], data_NT[40:], data_NT[40:]
    splits = bytes_of.Splits("images", "here", *given, fingerprint="")
    chosen = splits.validation[[0, 2, 5, 8, 11, 14, 17]]  # 7 of 20
    bits = bigram.bigram_bits_per_byte(splits.train, chosen, 3)
    assert bigram.baseline(splits, 24, 7) == (bits, "next-pixel table")
    monkeypatch.setattr(bigram, "_ENOUGH", 300)  # bytes, of 960
    bits = bigram.bigram_bits_per_byte(splits.train[::4], chosen, 3)
    assert bigram.baseline(splits, 24, 7).bits == bits


def tiny(album, tmp_path, **options):
    config = config_of("images", "laptop")
    config.update_from_flattened_dict(
        {
            "data.path": str(album),
            "data.folder": str(tmp_path / "data"),
            "data.size": 8,
            "model.layers": 2,
            "model.width": 12,
            "model.qk_width": 12,
            "train.steps": 12,
            "eval.every_steps": 6,
            "checkpoint.every_steps": 6,
        }
        | options
    )
    return config


def test_a_folder_trains_and_is_scored_in_bits_per_dim(album, tmp_path):
    cheap = {"model.layers": 1, "model.patterns": "Strided(24)", "train.steps": 6}
    config = tiny(album, tmp_path, **cheap, **{"eval.every_steps": 0})
    lines = []
    trainer = Trainer(config, str(tmp_path / "run"), say=lines.append)
    assert tuple(trainer.config.model.position_shape) == (8, 8, 3)
    trainer.run()
    text = "\n".join(lines)
    n = len(trainer.splits.test)
    assert f" bits/dim (ema weights, {n} images)" in text
    assert "bits/dim" in text and "bits/byte" not in text and "bigram" not in text
    assert "next-pixel table" in text
    assert not (tmp_path / "run" / "sample.txt").exists()

    (row,) = [
        row
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
        if row["split"] == "test"
    ]
    lines.clear()
    EvalRun(config, str(tmp_path / "run"), say=lines.append).run()
    (scored,) = map(json.loads, (tmp_path / "run" / "eval.jsonl").open())
    assert scored["bits_per_byte"] == pytest.approx(row["bits_per_byte"], abs=1e-6)
    assert scored["unit"] == "bits per dim" and scored["bytes_scored"] == n * 192
    assert f"bits/dim (ema weights; each image on its own, all {n} images" in lines[-1]
    # And by hand, each image by itself, whatever the batches were.
    forward = jax.jit(lambda model, inputs_BT: model(inputs_BT))
    model, nats = jax.device_get(trainer.state.ema), 0.0
    for image_T in trainer.splits.test:
        batch = batches.inputs_and_targets(image_T[None])
        logits_BTN = forward(model, batch["inputs_BT"])
        nats += float(evaluate.cross_entropy(logits_BTN, batch["targets_BT"]).sum())
    by_hand = nats / (n * 192) / np.log(2)
    assert scored["bits_per_byte"] == pytest.approx(by_hand, abs=1e-4)


def test_what_does_not_fit_images_is_said():
    def check(**options):
        config = config_of("images")
        config.update_from_flattened_dict(options)
        return lambda: finalize(config)

    sentence(check(**{"data.size": 0}), "data.size=0 is no height", "use 32")
    sentence(check(**{"model.context": 5}), "the 3072 bytes of an image", "use 3072")
    sentence(check(**{"eval.min_context": 5}), "is for streams", "use 0")
    sentence(check(**{"data.kind": "text"}), "contradicts data.name='images'")
    sentence(check(**{"data.name": "imges"}), "'imges' is not a data set", "images")
    sentence(check(**{"data.bad_files": "no"}), "data.bad_files='no' must be one of")
    config, notices = check(**{"eval.sample_bytes": 9})()
    assert "eval.sample_bytes=9 is for text" in notices[0]
    assert config.eval.sample_bytes == 0
    config, _ = check(**{"data.size": 64})()
    assert (
        config.model.context == 12288 and "Columns(stride=192)" in config.model.patterns
    )
    cifar10 = config_of("cifar10")
    cifar10.data.size = 64
    sentence(lambda: finalize(cifar10), "data.size=64 is no height of", "use 32")
    text = defaults()
    assert finalize(text)[0].data.kind == "text"
    text.data.name, text.data.kind = "tfds:mine", "image"
    text.data.size, text.model.context = 8, 192
    assert finalize(text)[0].data.kind == "image"
    text.data.kind = "audio"
    sentence(lambda: finalize(text), "contradicts data.name='tfds:mine'")


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
def test_the_laptop_preset_learns_pictures(tmp_path):
    """What cifar10.py:laptop and images.py:laptop train, shrunk to some seconds."""
    flags = np.random.default_rng(0).choice([[20, 40, 200], [250, 220, 0]], (60, 2))
    for i, halves in enumerate(flags):
        image_HWC = np.repeat(halves, 4, 0)[:, None].repeat(8, 1).astype(np.uint8)
        save(tmp_path / "album" / f"{i}.png", image_HWC)
    config = tiny(
        tmp_path / "album",
        tmp_path,
        **{
            "model.width": 96,
            "model.qk_width": 96,
            "train.steps": 100,
            "eval.every_steps": 0,
            "checkpoint.every_steps": 0,
        },
    )
    trainer = Trainer(config, str(tmp_path / "run"), say=lambda line: None)
    trainer.run()
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    scores = [row["bits_per_byte"] for row in rows if row["split"] == "validation"]
    assert scores[0] == pytest.approx(8, abs=1e-4) and scores[-1] < 2
    assert sources.load(trainer.config.data).fingerprint == trainer.splits.fingerprint
