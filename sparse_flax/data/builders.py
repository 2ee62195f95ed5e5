"""What tensorflow-datasets (TFDS) stores for us: bytes in order, and images.

Imports TFDS at once, so import this late. Every set is written as array_record and with
features that need no TensorFlow, and keeps the order that it is given in. The builders
are not registered: TFDS reads what they wrote from the files, with no need of arrays.
"""

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sparse_flax.data import archives

RECORD = 1 << 20  # bytes of a stream in one record
_SHARD = 1 << 28  # bytes of a file, about
_BATCH = 1 << 24  # bytes that are written at a time, about


class _Arrays(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Store arrays, one for each split.

    Args:
      splits: for each split uint8 [N] or [N, H, W, C].
      kwargs: data_dir and config, as TFDS has them.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = ""
    # Nothing is downloaded by TFDS, and to look for checksums of downloads it imports
    # importlib_resources, which it does not require.
    url_infos: Mapping[str, Any] = {}

    def __init__(self, *, splits: Mapping[str, np.ndarray], **kwargs: Any):
        self._splits = splits
        size = sum(part.size for part in splits.values())
        super().__init__(file_format="array_record", **kwargs)
        label = f"writing {self.info.full_name}"
        self._progress = archives.Progress(label, size, sys.stderr)

    def _describe(self, **features: Any) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._splits}

    def _download_and_prepare(
        self, dl_manager: Any, download_config: Any = None
    ) -> None:
        """Write records as they come, in order.

        TFDS' own way is to sort all of a split in memory, and from 1 GB on in files
        that only TensorFlow can write.
        """
        del download_config
        largest = max(self._record_size(part) for part in self._splits.values())
        info = self._info()  # of its own, because data_dir is a temporary one just now
        writer = tfds.core.SequentialWriter(
            info,
            max_examples_per_shard=-(-_SHARD // largest),
            file_format="array_record",
        )
        for split, records in self._split_generators(dl_manager).items():
            writer.initialize_splits([split])
            # Several at a time, because each time the description is written, too.
            several = -(-_BATCH // largest)
            while batch := [record for _, record in itertools.islice(records, several)]:
                writer.add_examples({split: batch})
        writer.close_all()
        self._progress.finish()
        self.info.set_splits(info.splits)

    def write(self) -> None:
        """Write the set, unless its folder is there: whole or not at all."""
        tfds.disable_progress_bar()  # There is one of our own.
        with contextlib.redirect_stdout(io.StringIO()):
            self.download_and_prepare()


class Bytes(_Arrays, skip_registration=True):  # type: ignore[call-arg]
    """A stream of bytes in records of 1 MiB, the last of each split shorter."""

    DESCRIPTION = "A stream of bytes: the records of a split one after the other."

    def _record_size(self, data: np.ndarray) -> int:
        return min(RECORD, data.size)

    def _info(self) -> tfds.core.DatasetInfo:
        # As bytes, because TFDS stores a plain uint8 tensor as a list of int64.
        stored = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
        return self._describe(bytes=stored)

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        data = self._splits[split]
        for start in range(0, data.size, RECORD):
            record = data[start : start + RECORD]
            yield start // RECORD, {"bytes": record}
            self._progress.advance(record.size)


class Enwik8(Bytes, skip_registration=True):  # type: ignore[call-arg]
    """The first 100,000,000 bytes of a dump of the English Wikipedia."""

    DESCRIPTION = "The first 100,000,000 bytes of the English Wikipedia of 2006-03-03."


class Text8(Bytes, skip_registration=True):  # type: ignore[call-arg]
    """The first 100,000,000 characters of that dump's text, cleaned."""

    DESCRIPTION = "The first 100,000,000 characters of fil9, cleaned from Wikipedia."


class Images(_Arrays, skip_registration=True):  # type: ignore[call-arg]
    """Images of one shape, with integer labels where there are some.

    Args:
      labels: for each split int64 [N], or empty.
    """

    DESCRIPTION = "Images of one shape, in the order of the arrays they come from."

    def __init__(self, *, labels: Mapping[str, np.ndarray], **kwargs: Any):
        self._labels = labels
        super().__init__(**kwargs)

    def _record_size(self, images_NHWC: np.ndarray) -> int:
        return images_NHWC[0].size

    def _info(self) -> tfds.core.DatasetInfo:
        shape_HWC = next(iter(self._splits.values())).shape[1:]
        # Not an Image, whose encoding as PNG needs TensorFlow.
        features = {
            "image": tfds.features.Tensor(
                shape=shape_HWC, dtype=np.uint8, encoding="bytes"
            )
        }
        if self._labels:
            features["label"] = tfds.features.Tensor(shape=(), dtype=np.int64)
        return self._describe(**features)

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for i, image_HWC in enumerate(self._splits[split]):
            record = {"image": np.asarray(image_HWC)}
            if self._labels:
                record["label"] = self._labels[split][i]
            yield i, record
            self._progress.advance(image_HWC.size)
