"""Write the bitmaps of an emoji font as pictures, for configs/images.py:small.

    pip install fonttools pillow
    python models/emoji_pictures.py NotoColorEmoji.ttf FOLDER

FOLDER gets train, validation and test with a PNG for each glyph, over white. Glyphs
that begin with the same character, as one person's skin tones do, are in the same
split: 90/5/5 by a hash of that character's name.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image

SIDE = 136  # the wider side of Noto's bitmaps


def main() -> None:
    """Write the pictures of the font sys.argv[1] into the folder sys.argv[2]."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    font, folder = TTFont(sys.argv[1]), Path(sys.argv[2])
    if "CBDT" not in font:
        sys.exit(
            f"{sys.argv[1]} has no bitmaps (no CBDT table): not NotoColorEmoji.ttf"
        )
    bitmaps, begins = font["CBDT"].strikeData[0], first_characters(font)
    counts = {"train": 0, "validation": 0, "test": 0}
    for split in counts:
        (folder / split).mkdir(parents=True, exist_ok=True)
    for name, glyph in bitmaps.items():
        drawn = Image.open(io.BytesIO(glyph.imageData)).convert("RGBA")
        picture = Image.new("RGBA", (SIDE, SIDE), "white")
        left, top = ((SIDE - side) // 2 for side in drawn.size)
        picture.alpha_composite(drawn, (left, top))
        split = split_of(begins.get(name, name))
        picture.convert("RGB").save(folder / split / f"{name}.png")
        counts[split] += 1
    print(", ".join(f"{split}: {count}" for split, count in counts.items()))


def first_characters(font: TTFont) -> dict[str, str]:
    """Return the first character of each glyph that stands for several."""
    return {
        ligature.LigGlyph: first
        for lookup in font["GSUB"].table.LookupList.Lookup
        for table in lookup.SubTable
        for first, ligatures in getattr(table, "ligatures", {}).items()
        for ligature in ligatures
    }


def split_of(name: str) -> str:
    """Return the split of the glyphs that begin with a character."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "train" if share < 0.9 else "validation" if share < 0.95 else "test"


if __name__ == "__main__":
    main()
