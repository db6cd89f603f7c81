"""`rlad generate`: a model's responses to the training prompts, served by vLLM, as traces that `rlad sft` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from rlad_megatron.config import RunConfig
from rlad_megatron.data.knights_and_knaves import opens_thinking
from rlad_megatron.data.prompts import build_prompts, training_questions
from rlad_megatron.data.table import Prompts
from rlad_megatron.data.tokenizers import Question, load_tokenizer
from rlad_megatron.errors import ConfigError
from rlad_megatron.evaluate import serve
from rlad_megatron.models.config_json import read_specs
from rlad_megatron.observe.summary import summary_table
from rlad_megatron.servers.fleet import ServerFleet
from rlad_megatron.servers.sampling import fitting_prompts
from rlad_megatron.servers.stream import Round
from rlad_megatron.trainer.run_state import write_whole
from rlad_megatron.types import Rollout

FOLDER = "generate"  # in the run folder
CHUNK = 32  # prompts that are saved together; the seeds depend on it
Keep = Literal["solved", "all"]


def output_path(config: RunConfig) -> Path:
    """Where the traces go by default."""
    path = Path(config.student.path)
    return config.run_dir / FOLDER / f"{path.parent.name if path.name == 'hf' else path.name}.jsonl"  # runs/NAME/hf


def generate_traces(config: RunConfig, output: Path, keep: Keep, count: int | None) -> None:
    """Write `rollout.group_size` responses of student.path to each training prompt as JSONL.

    Each line has the question as its source has it ("prompt", with the source's template and system message), the
    "response", and "id", "answer", "subset", "sample", "reward", "solved" and "tokens". Responses that were cut off are
    left out: fine-tuning would learn to stop there.

    keep: which of the others to write. count: of prompts, the first ones; None: all. Until the end everything is in
    `output` + ".partial", from which a later call goes on; the result is the same as in one go.

    Raises ConfigError if that file is from another configuration.
    """
    prompts, questions = _prompts(config, count)
    chunks = [range(start, min(start + CHUNK, len(prompts))) for start in range(0, len(prompts), CHUNK)]
    partial = _Partial(output.with_name(f"{output.name}.partial"), _identity(config, len(prompts)))
    done = partial.open(chunks, config.rollout.group_size)
    if done < len(chunks):
        begun = f"{done * CHUNK} of {len(prompts)} prompts are done; " if done else ""
        print(f"{begun}starting the servers of {config.student.path}", flush=True)
        tokenizer, run_dir = load_tokenizer(config.student.path), config.run_dir / FOLDER
        with serve(config, config.student.path, tokenizer, prompts, run_dir) as fleet:
            for groups in _sampled(fleet, config, prompts, chunks, done):
                partial.append([_line(rollout, i, questions) for group in groups for i, rollout in enumerate(group)])
    _finish(partial.lines(), output, keep)
    partial.path.unlink()


def _prompts(config: RunConfig, count: int | None) -> tuple[Prompts, dict[str, Question]]:
    prompts = build_prompts(config.data, load_tokenizer(config.student.path), "train")
    prompts, _ = fitting_prompts(config, read_specs(config), prompts, "train")
    prompts = prompts[:count]
    ids = {prompt.id for prompt in prompts}
    return prompts, {id: question for id, question in training_questions(config.data) if id in ids}


def _identity(config: RunConfig, count: int) -> dict[str, Any]:
    """What a response depends on."""
    data = {name: value for name, value in asdict(config.data).items() if not name.startswith("reward_")}
    rollout = {"group_size": config.rollout.group_size, "sampling": asdict(config.rollout.sampling)}
    path = str(Path(config.student.path).resolve())
    fields = {"student.path": path, "data": data, "rollout": rollout, "train.seed": config.train.seed}
    return json.loads(json.dumps({**fields, "prompts": count}))


class _Partial:
    """The file of what there is so far: what it depends on, then a line for each response, chunk by chunk."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self._identity = path, identity

    def open(self, chunks: Sequence[range], group_size: int) -> int:
        """Begin, or cut off what an interruption left of an unfinished chunk. Returns the number of finished ones."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self._identity) + "\n")
            return 0
        with self.path.open("rb") as file:
            try:
                found = dict(json.loads(file.readline()))
            except (ValueError, TypeError):
                raise ConfigError(f"{self.path} is damaged; delete it, or give another --output") from None
            if changed := [name for name in self._identity if found.get(name) != self._identity[name]]:
                raise ConfigError(
                    f"{self.path} was begun with another {', '.join(changed)}; delete it, or give another --output"
                )
            done, end = 0, file.tell()
            for chunk in chunks:
                lines = [file.readline() for _ in range(len(chunk) * group_size)]
                if not lines[-1].endswith(b"\n"):
                    break
                done, end = done + 1, file.tell()
        with self.path.open("r+b") as file:
            file.truncate(end)
        return done

    def append(self, lines: list[str]) -> None:
        with self.path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def lines(self) -> Iterator[str]:
        with self.path.open() as file:
            next(file)
            yield from file


def _sampled(
    fleet: ServerFleet, config: RunConfig, prompts: Prompts, chunks: Sequence[range], done: int
) -> Iterator[list[list[Rollout]]]:
    """The responses of each chunk that is not done. So many chunks are in flight that no server waits."""
    group_size, rollout = config.rollout.group_size, config.rollout
    in_flight = 1 + math.ceil(len(fleet.servers) * rollout.max_concurrency / (CHUNK * group_size))
    rounds = [
        Round(i, prompts[chunk.start : chunk.stop], group_size, rollout.sampling, needed=len(chunk))
        for i, chunk in enumerate(chunks)
    ]
    columns = "prompts", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=fleet.console, transient=True, disable=not fleet.console.is_terminal) as bar:
        task = bar.add_task("", total=len(prompts), completed=done * CHUNK)
        for batch in rounds[done : done + in_flight]:
            fleet.submit(batch)
        for batch in rounds[done:]:
            groups = fleet.collect(batch)
            if (following := batch.number + in_flight) < len(rounds):
                fleet.submit(rounds[following])
            yield [group.rollouts for group in groups]
            bar.advance(task, len(batch.prompts))


def _line(rollout: Rollout, sample: int, questions: dict[str, Question]) -> str:
    prompt = rollout.prompt
    return json.dumps(
        {
            "id": prompt.id,
            "prompt": questions[prompt.id],
            # What the chat template of this model opens, that of another may not.
            "response": f"<think>{rollout.text}" if opens_thinking(prompt.text) else rollout.text,
            "answer": prompt.answer,
            "subset": prompt.subset,
            "sample": sample,
            "reward": rollout.reward,
            "solved": rollout.solved,
            "tokens": len(rollout.tokens),
            "finish_reason": rollout.finish_reason,
        },
        ensure_ascii=False,
    )


def _finish(lines: Iterator[str], output: Path, keep: Keep) -> None:
    """Write the traces, and print how many there are of each kind."""
    temporary = output.with_name(f"{output.name}.tmp")
    count = solved = cut = kept = tokens = 0
    with temporary.open("w") as file:
        for line in lines:
            trace = json.loads(line)
            count, solved = count + 1, solved + trace["solved"]
            if trace.pop("finish_reason") == "length":
                cut += 1
            elif trace["solved"] or keep == "all":
                kept, tokens = kept + 1, tokens + trace["tokens"]
                file.write(f"{json.dumps(trace, ensure_ascii=False)}\n")
    temporary.rename(output)
    rows = [
        ("responses", f"{count:,}"),
        ("solved", f"{solved:,}, {solved / count:.1%}"),
        ("cut off, left out", f"{cut:,}"),
        ("written", f"{kept:,}, {tokens:,} tokens"),
    ]
    summary_table(str(output), rows, Console())
