"""The score of a bigram table: a model that does worse has not learned anything."""

from typing import NamedTuple

import numpy as np

from sparse_flax.data import batches
from sparse_flax.data.bytes import Splits

_CHUNK = 1 << 20
_PRIOR = 16.0
_ENOUGH = 200_000_000  # bytes of images to fit a table on


class Baseline(NamedTuple):
    """A score that a model must be below, in bits, and what made it."""

    bits: float
    what: str


def baseline(splits: Splits, context: int, max_windows: int) -> Baseline:
    """Score the windows of validation that `evaluation_batches` gives by a table.

    Of a stream it is of each byte and the next; of images, of each colour of a pixel
    and the same colour of the next pixel.
    """
    scored = batches.evaluation_windows(splits.validation, context, max_windows)
    train, is_image = splits.train, splits.train.ndim == 2
    if not is_image:
        bits = bigram_bits_per_byte(train, np.concatenate(scored))
        return Baseline(bits, "bigram table")
    some = train[:: -(-train.size // _ENOUGH)]
    return Baseline(bigram_bits_per_byte(some, np.stack(scored), 3), "next-pixel table")


def bigram_bits_per_byte(
    train: np.ndarray, held_out: np.ndarray, lag: int = 1
) -> float:
    """Fit a table of byte pairs on one array and score another with it.

    The table is smoothed towards single bytes, and those towards uniform ones (a
    Dirichlet prior, MacKay and Peto 1995), so that no byte has probability zero:

      p(b) = (count(b) + 1) / (N + 256)
      p(b | a) = (count(ab) + 16 p(b)) / (count(a followed by any) + 16)

    Args:
      train: uint8 [N], or [N, T] of sequences of their own.
      held_out: uint8 [M], or [M, T]; the first bytes of each sequence, those without
        one `lag` before them, are scored by p(b).
      lag: how far apart the two bytes of a pair are.

    Returns:
      Mean bits per byte of held_out.
    """
    train, held_out = np.atleast_2d(train), np.atleast_2d(held_out)
    pairs = _pair_counts(train, lag)
    # Each byte is the second of some pair, except the first ones.
    singles = pairs.sum(axis=0)
    singles += np.bincount(train[:, :lag].reshape(-1), minlength=256)
    unigram = (singles + 1) / (train.size + 256)
    bigram = (pairs + _PRIOR * unigram) / (pairs.sum(axis=1, keepdims=True) + _PRIOR)
    bits = -np.sum(np.log2(unigram[held_out[:, :lag]]))
    bits -= np.sum(_pair_counts(held_out, lag) * np.log2(bigram))
    return float(bits / held_out.size)


def _pair_counts(data_NT: np.ndarray, lag: int) -> np.ndarray:
    """Count pairs `lag` apart in each row: int64 [256, 256], first by second byte."""
    counts = np.zeros(256 * 256, np.int64)
    # In pieces, because bincount widens its argument eightfold.
    rows = max(_CHUNK // data_NT.shape[1], 1)
    for row in range(0, len(data_NT), rows):
        for start in range(0, data_NT.shape[1] - lag, _CHUNK):
            piece = data_NT[row : row + rows, start : start + _CHUNK + lag]
            piece = piece.astype(np.uint16)
            codes = piece[:, :-lag] << 8 | piece[:, lag:]
            counts += np.bincount(codes.reshape(-1), minlength=256 * 256)
    return counts.reshape(256, 256)
