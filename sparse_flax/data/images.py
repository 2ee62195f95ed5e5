"""Images as bytes: row by row, pixel by pixel, red, green and blue (section 5.3).

- 'cifar10': the official files, arrays, or the set that TFDS has prepared.
- 'imagenet64': the set that TFDS has prepared, downsampled_imagenet/64x64, which is
  what the paper scores; else the npz batches of image-net.org, which were scaled down
  in another way and score lower; else a folder of pictures.
- 'images': a folder of pictures of any sizes, or arrays.
- 'tfds:NAME' with data.kind='image': any set of images of one shape.

The images held out of the benchmarks' train splits are drawn as scikit-learn's
train_test_split does with the seed of the authors' later code: 2,000 of CIFAR-10,
50,000 of ImageNet 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparse_flax.data import arrays, cifar, folder, pictures, prepared, resized
from sparse_flax.data import bytes as byte_data
from sparse_flax.data.bytes import Splits
from sparse_flax.data.split import SPLITS, carve
from sparse_flax.errors import UserError

HELD_OUT = {"cifar10": 2_000, "imagenet64": 50_000}
IMAGENET = "downsampled_imagenet/64x64"
# Of downsampled_imagenet; the paper's own 1,231,149 are what is left of train.
IMAGENET_PUBLISHED = {"train": 1_231_149, "validation": 50_000, "test": 49_999}

_SEED = 11172018


def load(
    name: str, path: str, data_folder: str, size: int, bad_files: str = "skip"
) -> Splits:
    """Load images of one size by name, as this file says at the top.

    Args:
      name: 'cifar10', 'imagenet64', 'images' or 'tfds:NAME'.
      path: a file or folder; '': what lies in data_folder, else TFDS' default folder.
      data_folder: data.folder, where data and the cache are looked for.
      size: height and width.
      bad_files: 'skip' or 'refuse' what a folder has of damaged and odd files.

    Returns:
      Splits of uint8 [N, 3 * size * size].

    Raises:
      UserError: the images cannot be had, or are of another shape.
    """
    if name == "cifar10":
        return _cifar10(path, data_folder)
    if name == "imagenet64":
        return _imagenet64(path, data_folder, bad_files)
    if name == "images":
        return _images(path, data_folder, size, bad_files)
    pieces = prepared.read_images(name.removeprefix(prepared.PREFIX), path)
    parts = [pieces.train, pieces.validation, pieces.test]
    return _splits(name, pieces.source, parts, size, pieces.notice)


def held_out(count: int, total: int) -> np.ndarray:
    """Draw which of so many images are held out: bool [total]."""
    chosen = np.zeros(total, bool)
    # The legacy generator, whose stream numpy has frozen.
    chosen[np.random.RandomState(_SEED).permutation(total)[:count]] = True
    return chosen


def _splits(
    name: str,
    source: str,
    parts: Sequence[np.ndarray],
    size: int,
    notice: str = "",
    published: Mapping[str, int] | None = None,
) -> Splits:
    """Make splits of three arrays of images, each uint8 [N, H, W, C]."""
    for part in parts:
        if part.shape[1:] != (size, size, 3):
            raise UserError(
                f"{source} has images of shape {part.shape[1:]}, and data.size={size} "
                f"needs ({size}, {size}, 3); give such images, or a folder of picture "
                "files, which are scaled"
            )
    flat = [part.reshape(len(part), 3 * size**2) for part in parts]  # or none
    return byte_data.splits(name, source, flat, notice, published)


def _cifar10(path: str, data_folder: str) -> Splits:
    root = byte_data.existing(path) if path else Path(data_folder).expanduser()
    place = cifar.find(root)
    if place:
        source, found = f"CIFAR-10, {place}", cifar.read(place)
    else:
        try:
            pieces = prepared.read_images("cifar10", path, carve=False, by_id=True)
        except UserError as error:
            raise UserError(
                f"CIFAR-10 is not in {root}, where its official files or "
                f"train_images.npy and test_images.npy were looked for ({cifar.SITE} "
                "has them; name their folder or archive with --config.data.path=PATH); "
                f"nor has TFDS it: {error}"
            ) from None
        source = pieces.source
        found = {
            split: (images, np.arange(len(images)))
            for split, images in (("train", pieces.train), ("test", pieces.test))
        }
    (train, index_N), (test, _) = found["train"], found["test"]
    if len(train) > cifar.PUBLISHED["train"]:
        raise UserError(
            f"{source} has {len(train):,} training images, and CIFAR-10 has "
            f"{cifar.PUBLISHED['train']:,}; read it with data.name='tfds:cifar10' and "
            "data.kind='image'"
        )
    held = held_out(HELD_OUT["cifar10"], cifar.PUBLISHED["train"])[index_N]
    parts = [train[~held], train[held], test]
    whole = cifar.PUBLISHED["train"] - HELD_OUT["cifar10"]
    published = {
        "train": whole,
        "validation": HELD_OUT["cifar10"],
        "test": cifar.PUBLISHED["test"],
    }
    notice = ""
    if len(train) + len(test) < sum(cifar.PUBLISHED.values()):
        notice = (
            f"CIFAR-10 is not all here: {len(train):,} of "
            f"{cifar.PUBLISHED['train']:,} training images and {len(test):,} of "
            f"{cifar.PUBLISHED['test']:,} test images; scores are of these"
        )
    return _splits("cifar10", source, parts, 32, notice, published)


def _imagenet64(path: str, data_folder: str, bad_files: str) -> Splits:
    root = byte_data.existing(path) if path else Path(data_folder, "imagenet64")
    root = root.expanduser()
    if root.is_dir() and resized.files(root):
        parts, source = resized.read(
            root, data_folder, HELD_OUT["imagenet64"], held_out
        )
        notice = (
            "WARNING: the npz batches of image-net.org are not the images that the "
            "paper scores, but scaled down in another way; scores are not comparable "
            "with its 3.44"
        )
        return _splits("imagenet64", source, parts, 64, notice)
    if root.is_dir() and not (root / "downsampled_imagenet").is_dir():
        return _images(str(root), data_folder, 64, bad_files, name="imagenet64")
    try:
        pieces = prepared.read_images(IMAGENET, path, carve=False)
    except UserError as error:
        raise UserError(
            f"ImageNet 64 is not in {root}, where npz batches or pictures were looked "
            f"for, nor has TFDS it: {error}"
        ) from None
    # TFDS calls the public validation images, which the paper tests on, so.
    test = pieces.test if len(pieces.test) else pieces.validation
    count = min(HELD_OUT["imagenet64"], len(pieces.train) // 20)
    held = held_out(count, len(pieces.train))
    parts = [pieces.train[~held], pieces.train[held], test]
    published = IMAGENET_PUBLISHED
    return _splits("imagenet64", pieces.source, parts, 64, "", published)


def _images(
    path: str, data_folder: str, size: int, bad_files: str, name: str = "images"
) -> Splits:
    if not path:
        raise UserError(
            "data.path='' is empty but data.name='images' needs to know what to read; "
            "pass --config.data.path=FOLDER with pictures, or a .npy file"
        )
    root = byte_data.existing(path)
    if root.suffix.lower() in pictures.SUFFIXES and root.is_file():
        raise UserError(
            f"data.path={path} is a single picture; give the folder it is in, "
            f"--config.data.path={root.parent}"
        )
    if root.is_file() or (root / "train.npy").is_file():
        return _arrays(name, root, size)
    found, others = folder.find(root, pictures.SUFFIXES, "pictures")
    files = folder.files_by_split(root, found, "pictures")

    def convert(path: Path, split: str, store: folder.Store) -> list[str]:
        image_HWC, remarks = pictures.read(path, size)
        store.write(split, image_HWC)
        return remarks

    parts, about = folder.read(
        root,
        files,
        convert,
        kind="images",
        options=["square", size],
        folder=data_folder,
        bad_files=bad_files,
    )
    total = sum(map(len, files.values()))
    others += len(found) - total  # in none of the sub-folders
    good = total - len(about["left_out"])
    shaped = [part.reshape(-1, size, size, 3) for part in parts]
    notice = folder.notice(about, "pictures", total, others)
    return _splits(name, f"{root} ({good:,} pictures)", shaped, size, notice)


def _arrays(name: str, root: Path, size: int) -> Splits:
    parts, _ = arrays.read(root)
    missing = [split for split in SPLITS if split not in parts]
    notice = ""
    if missing:
        cut, percent = carve(parts["train"], missing)
        parts |= cut
        notice = (
            f"{root} has no array for {' and '.join(missing)}, so the last {percent}% "
            "of train are held out for that"
        )
    ordered = [parts[split] for split in SPLITS]
    return _splits(name, str(root), ordered, size, notice)
