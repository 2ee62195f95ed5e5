"""Sound as bytes: a folder of recordings, mono, 12 kHz, mu-law (section 7.4).

The recordings are decoded and resampled once, piece by piece, into the cache that
`folder.py` describes, a byte for each sample and one recording after the other.

The paper does not say how its music was split. Here, with 20 recordings or more, each
is in one split as a whole, drawn by a hash of its name, so that nothing of what is
scored was heard before. With fewer, a split would be one recording or two, unlike the
others, and so each recording is itself cut: its first 90% train, the next 5% validate,
the last 5% test. Sub-folders train, validation and test go before both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from sparse_flax.data import bytes as byte_data
from sparse_flax.data import folder
from sparse_flax.data.bytes import Splits
from sparse_flax.data.folder import BadFileError, Store
from sparse_flax.data.split import PERCENTS, SPLITS
from sparse_flax.errors import UserError, one_line

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus")
FEW = 20  # recordings: below, each is cut into the three splits
LONGEST = 100 * 3600  # seconds: what says that it is longer is taken for a mistake
RATES = (1_000, 768_000)  # samples a second of what is read
_CLIPPED = 0.01  # of the samples: more is taken for another scale than [-1, 1]
_BLOCK = 1 << 18  # samples read at a time
_PIPED = 2**32 - 1  # bytes of a WAV, says a program that writes one into a pipe
_UNKNOWN = 2**62  # samples, or more: libsndfile's for a FLAC that was piped
_FIRST_FRAME = 1 << 12  # bytes of an MP3 in which the first frame is, padding before it
_LENGTH_GUESSED = (
    "are MP3s that do not say how long they are: an estimate is read, and whether they "
    "are whole is not known"
)
_MU = 255.0


def mulaw_encode(samples: np.ndarray) -> np.ndarray:
    """Compress samples in [-1, 1] to 256 levels by the continuous mu-law, mu = 255.

    Args:
      samples: float32 [...]; what is beyond -1 or 1 is clipped.

    Returns:
      uint8 [...]: 255 * (f(x) + 1) / 2, rounded, with
      f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu). Silence is 128.
    """
    x = np.clip(np.asarray(samples, np.float32), -1, 1)
    f = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.log1p(_MU)
    return np.floor((f + 1) * (_MU / 2) + 0.5).astype(np.uint8)


def mulaw_decode(levels: np.ndarray) -> np.ndarray:
    """Return the samples that levels stand for; `mulaw_encode` gives the levels back.

    Args:
      levels: uint8 [...].

    Returns:
      float32 [...] in [-1, 1].
    """
    f = np.asarray(levels, np.float32) * (2 / _MU) - 1
    return (np.sign(f) * np.expm1(np.abs(f) * np.log1p(_MU)) / _MU).astype(np.float32)


def load(path: str, data_folder: str, rate: int, bad_files: str = "skip") -> Splits:
    """Load a folder of recordings, or a single one.

    Args:
      path: of WAV, FLAC, MP3, Ogg Vorbis or Opus.
      data_folder: data.folder, where the cache is.
      rate: samples a second that they are resampled to.
      bad_files: 'skip' or 'refuse' those that cannot be read to their end.

    Returns:
      Splits of uint8 [N], mu-law.

    Raises:
      UserError: there are none, or too little of them.
    """
    if not path:
        raise UserError(
            "data.path='' is empty but data.name='audio' needs to know what to read; "
            "pass --config.data.path=FOLDER with recordings"
        )
    root = byte_data.existing(path)
    if root.is_file():
        root, found, others, cut = root.parent, [root], 0, True
    else:
        found, others = folder.find(root, SUFFIXES, "recordings")
        cut = len(found) < FEW and not folder.has_splits(root)
    if cut:
        files = {"train": found, "validation": [], "test": []}
    else:
        files = folder.files_by_split(root, found, "recordings")
    total = sum(map(len, files.values()))
    others += len(found) - total  # in none of the sub-folders

    def convert(file: Path, split: str, store: Store) -> list[str]:
        for part, levels in _levels(file, rate, split, cut):
            store.write(part, levels)
        return [] if _says_its_length(file) else [_LENGTH_GUESSED]

    parts, about = folder.read(
        root,
        files,
        convert,
        kind="audio",
        options=["mulaw", rate, cut],
        folder=data_folder,
        bad_files=bad_files,
    )
    good = total - len(about["left_out"])
    minutes = sum(part.size for part in parts) / rate / 60
    said = [folder.notice(about, "recordings", total, others)]
    if cut:
        said.append(
            f"with fewer than {FEW} recordings, each is cut: 90% to train, 5% for "
            "validation, 5% for test"
        )
    source = f"{path} ({good:,} recordings, {minutes:,.1f} minutes at {rate:,} Hz)"
    return byte_data.splits("audio", source, parts, "; ".join(filter(None, said)))


def read(path: Path, rate: int) -> np.ndarray:
    """Return a single recording: uint8 [N], mu-law, `rate` samples a second.

    Raises BadFileError if it is none.
    """
    return np.concatenate([mulaw_encode(part) for _, part in _resampled(path, rate)])


def _levels(
    path: Path, rate: int, split: str, cut: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a recording in pieces, each with its split: uint8 [N], mu-law."""
    size = 0  # samples of the whole at the new rate, which decide the cuts
    start = 0
    for frames, samples in _resampled(path, rate):
        size = frames
        levels = mulaw_encode(samples)
        if not cut:
            yield split, levels
            continue
        cuts = [size * percent // 100 - start for percent in PERCENTS]
        cuts = np.clip(cuts, 0, levels.size)
        yield from zip(SPLITS, np.split(levels, cuts), strict=True)
        start += levels.size


def _resampled(path: Path, rate: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (samples that it will have in all, float32 [N]) of a recording, mono."""
    try:
        if not path.stat().st_size:
            raise BadFileError("is empty")
        with soundfile.SoundFile(path) as file:
            _check(file)
            resampler = soxr.ResampleStream(
                file.samplerate, rate, num_channels=1, dtype="float32", quality="HQ"
            )
            total = round(file.frames * rate / file.samplerate)
            done, loud = 0, 0
            while True:
                block = file.read(_BLOCK, dtype="float32", always_2d=True)
                last = len(block) < _BLOCK
                done += len(block)
                mono = block.mean(axis=1)
                if not np.isfinite(mono).all():
                    raise BadFileError("has samples that are no numbers")
                loud += int((np.abs(mono) > 1).sum())
                samples = resampler.resample_chunk(mono, last=last)
                yield total, samples
                if last:
                    break
            if done != file.frames and _says_its_length(path):
                raise BadFileError(
                    f"ends after {done:,} of {file.frames:,} samples; it is damaged"
                )
            if loud > _CLIPPED * done:
                raise BadFileError(
                    f"has {loud / done:.0%} of its samples beyond -1 and 1; scale it"
                )
    except BadFileError:
        raise
    # libsndfile's own errors are RuntimeErrors, and a file may vanish.
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "error_string", "") or str(error)
        raise BadFileError(
            f"is no recording that can be read ({one_line(reason)})"
        ) from None


def _says_its_length(path: Path) -> bool:
    """Whether a recording says how many samples it has.

    MP3s of some encoders and of radios do not: libsndfile estimates it, from the size
    of the file and the first bit rate.
    """
    if path.suffix.lower() != ".mp3":
        return True
    with path.open("rb") as file:
        start = file.read(10)
        if start[:3] == b"ID3":  # whose size is written in 7 bits of each byte
            size = functools.reduce(lambda n, byte: n << 7 | byte, start[6:], 0)
            file.seek(10 + size)
        else:
            file.seek(0)
        first_frame = file.read(_FIRST_FRAME)
    return any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def _check(file: soundfile.SoundFile) -> None:
    """Refuse what says, or shows, that it is not all there or not to be believed."""
    # libsndfile reads what is left of a file cut short, and says so only in its log.
    log = file.extra_info
    cut_short = re.search(r"^data\s*: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if "lacks an end-of-stream bit" in log:
        raise BadFileError("ends in the middle; it is damaged")
    sizes = [int(size) for size in cut_short.groups()] if cut_short else [0, 0]
    if sizes[0] > sizes[1] and sizes[0] != _PIPED:
        raise BadFileError("is shorter than its header says; it is damaged")
    if not file.frames:
        raise BadFileError("holds no samples")
    if file.frames >= _UNKNOWN:
        raise BadFileError("does not say how long it is; convert it once more")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise BadFileError(f"says that it has {file.samplerate:,} samples a second")
    if file.frames > LONGEST * file.samplerate:
        raise BadFileError(
            f"says that it lasts {file.frames / file.samplerate / 3600:,.0f} hours; "
            "cut it"
        )
