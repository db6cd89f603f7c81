"""Print the estimated time of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from rlad_megatron.config import RunConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.plan.advice import differences
from rlad_megatron.plan.lengths import Lengths, expected_lengths
from rlad_megatron.plan.plan import Plan
from rlad_megatron.plan.rates import Rates, rates_for
from rlad_megatron.plan.split import best_split
from rlad_megatron.plan.time import StepTime, step_time

ROWS = {
    "time/rollout": "trainer waits for rollouts",
    "time/teacher": "teacher",
    "time/update": "update",
    "time/weight_sync": "weight sync",
    "time/checkpoint": "checkpoint, a step's share",
}


class Estimate(NamedTuple):
    """The time of a plan, and of the best split of its GPUs if there are others."""

    time: StepTime
    lengths: Lengths
    rates: Rates
    best: tuple[RunConfig, StepTime, int] | None


def estimate(plan: Plan, responses: str, bench: Sequence[Path]) -> Estimate | None:
    """None for a plan that does not fit, and on CPUs without `bench`. Arguments: as on the command line.

    Raises:
        ConfigError: one of them cannot be used.
    """
    config = plan.config
    if not config.generates:
        if responses or bench:
            raise ConfigError(
                f"objective.name={config.objective.name} samples no responses, so no time is estimated; leave out "
                "--responses and --bench"
            )
        return None
    if not (bench or config.train.gpus_per_node):
        if responses:
            raise ConfigError(
                f"--responses={responses}: a run on CPUs (train.gpus_per_node=0) has no time without measured rates; "
                "give --bench FILE too, of `rlad bench`"
            )
        return None
    lengths, rates = expected_lengths(config, responses), rates_for(config, bench)
    if plan.shortage:
        return None
    return Estimate(step_time(plan, lengths, rates), lengths, rates, best_split(plan, lengths, rates))


def print_time(plan: Plan, found: Estimate, console: Console) -> None:
    """A table of seconds and idle shares, then what they assume and the best split."""
    time, config = found.time, plan.config
    device = "GPU" if config.train.gpus_per_node else "rank"
    table = Table(title=f"Time of a step, estimated ({config.schedule})", title_justify="left")
    table.add_column("What")
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("Idle")
    table.add_column("share", justify="right", no_wrap=True)
    idle = [(name.removeprefix("idle/"), f"{share:.0%}") for name, share in time.idle.items()]
    rows = [(label, _seconds(time.times[name])) for name, label in ROWS.items() if time.times[name] >= 0.005]
    for number, row in enumerate(rows):
        table.add_row(*row, *(idle[number] if number < len(idle) else ("", "")))
    hour = f"{time.tokens_per_hour:,.0f} tokens per {device}-hour"
    table.add_row("step", _seconds(time.times["time/step"]), hour, "", style="bold")
    console.print(table)
    console.print(f"Counted with {found.lengths}.", soft_wrap=True)
    console.print(f"Rates: {found.rates.source}. docs/planning.md says what is assumed.", soft_wrap=True)
    if found.best:
        console.print(_split(config, found), soft_wrap=True)


def _split(config: RunConfig, found: Estimate) -> str:
    assert found.best is not None
    best, time, count = found.best
    fields = " ".join(differences(config, best))
    if not fields:
        return f"Of {count} splits of these GPUs that fit, this one has the most tokens per GPU-hour (estimated)."
    return (
        f"Of {count} splits of these GPUs that fit, most tokens per GPU-hour (estimated): {fields}; "
        f"{time.tokens_per_hour:,.0f}, a step of {_seconds(time.times['time/step'])} s"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"
