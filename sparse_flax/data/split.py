"""The names of the three splits, and how they are cut from data that have no others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "validation", "test")
# What sources call them, folders as well as sets of TFDS.
ALIASES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}
PERCENTS = (90, 95)  # of all, where validation and test begin


def carve(
    data: np.ndarray, missing: Sequence[str] = SPLITS[1:]
) -> tuple[dict[str, np.ndarray], int]:
    """Cut the splits that are missing from the end of the data, as views.

    Args:
      data: any [N, ...].
      missing: validation, test or both, in this order.

    Returns:
      train and the missing ones, and which percentage of the data these are together.
    """
    percents = PERCENTS[-len(missing) :]
    cuts = [len(data) * percent // 100 for percent in percents]
    names = "train", *missing
    return dict(zip(names, np.split(data, cuts), strict=True)), 100 - percents[0]
