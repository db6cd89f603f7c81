"""The whole run, top to bottom. Each verb is one call into the part that does it.

generate -> reward -> advantages and weights -> teacher log-probs -> gradients -> update -> weight sync -> verify

Servers generate, and rank 0 scores, while ranks compute the gradients of earlier groups, as `rollout.schedule` says.
Every rank runs this code; only rank 0 talks to the rollout servers and writes files.
"""

from __future__ import annotations

import random
from functools import partial

import torch.distributed as dist

from rlad_megatron.config import RunConfig
from rlad_megatron.data.samples import samples_from_traces
from rlad_megatron.errors import StepDropped
from rlad_megatron.evaluate import evaluate_model
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.rewards.accuracy import accuracy_metrics
from rlad_megatron.rl_run import RlRun
from rlad_megatron.run import LauncherHooks, TrainerRun
from rlad_megatron.run_prompts import read_prompts, read_traces
from rlad_megatron.setup import open_run, open_trainer
from rlad_megatron.types import EVALUATION


def train(config: RunConfig, hooks: LauncherHooks) -> bool:
    """Reinforcement learning with the teacher in the loop (`rlad train`). False: told to stop before its end."""
    prompts = read_prompts(config)
    hooks.prompts_read(prompts.max_model_len)
    teacher = evaluate_teacher(config) if config.eval.teacher and not config.resume else {}
    with open_run(config, hooks, prompts) as run:
        if run.step == 0:
            run.log(evaluate(run) | teacher | {"data/dropped_prompts": run.dropped_prompts})
        while run.step < config.train.steps:
            if run.saved_to_stop():
                return False
            run.step += 1
            try:
                with run.whole_step():
                    metrics = train_step(run)
            except StepDropped:
                run.drop_step()
                return False
            metrics |= run.step_times()
            try:
                if is_due(run, config.eval.every):
                    metrics |= evaluate(run)
            except StepDropped:  # only its evaluation: the step is whole
                run.log(metrics)
                run.save_checkpoint()
                return False
            run.log(metrics)
            if is_due(run, config.checkpoint.every):
                run.save_checkpoint()
        run.finish()
    return True


def train_step(run: RlRun) -> dict[str, float]:
    """Rollouts, their gradients wave by wave, the update and the sync of the new weights; returns what was measured."""
    waves = []
    run.begin_rounds()
    for wave in run.waves():
        run.add_teacher_log_probs(wave)
        run.add_reference_log_probs(wave)
        run.train_on(wave)
        waves.append(wave)
    metrics = run.finish_updates(waves)
    with run.timers("weight_sync"):
        metrics |= run.push_weights()
        metrics |= run.verify_weights()
    return metrics


def evaluate(run: RlRun) -> dict[str, float]:
    """Accuracy on the held-out prompts, with the weights that the servers hold."""
    config = run.config.eval
    with run.timers("eval"):
        groups = run.fleet.generate(run.eval_prompts, config.samples, config.sampling, batch=EVALUATION)
    return accuracy_metrics(groups) | run.timers.pop()


def evaluate_teacher(config: RunConfig) -> dict[str, float]:
    """The teacher's accuracy on the same prompts, from servers that are stopped before the run starts."""
    metrics = on_first_rank(lambda: evaluate_model(config, config.teacher.path), dist.group.WORLD)
    return {"eval/teacher_accuracy": metrics["eval/accuracy"]}


def sft(config: RunConfig, hooks: LauncherHooks) -> bool:
    """Supervised fine-tuning on traces with the same trainer (`rlad sft`). Returns as `train` does."""
    traces = read_traces(config)
    with open_trainer(config, hooks) as run:
        run.begin()
        while run.step < config.train.steps:
            if run.saved_to_stop():
                return False
            # Drawn from (seed, step), so a resumed run continues with the same batches.
            draw = partial(random.Random(f"{config.train.seed}/{run.step}").sample, traces, config.sft.batch_size)
            batch = on_first_rank(draw, dist.group.WORLD)
            run.step += 1
            with run.whole_step():
                run.accumulate(samples_from_traces(batch, config.objective.aggregation), last=True)
                metrics = run.finish_update()
            run.log(metrics | run.step_times())
            if is_due(run, config.checkpoint.every):
                run.save_checkpoint()
        run.finish()
    return True


def is_due(run: TrainerRun, every: int) -> bool:
    """True every `every` steps, and at the last one."""
    return run.step == run.config.train.steps or (every > 0 and run.step % every == 0)
