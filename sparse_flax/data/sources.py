"""Data of every kind, by what a configuration says."""

from ml_collections import ConfigDict

from sparse_flax.data import audio, images
from sparse_flax.data import bytes as byte_data
from sparse_flax.data.bytes import Splits


def load(data: ConfigDict) -> Splits:
    """Load what config.data of a finalized configuration names.

    Raises:
      UserError: the data cannot be had, or are too small.
    """
    if data.kind == "image":
        return images.load(data.name, data.path, data.folder, data.size, data.bad_files)
    if data.kind == "audio":
        return audio.load(data.path, data.folder, data.rate, data.bad_files)
    return byte_data.load(data.name, data.path, data.folder)
