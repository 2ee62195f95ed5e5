"""Batches as a pure function of (seed, step), so that a resumed run repeats nothing.

Of several processes each reads, of every batch, the rows that its own devices hold.
Where the windows lie follows from the seed, whoever asks.
"""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from sparse_flax.errors import UserError
from sparse_flax.model import START


class RandomWindows:
    """A grain source whose record i is batch i: uint8 [B, T] targets.

    As in the paper's own code, an epoch cuts the data from a fresh random offset into
    W = max(1, N // T - 1) windows side by side and visits each once in a fresh random
    order; a batch may end one epoch and begin the next. Images are windows as they are.
    """

    def __init__(
        self,
        data: np.ndarray,
        *,
        batch_size: int,
        context: int,
        seed: int,
        steps: int,
        rows: np.ndarray | None = None,
    ):
        """Describe the batches; nothing is read yet.

        Args:
          data: uint8 [N], or [W, T] of images.
          batch_size: B, windows in a batch.
          context: T, bytes in a window.
          seed: in [0, 2**64); another seed gives other batches.
          steps: the number of batches.
          rows: which rows of each batch to make; by default all.

        Raises:
          UserError: the data is shorter than one window, or the seed is out of range.
        """
        if data.size < context:
            raise UserError(
                f"context={context} is longer than the {data.size} bytes of training "
                f"data; use context={data.size} or less, or give more data"
            )
        if not 0 <= seed < 2**64:
            nearest = 0 if seed < 0 else 2**64 - 1
            raise UserError(f"seed={seed} is not in [0, 2**64); use {nearest}")
        if data.ndim == 2 and data.shape[1] != context:
            raise UserError(
                f"context={context} is not the {data.shape[1]} bytes of an image; use "
                f"context={data.shape[1]}"
            )
        self._data, self._context = data.reshape(-1), context
        self._batch_size, self._seed, self._steps = batch_size, seed, steps
        streams = data.ndim == 1
        self._rows = np.arange(batch_size) if rows is None else rows
        self._windows = max(1, data.size // context - 1) if streams else len(data)

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._steps

    def __getitem__(self, step: int) -> np.ndarray:
        """Return batch number `step`, or its chosen rows: uint8 [B, T]."""
        slack = self._data.size - self._windows * self._context  # 0 of images
        batch_BT = np.empty((len(self._rows), self._context), np.uint8)
        for place, row in enumerate(self._rows):
            window = int(step) * self._batch_size + int(row)
            epoch, position = divmod(window, self._windows)
            offset, order = _epoch(self._seed, epoch, self._windows, slack)
            start = offset + int(order[position]) * self._context
            batch_BT[place] = self._data[start : start + self._context]
        return batch_BT


# Two, because a batch may straddle two epochs.
@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, slack: int) -> tuple[int, np.ndarray]:
    """Draw one epoch's offset in [0, slack] and its order of windows."""
    # Only the raw words of Philox are promised to stay the same in later versions of
    # numpy; Generator.permutation is not.
    key = np.array([seed, epoch], np.uint64)
    words = np.random.Philox(key=key).random_raw(windows + 1)
    order = np.argsort(words[1:], kind="stable")
    order.flags.writeable = False
    return int(words[0]) % (slack + 1), order


def inputs_and_targets(windows_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Turn uint8 [B, T] windows into what the model reads and what it predicts.

    Returns:
      inputs_BT: int32 [B, T], the byte before each target, `START` before the first.
      targets_BT: int32 [B, T], the windows.
    """
    targets_BT = windows_BT.astype(np.int32)
    inputs_BT = np.empty_like(targets_BT)
    inputs_BT[:, 0] = START
    inputs_BT[:, 1:] = targets_BT[:, :-1]
    return {"inputs_BT": inputs_BT, "targets_BT": targets_BT}


def train_batches(
    data: np.ndarray,
    *,
    batch_size: int,
    context: int,
    seed: int,
    start: int,
    steps: int,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches start, ..., steps - 1, as `inputs_and_targets` gives them.

    Batch i is the same whatever `start` is. Arguments and errors are those of
    `RandomWindows`.
    """
    source = RandomWindows(
        data,
        batch_size=batch_size,
        context=context,
        seed=seed,
        steps=steps,
        rows=rows,
    )
    if start >= steps:
        return iter(())
    dataset = grain.MapDataset.source(source)[start:].map(inputs_and_targets)
    # Threads, never processes: a batch costs less than sending it between processes.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset.to_iter_dataset(options))


def evaluation_window_count(
    size: int, context: int, max_windows: int = 0, min_context: int = 0
) -> int:
    """Return how many windows of `context` bytes `evaluation_batches` scores."""
    windows = 1 + max(0, -(-(size - context) // (context - min_context)))
    return min(windows, max_windows) if max_windows > 0 else windows


def evaluation_windows(
    data: np.ndarray, context: int, max_windows: int = 0, min_context: int = 0
) -> list[np.ndarray]:
    """Return the windows that `evaluation_batches` reads, as views of the data."""
    data = data.reshape(-1)
    count = evaluation_window_count(data.size, context, max_windows, min_context)
    shift = context - min_context
    # A selection is made among the full windows, and the whole has all of them.
    available = max(count, (data.size - context) // shift + 1)
    starts = (i * available // count * shift for i in range(count))
    return [data[start : start + context] for start in starts]


def evaluation_batches(
    data: np.ndarray,
    *,
    batch_size: int,
    context: int,
    max_windows: int = 0,
    min_context: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield windows that score every byte of the data exactly once.

    The paper's protocol (table 3): a window begins T - M bytes after the one before,
    and only its last T - M bytes are scored, each of which sees M bytes or more. With
    M = 0 the windows lie side by side. The paper does not say what becomes of the first
    M bytes of all; here the first window scores them too, with what context they have.

    The last window and the last batch are padded with zeros to full shape.

    Args:
      data: uint8 [N], or [W, T] of images, each of which is a window.
      batch_size: B, windows in a batch.
      context: T, bytes in a window.
      max_windows: if positive and fewer than the data has, only that many windows,
        full ones, spread evenly over the data, always the same. The first is then
        scored like the others, as it would weigh too much.
      min_context: M, below T.
      rows: which rows of each batch to read, by default all; the others are zeros.

    Yields:
      What `inputs_and_targets` gives, and weights_BT: float32 [B, T], 1 for a byte to
      score, and 0 for one that is context alone, or padding.
    """
    windows = evaluation_windows(data, context, max_windows, min_context)
    whole = evaluation_window_count(data.size, context, min_context=min_context)
    for first in range(0, len(windows), batch_size):
        windows_BT = np.zeros((batch_size, context), np.uint8)
        weights_BT = np.zeros((batch_size, context), np.float32)
        for row, window in enumerate(windows[first : first + batch_size]):
            begins = first + row == 0 and len(windows) == whole
            if rows is None or row in rows:
                windows_BT[row, : window.size] = window
            weights_BT[row, 0 if begins else min_context : window.size] = 1
        yield inputs_and_targets(windows_BT) | {"weights_BT": weights_BT}
