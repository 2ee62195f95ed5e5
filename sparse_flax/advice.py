"""What to change where a train step does not fit, tried by compiling it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from sparse_flax.devices import FRACTION_VARIABLE, Budget
from sparse_flax.memory import Compiled, gib, state_bytes

Measure = Callable[[ConfigDict, str], Compiled]
Changes = dict[str, Any]


def what_to_change(
    config: ConfigDict, budget: Budget, compiled: Compiled, measure: Measure
) -> str:
    """Return a sentence with what makes a configuration fit, if anything here does.

    In this order, each added to those before it: more of a GPU's memory, recomputation
    of everything, micro-batches, a smaller batch. The first costs nothing, the next two
    cost time, and the last makes it another experiment.

    Args:
      config: finalized, and too large.
      budget: of the device.
      compiled: what `config` needs.
      measure: compiles a configuration, and says what it tries.
    """
    limit, setting = float(budget.usable), ""
    if budget.highest > limit:
        # Two digits, rounded down, but for what bytes being whole has taken off.
        share = math.floor(100 * budget.highest / budget.total + 1e-6) / 100
        limit, setting = share * budget.total, f"{FRACTION_VARIABLE}={share}"
    flags: Changes = {}
    changed, needs = config, compiled
    rungs = iter(_rungs(config))
    while needs.total > limit:
        rung = next(rungs, None)
        if rung is None:
            return _beyond(changed, flags, needs, limit)
        flags, changed, needs = _mildest(config, rung, limit, measure)
    if needs.total <= budget.usable:
        limit, setting = budget.usable, ""  # the flags alone are enough
    options = " ".join([setting, *_written(flags)]).strip()
    return f"what fits: {options} (then {gib(needs.total)} of {gib(limit)})"


def _rungs(config: ConfigDict) -> Iterator[list[Changes]]:
    """Yield changes of one kind after the other, each kind from mild to severe."""
    train, mesh, full = config.train, config.mesh, {}
    if config.model.remat != "full":
        full = {"model.remat": "full"}
        yield [full]
    rows = train.batch_size // (mesh.data * mesh.fsdp)
    divisors = [n for n in range(2, rows + 1) if rows % n == 0]
    more = [n for n in divisors if n > train.accumulate]
    if more:
        yield [full | {"train.accumulate": n} for n in more]
    whole = {"train.accumulate": 1} if train.accumulate > 1 else {}
    if divisors:
        yield [full | whole | {"train.batch_size": train.batch_size // n}
               for n in divisors]  # fmt: skip


def _mildest(
    config: ConfigDict, rung: list[Changes], limit: float, measure: Measure
) -> tuple[Changes, ConfigDict, Compiled]:
    """Find the first of a rung that fits, by bisection; the last if none does."""
    found = {}

    def fits(place: int) -> bool:
        changed = ConfigDict(config.to_dict())
        changed.update_from_flattened_dict(rung[place])
        what = " ".join(f"{name}={value}" for name, value in rung[place].items())
        found[place] = changed, measure(changed, what)
        return found[place][1].total <= limit

    low, high = 0, len(rung) - 1
    if fits(high):
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return rung[high], *found[high]


def _beyond(config: ConfigDict, flags: Changes, needs: Compiled, limit: float) -> str:
    """Say what is left to do where the severest changes are not enough."""
    tried = " ".join(_written(flags)) or "the smallest batch"
    begin = f"even {tried} needs {gib(needs.total)} of {gib(limit)}"
    state = sum(state_bytes(config).values())
    rest, width, heads = needs.total - state, config.model.width, config.model.heads
    for n in range(2, width + 1):
        fsdp = n * config.mesh.fsdp
        if width % math.lcm(fsdp, heads) == 0 and state / n + rest <= limit:
            rows = config.mesh.data * fsdp
            return (
                f"{begin}; --config.mesh.fsdp={fsdp} divides parameters, gradients, "
                f"optimizer and averages over {n} times as many devices, and then "
                f"about {gib(state / n + rest)} are needed (an estimate, not compiled; "
                f"train.batch_size must be a multiple of {rows})"
            )
    return (
        f"{begin}; of these, {gib(rest)} are activations and attention, which more "
        "devices along mesh.fsdp do not divide, but along mesh.context do; those, a "
        "smaller model.context or model.width or a larger device are needed"
    )


def _written(flags: Changes) -> list[str]:
    return [f"--config.{name}={value}" for name, value in flags.items()]
