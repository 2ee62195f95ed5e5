"""See it: who sees whom, what a model has learned to look at, and how it learned.

    python -m sparse_flax.visualize masks "Strided(8)" --output=masks.png
    python -m sparse_flax.visualize attention --workdir=runs/quickstart
    python -m sparse_flax.visualize curves runs/one runs/other

and for a notebook the same as functions that return a matplotlib Figure:

    from sparse_flax import trained, visualize
    model, config = trained.load("runs/quickstart")
    visualize.attention(model, b"def main(argv):", layers=[0])

    mask_figure.py        masks: a pattern's mask, by layer and head, and its two steps
    attention_figure.py   attention: learned weights over an image, a text or a sound
    rows.py               attention_rows: those weights, as numbers
    over.py               painting weights over each kind of data
    curve_figure.py       curves: bits against steps, of one run or many
    piece.py              what the command line looks at
    page.py               figures as PNG, or as a page that stands alone
"""

from sparse_flax.visualize.attention_figure import attention
from sparse_flax.visualize.curve_figure import curves
from sparse_flax.visualize.mask_figure import masks
from sparse_flax.visualize.rows import Row, attention_rows

__all__ = ["Row", "attention", "attention_rows", "curves", "masks"]
