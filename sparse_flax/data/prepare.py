"""Store data as a tensorflow-datasets (TFDS) set, without TensorFlow.

  python -m sparse_flax.data.prepare --name=enwik8            # downloads it; text8, too
  python -m sparse_flax.data.prepare --name=bytes/mine --path=FILE_OR_FOLDER
  python -m sparse_flax.data.prepare --name=images/mine --path=FOLDER_OR_FILE.npy

Bytes are split 90/5/5 in order, as everywhere. Images are uint8 arrays [N, H, W, C]:
train.npy, and if there are any validation.npy and test.npy, in a folder, beside them
train_labels.npy and so on with integers [N] where they have labels; or one file, which
is split 90/5/5 in order. What was written is read back and compared.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
from absl import app, flags

from sparse_flax.data import archives, arrays, prepared
from sparse_flax.data import bytes as byte_data
from sparse_flax.data.split import SPLITS
from sparse_flax.errors import UserError, one_line

_NAME = flags.DEFINE_string(
    "name", None, "enwik8, text8, bytes or images; after the last two /NAME of yours."
)
_PATH = flags.DEFINE_string("path", "", "What to store: a file or folder.")
_FOLDER = flags.DEFINE_string("folder", "data", "Where downloads are looked for.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where TFDS has its sets; ~/tensorflow_datasets by default."
)

_PIECE = 1 << 24  # bytes


def prepare(
    name: str,
    path: str = "",
    *,
    folder: str = "data",
    data_dir: str = "",
    say: Callable[[str], None] = print,
) -> None:
    """Write a set in TFDS' folder, or find it there, and compare what it holds.

    Args:
      name: 'enwik8' or 'text8'; 'bytes' or 'images', or 'bytes/MINE' for one of many.
      path: as `byte_data.load` takes it; for images as this file says at the top.
      folder: where enwik8 and text8 are looked for and downloaded to without a path.
      data_dir: where TFDS has its sets; '' is its default.
      say: takes a line for the user.

    Raises:
      UserError: what there is to store cannot be read, the set is already there with
        other content, or data_dir cannot be written to.
    """
    kind, slash, config = name.partition("/")
    if kind not in prepared.OURS:
        raise UserError(
            f"--name={name} is none of {', '.join(prepared.OURS)}; if it is one of "
            f"TFDS' own, prepare it by {prepared.by_tensorflow(name, data_dir)}"
        )
    if slash and (kind in archives.ARCHIVES or not re.fullmatch(r"[\w-]+", config)):
        raise UserError(
            f"--name={name} must be enwik8, text8, bytes, images, or bytes/MINE or "
            f"images/MINE, where MINE is of letters, digits, _ and -; try {kind}"
        )
    tfds = prepared.import_tfds()
    from sparse_flax.data import builders

    if kind == "images":
        splits, labels = _images(path)
        make = builders.Images
        options = {"labels": labels}
    else:
        splits = _bytes(kind, path, folder)
        make = {"enwik8": builders.Enwik8, "text8": builders.Text8}.get(
            kind, builders.Bytes
        )
        options = {}
    where = str(Path(data_dir or prepared.default_data_dir()).expanduser())
    try:
        builder = make(
            splits=splits,
            data_dir=where,
            config=tfds.core.BuilderConfig(name=config) if config else None,
            **options,
        )
        there = builder.is_prepared()
        builder.write()
    except (OSError, RuntimeError) as error:  # the second, of array_record
        raise UserError(
            f"--data_dir={where} cannot be written to "
            f"({one_line(error)}); free some space or name another folder"
        ) from error
    read = prepared.read_images if kind == "images" else prepared.read_bytes
    back = read(name, where, carve=False)
    if not all(_same(getattr(back, split), splits[split]) for split in splits):
        what = "is already prepared, of other content" if there else "reads back wrong"
        raise UserError(
            f"{builder.data_dir} {what}; delete it, or name another --data_dir"
            + (f", or --name={kind}/OTHER" if kind not in archives.ARCHIVES else "")
        )
    sizes = ", ".join(f"{split} {len(splits[split]):,}" for split in splits)
    say(f"{'already there' if there else 'prepared'}: {builder.data_dir} ({sizes})")
    more = f" --config.data.path={data_dir}" if data_dir else ""
    if kind == "images":
        height, *rest = splits["train"].shape[1:]
        if rest != [height, 3]:  # which the trainer does not take
            return
        more += f" --config.data.size={height} --config=configs/images.py"
    say(f"train on it with --config.data.name=tfds:{name}{more}")


def _bytes(kind: str, path: str, folder: str) -> dict[str, np.ndarray]:
    if kind == "bytes" and not path:
        raise UserError("--path is missing; give the file or folder to store")
    try:
        splits = byte_data.load(kind, path, folder)
    except UserError as error:  # Our flags have other names than the trainer's.
        text = re.sub(r"(--config\.)?\bdata\.(name|path|folder)=", r"--\2=", str(error))
        raise UserError(text) from error
    if splits.notice:  # It would be lost with the name of the file.
        raise UserError(
            f"{splits.notice.removeprefix('WARNING: ')}; store it under a name of its "
            f"own with --name=bytes/OTHER --path={path or splits.source}"
        )
    return {split: getattr(splits, split) for split in SPLITS}


def _images(path: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return images and, where there are some, labels of each split."""
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise UserError(
            f"--path={path} does not exist; give a folder with train.npy in it, or a "
            ".npy file"
        )
    return arrays.read(root)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare uint8 arrays piece by piece, because comparing makes an array, too."""
    flat, others = one.reshape(-1), other.reshape(-1)
    return one.shape == other.shape and all(
        np.array_equal(flat[start : start + _PIECE], others[start : start + _PIECE])
        for start in range(0, flat.size, _PIECE)
    )


def main(argv: list[str]) -> None:
    """Run with the flags given."""
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; write --name=value")
    if _NAME.value is None:
        raise UserError(f"--name is missing; use one of {', '.join(prepared.OURS)}")
    prepare(_NAME.value, _PATH.value, folder=_FOLDER.value, data_dir=_DATA_DIR.value)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(one_line(error)) from None


def entry_point() -> None:
    """Run, and answer what the user can put right without a traceback."""
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "interrupted; run the same command again")


def _end(status: int, sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
