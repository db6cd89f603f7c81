"""`rlad bench --servers-only`: decoding by one rollout server, without a trainer."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from rlad_megatron.config import RunConfig
from rlad_megatron.config.bench import DECODE, PREFILL, REQUEST, SERVERS_RESULT, WARM_UP, decode_lengths
from rlad_megatron.observe.bench_result import machine, medians, rounds_of, write_result
from rlad_megatron.servers.decoding import measure_decoding


def bench_servers(config: RunConfig) -> None:
    """Measure one rollout server without a trainer; print, and write SERVERS_RESULT. Needs no process group."""
    steps = measure_decoding(config)[WARM_UP:]
    rounds, figures = rounds_of(steps), medians(steps)
    context, tokens = decode_lengths(config.rollout.sampling.max_tokens)
    found = {"figures": figures, "rounds": rounds, "samples": {"context": context, "tokens": tokens}}
    write_result(config.run_dir / SERVERS_RESULT, found | {"machine": machine()})
    title = f"A rollout server, {context} tokens in the cache for each response"
    table = Table(Column(), Column(justify="right"), title=title, title_justify="left", show_header=False)
    table.add_row("prompts, tokens/s", f"{figures.pop(PREFILL):,.0f}")
    table.add_row("a prompt alone, ms besides its tokens", f"{1e3 * figures.pop(REQUEST):.2f}")
    for name, seconds in figures.items():
        count = int(name.removeprefix(DECODE))
        table.add_row(f"{count} responses, ms of a step", f"{1e3 * seconds:.2f}")
        table.add_row(f"{count} responses, tokens/s", f"{count / seconds:,.0f}")
    Console(highlight=False).print(table)
