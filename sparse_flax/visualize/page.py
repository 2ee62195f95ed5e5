"""A figure as a PNG, or as an HTML page that stands alone."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from sparse_flax.errors import UserError
from sparse_flax.workdir import write_atomically

SUFFIXES = (".png", ".html")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em }}
img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
<p>{caption}</p>
<img alt="{title}" src="data:image/png;base64,{png}">
</html>
"""


def check_output(name: str) -> Path:
    """Return the path of what is to be written.

    Raises UserError if it can be no file of ours.
    """
    path = Path(name).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"--output={name} must end in {' or '.join(SUFFIXES)}; try "
            f"{path.with_suffix('.png')}"
        )
    if not path.parent.is_dir():
        raise UserError(
            f"--output={name} is in no folder that exists; make {path.parent} first"
        )
    return path


def save(figure: Figure, path: Path, title: str, caption: str, dpi: int = 120) -> None:
    """Write a figure, in what the path's suffix says.

    Raises UserError if the system refuses.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi, facecolor="white")
    content = image.getvalue()
    if path.suffix == ".html":
        page = PAGE.format(
            title=html.escape(title),
            caption=html.escape(caption),
            png=base64.b64encode(content).decode(),
        )
        content = page.encode()
    write_atomically(path, content)
