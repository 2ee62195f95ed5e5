"""The configuration of a run, as a config file: --config=.../saved_config.py:WORKDIR.

Or of an exported model, saved_config.py:model:FOLDER. `main.py` gives it where a mode
of a run is given no --config, so that options on the command line change what the run
was trained with.
"""

from pathlib import Path

from ml_collections import ConfigDict

from sparse_flax import exported
from sparse_flax.config import completed
from sparse_flax.workdir import RunFolder

MODEL = "model:"


def get_config(folder: str) -> ConfigDict:
    """Return what the run or model in a folder was last trained with.

    Raises:
      UserError: there is none.
    """
    model = folder.removeprefix(MODEL)
    record = exported.record(Path(model).expanduser()) if model != folder else None
    record = record or RunFolder(folder).saved()
    return completed(record["config"])
