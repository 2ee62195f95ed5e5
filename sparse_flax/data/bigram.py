"""The score of a bigram table: a model that does worse has not learned anything."""

import numpy as np

_CHUNK = 1 << 20
_PRIOR = 16.0


def bigram_bits_per_byte(train: np.ndarray, held_out: np.ndarray) -> float:
    """Fit a table of byte pairs on one array and score another with it.

    The table is smoothed towards single bytes, and those towards uniform ones (a
    Dirichlet prior, MacKay and Peto 1995), so that no byte has probability zero:

      p(b) = (count(b) + 1) / (N + 256)
      p(b | a) = (count(ab) + 16 p(b)) / (count(a followed by any) + 16)

    Args:
      train: uint8 [N].
      held_out: uint8 [M], M > 0; its first byte is scored by p(b).

    Returns:
      Mean bits per byte of held_out.
    """
    pairs = _pair_counts(train)
    # Each byte is the second of some pair, except the first.
    singles = pairs.sum(axis=0)
    singles[train[:1]] += 1
    unigram = (singles + 1) / (train.size + 256)
    bigram = (pairs + _PRIOR * unigram) / (pairs.sum(axis=1, keepdims=True) + _PRIOR)
    bits = -np.log2(unigram[held_out[0]])
    bits -= np.sum(_pair_counts(held_out) * np.log2(bigram))
    return float(bits / held_out.size)


def _pair_counts(data: np.ndarray) -> np.ndarray:
    """Count neighbours in uint8 [N]: int64 [256, 256], first byte by second byte."""
    counts = np.zeros(256 * 256, np.int64)
    # In chunks, because bincount widens its argument eightfold.
    for start in range(0, data.size - 1, _CHUNK):
        chunk = data[start : start + _CHUNK + 1].astype(np.uint16)
        counts += np.bincount(chunk[:-1] << 8 | chunk[1:], minlength=256 * 256)
    return counts.reshape(256, 256)
