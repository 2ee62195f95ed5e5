"""Images in .npy files: a file of them, or a folder with a file for each split."""

from pathlib import Path

import numpy as np

from sparse_flax.data.split import SPLITS, carve
from sparse_flax.errors import UserError


def read(root: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Map the images of each split, and where there are some their labels.

    Args:
      root: a file, which is split 90/5/5 in order; or a folder with train.npy, and if
        there are any validation.npy and test.npy, and train_labels.npy and so on.

    Returns:
      For each split that there is uint8 [N, H, W, C], and int64 [N] or nothing.

    Raises:
      UserError: a file cannot be read, or what they hold does not fit together.
    """
    if root.is_file():
        images_NHWC = array(root, np.uint8, 4)
        (splits, _), labels = carve(images_NHWC), {}
    else:
        files = {split: root / f"{split}.npy" for split in SPLITS}
        files = {k: file for k, file in files.items() if k == "train" or file.exists()}
        splits = {split: array(file, np.uint8, 4) for split, file in files.items()}
        named = {split: root / f"{split}_labels.npy" for split in files}
        labels = (
            {split: array(file, np.integer, 1) for split, file in named.items()}
            if any(file.exists() for file in named.values())
            else {}
        )
    first = splits["train"].shape[1:]
    for split, part in splits.items():
        if part.shape[1:] != first or not part.size:
            raise UserError(
                f"{root} has images of shape {part.shape} in {split}, and each split "
                f"needs one or more of the shape {first} of train; give such arrays"
            )
        if labels and len(labels[split]) != len(part):
            raise UserError(
                f"{root} has {len(labels[split]):,} labels for the {len(part):,} "
                f"images in {split}; give as many"
            )
    return splits, {split: part.astype(np.int64) for split, part in labels.items()}


def array(path: Path, dtype: type, dimensions: int) -> np.ndarray:
    """Map a .npy file of uint8 [N, H, W, C], or of integers [N].

    Raises UserError if it holds anything else.
    """
    needed = "uint8 [N, H, W, C]" if dimensions == 4 else "integers [N]"
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give a .npy file of {needed}"
        ) from error
    if not isinstance(mapped, np.ndarray) or not (
        np.issubdtype(mapped.dtype, dtype) and mapped.ndim == dimensions
    ):
        what = (
            f"{mapped.dtype} {mapped.shape}" if hasattr(mapped, "dtype") else "an .npz"
        )
        raise UserError(f"{path} holds {what}; give a .npy file of {needed}")
    return mapped.view(np.ndarray)
