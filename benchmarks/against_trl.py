"""A GRPO step of the demo against the same step by TRL's GRPOTrainer.

    python benchmarks/against_trl.py

Both train the demo's student on the same prompts with the same reward, sampling and learning rate, in float32. TRL
generates with transformers and trains on the whole batch in one micro-batch (`trl_grpo.py`). Ours is `rlad train
kk_tiny_cpu objective.name=grpo`, where a step also includes the transfer of the weights and its proof. A round runs
both, one after the other, the first one first in every second round. `step_over_trl` is the median over rounds of the
ratio of the median steps; the first step of a run is left out.

TRL has a virtual environment in the user's cache folder, made at first use. Without it (no network, for example) the
benchmark is skipped. Results go to benchmarks/results/against_trl.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from measure import median_ratio, write_result

from rlad_megatron.config import RunConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.data.prompts import PromptSource, build_prompts
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.observe.metrics import read_metrics

Run = dict[str, list[float]]  # seconds, reward and tokens of a response of each step; accuracy before and after

HERE = Path(__file__).parent
RESULT = HERE / "results" / "against_trl.json"
PACKAGES = [
    "trl==1.16.0",
    "torch==2.13.0",
    "transformers==5.19.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "pydantic==2.14.4",  # of our configuration, which the reward imports
    "pyyaml==6.0.4",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9, help="of each run; the first is not counted")
    parser.add_argument("--port", type=int, default=8787, help="of the rollout server")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of our run")
    options = parser.parse_args()
    try:
        python = trl_python()
    except (OSError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(f"skipped: TRL's environment in {environment()} cannot be made: {output[-1] if output else error}")
        return
    runs: dict[str, list[Run]] = {"ours": [], "trl": []}
    for round_ in range(options.rounds):
        for name in ("ours", "trl") if round_ % 2 == 0 else ("trl", "ours"):
            with tempfile.TemporaryDirectory() as folder:
                demo = overrides(folder, options)
                done = run_ours(demo) if name == "ours" else run_trl(demo, python, Path(folder))
            runs[name].append(done)
            print(f"round {round_}, {name}: {step_seconds(done):.2f} s a step, accuracy {done['accuracy']}", flush=True)
    medians = {name: [step_seconds(done) for done in rounds] for name, rounds in runs.items()}
    result = {
        "ratios": {"step_over_trl": round(median_ratio(medians["ours"], medians["trl"]), 3)},
        "rounds": medians,
        "runs": runs,
    }
    write_result(RESULT, result, dict(package.split("==") for package in PACKAGES[:1]))
    print(json.dumps(result["ratios"], indent=2))


def overrides(folder: str, options: argparse.Namespace) -> list[str]:
    """Overrides of the demo: GRPO, evaluated before and after, nothing kept."""
    return [
        "objective.name=grpo",
        "name=ours",
        f"runs_dir={folder}",
        f"rollout.port={options.port}",
        f"train.steps={options.steps}",
        f"eval.every={options.steps}",
        "eval.teacher=false",
        "optimizer.warmup_steps=0",  # TRL's warm-up starts at 0
        "checkpoint.every=0",
        "checkpoint.export_hf=false",
        *options.overrides,
    ]


def step_seconds(done: Run) -> float:
    return statistics.median(done["seconds"][1:])


def run_ours(arguments: list[str]) -> Run:
    run([sys.executable, "-m", "rlad_megatron.cli", "train", "kk_tiny_cpu", *arguments])
    lines = read_metrics(load_run("kk_tiny_cpu", arguments).run_dir)
    steps = [line for line in lines if line["step"] > 0]
    return {
        "seconds": [step["time/step"] for step in steps],
        "reward": [step["reward/mean"] for step in steps],
        "tokens": [step["rollout/response_tokens"] for step in steps],
        "accuracy": [line["eval/accuracy"] for line in lines if "eval/accuracy" in line],
    }


def run_trl(arguments: list[str], python: Path, folder: Path) -> Run:
    (folder / "task.json").write_text(json.dumps(trl_task(load_run("kk_tiny_cpu", arguments))))
    run([str(python), str(HERE / "trl_grpo.py"), str(folder)])
    return json.loads((folder / "result.json").read_text())


def trl_task(config: RunConfig) -> dict[str, object]:
    """The same training for `trl_grpo.py`."""
    tokenizer = load_tokenizer(config.student.path)
    vocab = tokenizer.vocab()
    prompts = PromptSource(build_prompts(config.data, tokenizer, "train"), config.train.seed)
    rollout, optimizer, objective = config.rollout, config.optimizer, config.objective
    return {
        "model": config.student.path,
        "pieces": [vocab[i] for i in range(tokenizer.size)],
        "train": [asdict(prompt) for prompt in prompts.next_batch(rollout.prompts_per_step * config.train.steps)],
        "eval": [asdict(prompt) for prompt in build_prompts(config.data, tokenizer, "test")],
        "eval_sampling": {
            "temperature": config.eval.sampling.temperature,
            "top_p": config.eval.sampling.top_p,
            "max_new_tokens": config.eval.sampling.max_tokens,
        },
        "grpo": {
            "max_steps": config.train.steps,
            "per_device_train_batch_size": rollout.prompts_per_step * rollout.group_size,
            "num_generations": rollout.group_size,
            "shuffle_dataset": False,
            "max_completion_length": rollout.sampling.max_tokens,
            "temperature": rollout.sampling.temperature,
            "top_p": rollout.sampling.top_p,
            "loss_type": "grpo",
            "beta": 0.0,
            "epsilon": objective.eps_low,
            "epsilon_high": objective.eps_high,
            "learning_rate": optimizer.lr,
            "lr_scheduler_type": "constant",
            "adam_beta1": optimizer.beta1,
            "adam_beta2": optimizer.beta2,
            "weight_decay": optimizer.weight_decay,
            "max_grad_norm": optimizer.clip_grad,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": config.train.seed,
        },
    }


def run(command: list[str]) -> None:
    """Run a process with our package on its path. Its output is shown if it fails."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{command[1]} failed")


def environment() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rlad-megatron" / "against_trl"


def trl_python() -> Path:
    """The interpreter of TRL's environment, which is made unless it has the pinned packages."""
    folder = environment()
    python, made = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(PACKAGES)
    if not made.is_file() or made.read_text() != wanted:
        print(f"making TRL's environment in {folder}", flush=True)
        for command in ([sys.executable, "-m", "venv", "--clear", folder], [python, "-m", "pip", "install", *PACKAGES]):
            subprocess.run(command, check=True, capture_output=True, text=True)
        made.write_text(wanted)
    return python


if __name__ == "__main__":
    main()
