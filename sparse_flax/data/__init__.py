"""Where sequences come from, and how they become batches.

- `sources.py`: loads whatever a configuration names.
- `bytes.py`: reads a stream of bytes and splits it.
- `images.py`: reads images, each a sequence of its own: from `cifar.py` (CIFAR-10's
  files), `resized.py` (ImageNet's npz batches), `arrays.py` (.npy), `pictures.py`
  (files of any format and size).
- `audio.py`: reads recordings as a stream of mu-law bytes.
- `split.py`: what the splits are called, and how they are cut from one array.
- `folder.py`: splits a folder of pictures or recordings, and keeps what was read.
- `archives.py`: finds, downloads and checks the benchmarks that `bytes.py` reads.
- `prepare.py`: a command that stores bytes or images as tensorflow-datasets does.
- `builders.py`: what tensorflow-datasets (TFDS) is told about such sets.
- `prepared.py`: reads sets that TFDS has prepared, these or any others.
- `batches.py`: makes batches that depend on (seed, step) alone.
- `bigram.py`: the score of a bigram table, a baseline that any model should beat.

A new stream of bytes goes into `bytes.load`, as one more name; if it is a single file
in a zip on the web, one more row of `archives.ARCHIVES` is enough. Other data get a
file of their own here, which makes `bytes.Splits`: of streams, uint8 [N], or of
sequences that belong together, [N, T]; a name in `config_checks.KINDS`, for images of
one size also in `SIZES` there; and a line in `sources.load`, or for images in
`images.load`.
"""
