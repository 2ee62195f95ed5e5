"""Sets that tensorflow-datasets (TFDS) has prepared, read without TensorFlow.

`data.name='tfds:NAME'` takes the names that TFDS gives: NAME, NAME/CONFIG, and with
:VERSION at the end. Only files in the array_record format can be read without
TensorFlow, which is therefore what `prepare.py` writes.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_flax import quiet  # noqa: F401, because it keeps TFDS' chatter off
from sparse_flax.data import archives
from sparse_flax.data.split import ALIASES
from sparse_flax.data.split import carve as carved
from sparse_flax.errors import UserError, one_line

PREFIX = "tfds:"
OURS = ("enwik8", "text8", "bytes", "images")  # what `prepare.py` prepares

_SHOWN = 100_000_000  # bytes that take so long to read that progress is shown


@dataclass(frozen=True)
class Pieces:
    """What a set holds, in the order in which it is stored.

    Attributes:
      source: the set's full name and where it lies.
      train: uint8 [N] of bytes, or [N, H, W, C] of images; so are the others.
      validation: the split called validation, valid or val, else the end of train.
      test: the split called test, else the end of train.
      notice: empty, or a sentence that the user must see.
    """

    source: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    notice: str = ""


def read_bytes(name: str, data_dir: str = "", *, carve: bool = True) -> Pieces:
    """Read a set of bytes or texts, each split joined into one array in memory.

    A set has to have one feature that is a Text or a uint8 vector, or one called
    'text'. Records that are texts are joined with a newline between them, and vectors
    with nothing between.

    Args:
      name: NAME, NAME/CONFIG or NAME/CONFIG:VERSION.
      data_dir: where TFDS has its sets; '' is its default.
      carve: whether a validation or test split that is missing is the last 5% of
        train, or both the last 10%; if not, it is empty.

    Raises:
      UserError: TFDS or the set is missing, or cannot be read without TensorFlow, or
        is damaged, larger than the memory, or not of bytes.
    """
    builder = _builder(name, data_dir)
    feature = _choose(builder, "bytes or texts", _is_stream, "text")
    between = b"\n" if builder.info.features[feature].shape == () else b""

    def join(split: str) -> np.ndarray:
        joined = bytearray()
        for i, record in enumerate(_records(builder, split, feature)):
            joined += (between if i else b"") + bytes(record)
        return np.frombuffer(joined, np.uint8)

    return _pieces(builder, join, carve)


def read_images(
    name: str, data_dir: str = "", *, carve: bool = True, by_id: bool = False
) -> Pieces:
    """Read a set of images of one shape into memory.

    A set has to have one feature that is a uint8 Image or Tensor of a fixed shape
    (H, W, C), or one called 'image'. Its labels are not read. Arguments and errors are
    those of `read_bytes`, with 5% and 10% of the images.

    With `by_id` the images are in the order of the feature 'id', where there is one,
    not as they are stored: TFDS shuffles its own sets, which have ids in order.
    """
    builder = _builder(name, data_dir)
    feature = _choose(builder, "images of one shape", _is_image, "image")

    def stack(split: str) -> np.ndarray:
        count = builder.info.splits[split].num_examples
        shape = builder.info.features[feature].shape
        _fits_in_memory(builder, count * math.prod(shape))
        images_NHWC = np.empty((count, *shape), np.uint8)
        for i, image_HWC in enumerate(_records(builder, split, feature)):
            images_NHWC[i] = image_HWC
        if by_id and "id" in builder.info.features:
            ids = [bytes(each) for each in _records(builder, split, "id")]
            images_NHWC = images_NHWC[np.argsort(ids, kind="stable")]
        return images_NHWC

    return _pieces(builder, stack, carve)


def import_tfds() -> Any:
    """Import TFDS, late because it takes a second, or say what to install."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed and 'tfds:' data need it; "
            "pip install tensorflow-datasets array_record"
        ) from error
    return tensorflow_datasets


def default_data_dir() -> str:
    """Return the folder that TFDS uses if none is given."""
    return import_tfds().core.constants.get_default_data_dir()


def _builder(name: str, data_dir: str) -> Any:
    if not re.fullmatch(r"\w+(/[\w+.-]+)?(:[\d*]+(\.[\d*]+){2})?", name):
        raise UserError(
            f"data.name='tfds:{name}' is no name of a set; write tfds:NAME, "
            "tfds:NAME/CONFIG or either with :VERSION after it, as :1.0.0"
        )
    tfds = import_tfds()
    where = os.path.expanduser(data_dir) or default_data_dir()
    try:
        # Not tfds.builder, which would look for code that can prepare the set.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=where)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"data.name='tfds:{name}' is not in {where}{_others(name, where)}; "
            f"{_how_to_prepare(name.partition(':')[0], data_dir)}, or give the folder "
            "it is in with --config.data.path=DIR"
        ) from error
    # Its description may be damaged, or have features that this TFDS does not know.
    except Exception as error:
        raise UserError(
            f"data.name='tfds:{name}' in {where} cannot be read "
            f"({one_line(error)}); delete it and prepare it again"
        ) from error
    formats = {known.value for known in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{builder.data_dir} holds {' and '.join(sorted(formats)) or 'no'} files, "
            "and without TensorFlow only array_record can be read; prepare it in "
            f"another folder by {by_tensorflow(name.partition(':')[0], 'DIR')}"
        )
    return builder


def _others(name: str, where: str) -> str:
    """Name the configurations or versions that there are, one of which may be meant."""
    folder = Path(where, re.split("[/:]", name)[0])
    found = sorted(
        path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and not path.name.startswith((".", "incomplete."))
    )
    return f" (in {folder} there is {', '.join(found)})" if found else ""


def by_tensorflow(name: str, data_dir: str = "") -> str:
    """Return the command that prepares one of TFDS' own sets.

    Not `tfds build`, which also wants apache_beam and mlcroissant.
    """
    at = f"data_dir='{data_dir}', " if data_dir else ""
    return (
        '`python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', {at}file_format='array_record')"
        '.download_and_prepare()"` with tensorflow and importlib_resources installed'
    )


def _how_to_prepare(name: str, data_dir: str) -> str:
    kind = name.partition("/")[0]
    if kind in OURS:
        path = " --path=PATH" if kind in ("bytes", "images") else ""
        at = f" --data_dir={data_dir}" if data_dir else ""
        command = f"python -m sparse_flax.data.prepare --name={name}{path}{at}"
        return f"prepare it by `{command}`"
    return f"if it is one of TFDS' own, prepare it by {by_tensorflow(name, data_dir)}"


def _is_stream(feature: Any) -> bool:
    if not isinstance(feature, import_tfds().features.Tensor):
        return False
    text = feature.shape == () and feature.np_dtype in (np.object_, np.str_, np.bytes_)
    return text or (len(feature.shape) == 1 and feature.np_dtype == np.uint8)


def _is_image(feature: Any) -> bool:
    features = import_tfds().features
    return (
        isinstance(feature, features.Tensor | features.Image)
        and feature.np_dtype == np.uint8
        and len(feature.shape) == 3
        and None not in feature.shape
    )


def _choose(
    builder: Any, what: str, fits: Callable[[Any], bool], preferred: str
) -> str:
    """Return the name of the one feature that fits, or of the preferred one."""
    features = builder.info.features
    # A set may also be a single feature without a name.
    named = isinstance(features, import_tfds().features.FeaturesDict)
    names = sorted(features) if named else []
    found = [name for name in names if fits(features[name])]
    if preferred in found:
        return preferred
    if len(found) == 1:
        return found[0]
    set_name = builder.info.full_name
    if not found and fits is _is_stream and any(_is_image(features[n]) for n in names):
        raise UserError(
            f"{set_name} is a set of images; say so with --config.data.kind=image and "
            "their height with --config.data.size, as configs/images.py does"
        )
    raise UserError(
        f"{set_name} is not a set of {what}: one feature of the kind is needed, or one "
        f"called {preferred!r}, and of its features "
        f"({', '.join(names) or 'one without a name'}) "
        f"{', '.join(found) or 'none'} would do; take another set"
    )


def _fits_in_memory(builder: Any, size: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"{builder.info.full_name} has a split of {size:,} bytes, which is read "
            f"into memory, of which there are {memory:,}; take a smaller set or a "
            "larger machine"
        )


def _records(builder: Any, split: str, feature: str) -> Iterator[Any]:
    """Yield one feature of each record, in the order in which they are stored."""
    size = int(builder.info.splits[split].num_bytes)  # TFDS' own type, which adds less
    _fits_in_memory(builder, size)
    source = builder.as_data_source(split)
    shown = size > _SHOWN
    label = f"reading {builder.info.full_name} {split}"
    progress = archives.Progress(label, size, sys.stderr)
    try:
        for record in source:
            yield record[feature]
            if shown:
                progress.advance(size / len(source))
    except ImportError as error:
        raise UserError(
            f"{builder.data_dir} holds what only TensorFlow can decode ({error}); "
            "pip install tensorflow"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{builder.data_dir} is damaged ({one_line(error)}); delete "
            "it and prepare the set again"
        ) from error
    if shown:
        progress.finish()


def _pieces(builder: Any, read: Callable[[str], np.ndarray], carve: bool) -> Pieces:
    """Read the three splits, and take those that the set lacks from train's end."""
    name, splits = builder.info.full_name, builder.info.splits
    chosen = {
        piece: next((split for split in names if split in splits), "")
        for piece, names in ALIASES.items()
    }
    if not chosen["train"]:
        raise UserError(
            f"{name} has no split called 'train', only {', '.join(splits) or 'none'}; "
            "take another set"
        )
    parts = {piece: read(split) for piece, split in chosen.items() if split}
    missing = [piece for piece in chosen if piece not in parts]
    train, notices = parts["train"], []
    if missing and not carve:
        parts |= dict.fromkeys(missing, train[:0])
    elif missing:
        cut, percent = carved(train, missing)
        parts |= cut
        notices.append(
            f"{name} has no split for {' and '.join(missing)}, so the last "
            f"{percent}% of its train split are held out for that"
        )
    if unread := sorted(set(splits) - set(chosen.values())):
        notices.append(f"{name}: not read is {', '.join(unread)}")
    source = f"tensorflow-datasets {name}, {builder.data_dir}"
    return Pieces(source=source, **parts, notice="; ".join(notices))
