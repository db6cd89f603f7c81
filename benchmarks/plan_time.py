"""The time that `rlad plan` estimates, held against runs on this machine and against published figures.

    python benchmarks/plan_time.py --folder FOLDER [--shape NAME]

Measured: for each shape `rlad bench`, `rlad bench --servers-only` and some steps of `rlad train` whose student hardly
moves (lr 1e-9), so that lengths stay as they are. The estimate takes the two files and the lengths of the run's kept
rollouts, nothing else of the run. Medians over steps and rounds; and, because other work on a machine slows some of
them down, the fastest step of each phase against the fastest rounds. What FOLDER already holds is not measured again.

Published: NeMo-RL's table of v0.4 (docs/about/performance-summary.md of NVIDIA-NeMo/RL), its rows for GRPO on-policy
whose families `rlad plan` knows. What the table leaves out is from the recipes it names (examples/configs/recipes/llm/
performance): 32 responses to a prompt, 512 of them in an update, a KL to the reference, servers on the ranks' GPUs with
0.6 of their memory. Lengths are log-normal with our spread, their mean that of the table. Step times include the
passes for pi_old and the reference. And table 4 of arXiv 2602.22495: what the teacher adds to a step of GRPO. We know
neither its GPUs nor its lengths, and take our recipe of the paper's table 2, `phased`, with its assumed lengths.

Results go to benchmarks/results/plan_time.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

import measure

from rlad_megatron.config import (
    PHASED,
    LayoutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from rlad_megatron.config.bench import PREFILL
from rlad_megatron.config.recipe import load_run
from rlad_megatron.models.config_json import read_or_known_spec
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.plan.count import make_plan, plan_models
from rlad_megatron.plan.lengths import SPREAD, Lengths, expected_lengths
from rlad_megatron.plan.rates import rates_for
from rlad_megatron.plan.time import step_time

RESULT = Path(__file__).parent / "results" / "plan_time.json"
RECIPE = "kk_tiny_cpu"
SHAPES = {
    "demo": [],
    "few in flight, TP 2": [
        *["rollout.prompts_per_step=64", "rollout.group_size=4", "rollout.max_concurrency=32"],
        *["student.layout.tensor_parallel=2", "train.microbatch_tokens=1280"],
    ],
}
STEPS = 8
# As long as this student's prompts and responses are on average: on CPUs a sample costs something besides its tokens.
BENCH_LENGTHS = ["data.max_prompt_tokens=46", "rollout.sampling.max_tokens=52"]
QUIET = [
    *["eval.teacher=false", "eval.every=0", "data.eval_size=8", "observe.tensorboard=false", "optimizer.lr=1e-9"],
    *["observe.rollouts_per_step=64", "checkpoint.every=0", "checkpoint.export_hf=false", f"train.steps={STEPS}"],
]
PHASES = ("time/rollout", "time/teacher", "time/update", "time/weight_sync", "time/step")

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
# Name -> (GPUs, longest sequence, mean response, responses of a step, servers' TP, layout, recompute, seconds).
PUBLISHED = {
    "Llama-3.1-8B": (16, 4096, 1060, 2048, 1, LayoutConfig(1, 2), "full", 97.7),
    "Qwen3-32B": (32, 4096, 3206, 2048, 4, LayoutConfig(4, 4, sequence_parallel=True), "none", 393.0),
    "Qwen3-30B-A3B": (
        *(32, 4096, 3154, 2048, 4),
        LayoutConfig(2, 1, sequence_parallel=True, expert_parallel=8, expert_tensor_parallel=1),
        *("none", 225.0),
    ),
}
PROMPT = 128  # tokens: what the table's tokens/s/GPU leave beyond its responses
PAPER = {"grpo": 491.2, "trrd": 567.4}  # seconds of a step, arXiv 2602.22495, table 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for runs and their figures")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="measure only these now")
    options = parser.parse_args()
    for shape in options.shape or SHAPES:
        measure_shape(shape, options.folder)
    measured = {
        shape: compare(shape, options.folder)
        for shape in SHAPES
        if (options.folder / slug(shape) / "report.html").exists()
    }
    published = {name: nemo_rl(name) for name in PUBLISHED}
    result = {
        "command": "python benchmarks/plan_time.py --folder FOLDER",
        "ratios": {
            **{
                f"{slug(shape)}_estimated_over_measured_{kind}": found[f"time/step, {kind}"]["ratio"]
                for shape, found in measured.items()
                for kind in ("median", "fastest")
            },
            **{f"{slug(name)}_estimated_over_published": found["ratio"] for name, found in published.items()},
        },
        "measured": measured,
        "published": published,
        "teacher_over_grpo": paper(),
    }
    measure.write_result(RESULT, result)
    print(
        json.dumps({name: result[name] for name in ("ratios", "measured", "published", "teacher_over_grpo")}, indent=2)
    )


def slug(name: str) -> str:
    return name.lower().replace(", ", "_").replace(" ", "_").replace("-", "_").replace(".", "p")


def measure_shape(shape: str, folder: Path) -> None:
    """Run the three commands, if FOLDER lacks what they write."""
    name = slug(shape)
    common = [RECIPE, *SHAPES[shape], f"runs_dir={folder}", f"name={name}"]
    for words, output in (
        (
            ["bench", *common, *BENCH_LENGTHS, "--steps", "4", "--output", str(folder / f"{name}.json")],
            folder / f"{name}.json",
        ),
        (
            [
                "bench",
                *common,
                *BENCH_LENGTHS,
                "--servers-only",
                "--steps",
                "5",
                "--output",
                str(folder / f"{name}_servers.json"),
            ],
            folder / f"{name}_servers.json",
        ),
        (["train", *common, *QUIET], folder / name / "report.html"),
    ):
        if not output.exists():
            subprocess.run(["rlad", *words], check=True)


def compare(shape: str, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each phase and idle shares, estimated and measured."""
    name = slug(shape)
    config = load_run(RECIPE, [*SHAPES[shape], *QUIET])
    plan, lengths = make_plan(config), expected_lengths(config, str(folder / name))
    files = [folder / f"{name}.json", folder / f"{name}_servers.json"]
    medians = step_time(plan, lengths, rates_for(config, files))
    undisturbed = step_time(plan, lengths, rates_for(config, [best_rounds(file) for file in files]))
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()][2:]
    found = {}
    for phase in (*PHASES, *medians.idle):
        steps = [line[phase] for line in lines]
        pairs = {"median": (medians, statistics.median(steps))}
        if phase in PHASES:
            pairs["fastest"] = undisturbed, min(steps)
        for kind, (estimate, value) in pairs.items():
            estimated = (estimate.times | estimate.idle)[phase]
            figures = {"estimated": estimated, "measured": value, "ratio": estimated / value}
            found[f"{phase}, {kind}"] = {what: round(figure, 3) for what, figure in figures.items()}
    return found


def best_rounds(file: Path) -> Path:
    """A copy of the file with each figure of its fastest round in place of the median."""
    found = json.loads(file.read_text())
    for name, values in found["rounds"].items():
        found["figures"][name] = (max if name.startswith("perf/") or name == PREFILL else min)(values)
    copy = file.with_suffix(".best.json")
    copy.write_text(json.dumps(found))
    return copy


def nemo_rl(name: str) -> dict[str, float]:
    """A step of a row of the table, estimated and published."""
    gpus, longest, mean, responses, size, layout, recompute, seconds = PUBLISHED[name]
    spec = as_model_spec(LLAMA_8B, name) if name.startswith("Llama") else read_or_known_spec(name, "student")
    config = RunConfig(
        student=ModelConfig(path=name, layout=layout),
        objective=ObjectiveConfig(name="grpo", reference_kl=0.01, reference_offload=True),
        rollout=RolloutConfig(
            group_size=32,
            prompts_per_step=responses // 32,
            sampling=SamplingConfig(max_tokens=longest - PROMPT),
            schedule=PHASED,
            servers=gpus // size,
            colocate=True,
            tensor_parallel=size,
            gpu_memory_utilization=0.6,
        ),
        optimizer=OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True),
        train=TrainConfig(
            nodes=gpus // 8,
            ranks_per_node=8,
            updates_per_rollout=responses // 512,
            microbatch_tokens=longest,
            recompute=recompute,
        ),
    )
    lengths = Lengths(longest - PROMPT, PROMPT, mean, SPREAD)
    found = step_time(plan_models(config, spec, None), lengths, rates_for(config, []))
    estimated = found.times["time/step"] - found.times["time/checkpoint"]
    rollout, update = (round(found.times[f"time/{phase}"], 1) for phase in ("rollout", "update"))
    return {
        "estimated": round(estimated, 1),
        "of which rollout": rollout,
        "of which passes": update,
        "published": seconds,
        "ratio": round(estimated / seconds, 3),
    }


def paper() -> dict[str, float]:
    """A step with the teacher over one without, estimated and published."""
    seconds = {}
    for name in PAPER:
        config = load_run("math_qwen3_8b_base_from_32b", [f"objective.name={name}", f"rollout.schedule={PHASED}"])
        found = step_time(make_plan(config), expected_lengths(config), rates_for(config, []))
        seconds[name] = found.times["time/step"]
    return {
        **{f"estimated {name} s": round(value, 1) for name, value in seconds.items()},
        "estimated": round(seconds["trrd"] / seconds["grpo"], 3),
        "published": round(PAPER["trrd"] / PAPER["grpo"], 3),
    }


if __name__ == "__main__":
    main()
