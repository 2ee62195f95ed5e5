"""Where sequences come from, and how they become batches.

- `bytes.py`: reads a stream of bytes and splits it.
- `archives.py`: finds, downloads and checks the benchmarks that `bytes.py` reads.
- `prepare.py`: a command that stores bytes or images as tensorflow-datasets does.
- `builders.py`: what tensorflow-datasets (TFDS) is told about such sets.
- `prepared.py`: reads sets that TFDS has prepared, these or any others.
- `batches.py`: cuts a stream into batches that depend on (seed, step) alone.
- `bigram.py`: the score of a bigram table, a floor that any model should beat.

A new stream of bytes goes into `bytes.load`, as one more name; if it is a single file
in a zip on the web, one more row of `archives.ARCHIVES` is enough. Data that is not one
stream, such as pictures, gets a file of its own here, which gives the same batches.
"""
