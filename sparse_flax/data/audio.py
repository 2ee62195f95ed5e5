"""Sound as bytes: a folder of recordings, mono, mu-law, 12 kHz."""

import numpy as np

_MU = 255.0


def mulaw_encode(samples: np.ndarray) -> np.ndarray:
    """Compress samples in [-1, 1] to 256 levels (paper, section 7.4; ITU-T G.711's law).

    Args:
      samples: float32 [...]; what is beyond -1 or 1 is clipped.

    Returns:
      uint8 [...]: 255 * (f(x) + 1) / 2, rounded, of the continuous law with mu = 255,
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
