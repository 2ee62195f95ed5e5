"""One picture file, of whatever size and colours, as a square of bytes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sparse_flax.data.folder import BadFileError
from sparse_flax.errors import one_line

# Not all that Pillow reads: for some formats it starts other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
LARGEST = 100_000_000  # pixels: more is taken for a decompression bomb


def read(path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """Decode a picture, cut its middle square and scale it.

    It is turned upright as its camera says, and what is transparent lies over white.

    Args:
      path: of a file; what it is, is decided by its content.
      size: height and width to scale to.

    Returns:
      uint8 [size, size, 3], red, green, blue; and remarks on what had to be changed.

    Raises:
      BadFileError: it is no picture, damaged, animated, too large, or has colours of
        more than 8 bits.
    """
    try:
        length = path.stat().st_size
        if not length:
            raise BadFileError("is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # There is a limit of our own.
            with Image.open(path, formats=FORMATS) as image:
                return _convert(image, size)
    except UnidentifiedImageError:
        raise BadFileError("is not a picture that can be read") from None
    except Image.DecompressionBombError as error:
        raise BadFileError(f"is too large ({error})") from None
    except BadFileError:
        raise
    # Decoders raise what they like, SyntaxError among it.
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise BadFileError(f"is damaged ({reason})") from None


def _is_deep(tile: tuple) -> bool:
    """Whether Pillow would drop half of 16 bits: only a decoder's arguments say so."""
    codec, _, _, arguments = tile
    if not isinstance(arguments, tuple):
        return "16" in str(arguments)
    if codec == "ppm" and arguments[1] > 255:
        return True
    return "16" in str(arguments[0]) if arguments else False


def _convert(image: Image.Image, size: int) -> tuple[np.ndarray, list[str]]:
    width, height = image.size
    if width * height > LARGEST:
        raise BadFileError(
            f"has {width:,} x {height:,} pixels, and {LARGEST:,} in all are the most "
            "that are read"
        )
    tiles = getattr(image, "tile", [])
    if any(map(_is_deep, tiles)) or image.mode.startswith(("I", "F")):
        raise BadFileError("has colours of more than 8 bits; save it with 8")
    # Phones put a preview or a second view behind the picture: that format is MPO.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadFileError("holds several pictures; save one of them")
    image.load()
    remarks = []
    if min(width, height) < size:
        remarks.append(f"smaller than {size} x {size}, which are enlarged")
    if image.mode in ("1", "L", "LA"):
        remarks.append("without colours, which are read as grey ones")
    elif image.mode in ("P", "PA"):
        remarks.append("with a palette, whose colours are read")
    elif image.mode not in ("RGB", "RGBA"):
        remarks.append(f"of mode {image.mode}, which are turned into RGB")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:  # type: ignore[misc, operator]
            remarks.append("that are partly transparent, which are laid over white")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    # First cut, then scaled: resize's `box` would mix in what lies beside it.
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)), remarks
