"""Painting attention weights over what they are of: an image, a text, a sound.

Each painter takes the content once, and then draws into axes the weights that its bytes
got: w_N [N] float32, byte n's at n, with whatever the start got left out.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from matplotlib import mlab
from matplotlib.colors import Normalize, to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from sparse_flax.data import audio

MARK = "#ff7800"  # of the byte that is predicted
SHADE = "#f2a900"  # of text that is looked at
DIM = 0.4  # of what is seen and not looked at
UNSEEN = 0.12  # of what comes later


def highlights(w: np.ndarray) -> np.ndarray:
    """Return the square roots of weights, the greatest as 1: faint ones still show."""
    return np.sqrt(w / max(w.max(initial=0), 1e-30))


class OverImage:
    """White on an image that is dimmed; what is still to be predicted is nearly black.

    A pixel has the weights of its three colours together.
    """

    panel = (1.7, 1.7)  # inches

    def __init__(self, content_N: np.ndarray, position: int):
        self.size = math.isqrt(content_N.size // 3)
        self.image_SSC = content_N.reshape(self.size, self.size, 3) / 255
        self.position = min(position, content_N.size - 1)

    def draw(self, axes, w_N: np.ndarray) -> None:
        """Draw the weights [S * S * 3]."""
        w_SS = w_N.reshape(self.size, self.size, 3).sum(-1)
        h_SS1 = highlights(w_SS)[..., None]
        shown = self.image_SSC * DIM * (1 - h_SS1) + h_SS1
        pixel = self.position // 3
        later = np.arange(self.size**2).reshape(self.size, self.size) > pixel
        shown[later] = self.image_SSC[later] * UNSEEN
        axes.imshow(shown, interpolation="nearest")
        y, x = divmod(pixel, self.size)
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=MARK, lw=1.2)
        )
        axes.set_axis_off()


class OverText:
    """Shaded bytes, in lines; of a long text those next to the position."""

    COLUMNS = 72
    CELL = (0.6, 1.25)  # of a character, in units of the size of the font
    INCHES = 0.085  # that unit

    def __init__(self, content_N: np.ndarray, position: int, shown: int = 1024):
        self.content_N, self.position = content_N, position
        self.first = max(position - shown, 0)
        self.places, self.lines = self._lay_out()
        width, height = self.COLUMNS * self.CELL[0], self.lines * self.CELL[1]
        self.panel = (width * self.INCHES, height * self.INCHES)
        outlines = [
            _moved(_glyph(_character(content_N[n])), x, y)
            for n, (x, y) in self.places.items()
            if n < content_N.size and content_N[n] != ord(" ")
        ]
        outlines = [path for path in outlines if np.size(path.vertices)]
        self.outline = Path.make_compound_path(*outlines) if outlines else None

    def _lay_out(self) -> tuple[dict[int, tuple[float, float]], int]:
        """Return where each byte stands, and how many lines there are."""
        places, column, line = {}, 0, 0
        for n in range(self.first, self.position + 1):
            if column == self.COLUMNS:
                column, line = 0, line + 1
            places[n] = column * self.CELL[0], line * self.CELL[1]
            column += 1
            if n < self.content_N.size and self.content_N[n] == ord("\n"):
                column, line = 0, line + 1
        return places, line + 1

    def draw(self, axes, w_N: np.ndarray) -> None:
        """Draw the weights [N]."""
        width, height = self.CELL
        shade = to_rgb(SHADE)
        for n, h in enumerate(highlights(w_N)):
            if n in self.places and h > 0.02:
                x, y = self.places[n]
                axes.add_patch(
                    Rectangle((x, y), width, height, color=(*shade, h), lw=0)
                )
        x, y = self.places[self.position]
        axes.add_patch(
            Rectangle((x, y), width, height, fill=False, edgecolor=MARK, lw=1.2)
        )
        if self.outline:
            axes.add_patch(PathPatch(self.outline, color="#202020", lw=0))
        axes.set_xlim(-0.2, self.COLUMNS * width + 0.2)
        axes.set_ylim(self.lines * height + 0.2, -0.2)
        axes.set_aspect("equal")
        axes.set_axis_off()

    def before(self, w_N: np.ndarray) -> float:
        """Return the weight of what is not shown."""
        return float(w_N[: self.first].sum())


@functools.cache
def _glyph(character: str) -> Path:
    """Return a character's outline at size 1, downward, its baseline at 0.95."""
    mono = FontProperties(family="DejaVu Sans Mono")
    path = TextPath((0, 0), character, size=1, prop=mono)
    return Path(path.vertices * (1, -1) + (0, 0.95), path.codes)


def _moved(path: Path, x: float, y: float) -> Path:
    return Path(np.add(path.vertices, (x, y)), path.codes)


def _character(byte: int) -> str:
    """Return what stands for a byte: itself, if it is a printable one of ASCII."""
    if byte == ord("\n"):
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    if byte == ord("\t"):
        return "\N{RIGHTWARDS ARROW}"
    return chr(byte) if 32 <= byte < 127 else "\N{MIDDLE DOT}"


class OverSound:
    """White on the spectrogram of a sound; what comes later is nearly black."""

    panel = (3.4, 1.5)
    BINS = 320  # of time, that the weights are added up in

    def __init__(self, content_N: np.ndarray, position: int, rate: int):
        self.position, self.rate = position, rate
        self.seconds = content_N.size / rate
        samples = audio.mulaw_decode(content_N)
        # As many frequencies as moments, about, of what may be a short piece.
        window = 2 ** int(np.clip(math.log2(max(samples.size, 64)) / 2 + 1, 4, 9))
        samples = np.pad(samples, (0, max(window - samples.size, 0)))
        power, _, _ = mlab.specgram(
            samples, NFFT=window, Fs=rate, noverlap=window * 3 // 4
        )
        level = 10 * np.log10(np.asarray(power) + 1e-12)
        dark, light = np.percentile(level, [20, 99.5])
        self.scale = Normalize(dark, light, clip=True)
        self.level = level

    def draw(self, axes, w_N: np.ndarray) -> None:
        """Draw the weights [N]."""
        top = self.rate / 2000
        extent = (0, self.seconds, 0, top)
        image: AxesImage = axes.imshow(
            self.level, origin="lower", aspect="auto", extent=extent, cmap="magma"
        )
        image.set_norm(self.scale)
        bins = min(self.BINS, w_N.size)
        bin_N = np.arange(w_N.size) * bins // w_N.size
        h = highlights(np.bincount(bin_N, w_N, bins))
        middle = (np.arange(bins) + 0.5) * w_N.size / bins
        veil = np.zeros((1, bins, 4))
        veil[..., :3] = np.where(middle > self.position, 0, h)[None, :, None]
        # Black to dim, and white over it.
        veil[..., 3] = np.where(middle > self.position, 1 - UNSEEN, 0.35 + 0.6 * h)
        axes.imshow(
            veil, origin="lower", aspect="auto", extent=extent, interpolation="nearest"
        )
        axes.axvline(self.position / self.rate, color=MARK, lw=1.2)
        axes.set(xlim=(0, self.seconds), ylim=(0, top))
        axes.set_xlabel("seconds", fontsize=6)
        axes.set_ylabel("kHz", fontsize=6)
        axes.tick_params(labelsize=6)


Painter = OverImage | OverText | OverSound


def painter(
    kind: str, content_N: np.ndarray, position: int, rate: int, shown: int
) -> Painter:
    """Return what paints over content of a kind: 'image', 'text' or 'audio'."""
    if kind == "image":
        return OverImage(content_N, position)
    if kind == "audio":
        return OverSound(content_N, position, rate)
    return OverText(content_N, position, shown)
