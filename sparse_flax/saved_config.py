"""The configuration of a run, as a config file: --config=.../saved_config.py:WORKDIR.

`main.py` gives it where --mode=eval or sample is given no --config, so that options on
the command line change what the run was trained with.
"""

from ml_collections import ConfigDict

from sparse_flax.config import defaults, flatten
from sparse_flax.workdir import RunFolder


def get_config(workdir: str) -> ConfigDict:
    """Return what the run in `workdir` was last trained with.

    An option that is newer than the run has its default.

    Raises:
      UserError: there is no run.
    """
    saved, config = flatten(RunFolder(workdir).saved()["config"]), defaults()
    for name, default in flatten(config.to_dict()).items():
        value = saved.get(name, default)
        # JSON has no tuples.
        value = tuple(value) if isinstance(value, list) else value
        config.update_from_flattened_dict({name: value})
    return config
