"""The whole run, top to bottom. Each verb is one call into the part that does it.

generate -> reward -> advantages and weights -> teacher log-probs -> (old log-probs) -> update -> weight sync -> verify

Every rank runs this code; only rank 0 talks to the rollout servers and writes files.
"""

from __future__ import annotations

import random

import torch.distributed as dist

from rlad_megatron.config import RunConfig
from rlad_megatron.data.prompts import build_traces, fitting_traces
from rlad_megatron.data.samples import samples_from_rollouts, samples_from_traces, split_into_updates
from rlad_megatron.evaluate import evaluate_model
from rlad_megatron.observe.rollouts import reward_metrics
from rlad_megatron.parallel.collective import on_first_rank
from rlad_megatron.rewards.accuracy import accuracy_metrics
from rlad_megatron.run import LauncherHooks, RlRun, TrainerRun
from rlad_megatron.servers.sampling import EVALUATION
from rlad_megatron.setup import open_run, open_trainer


def train(config: RunConfig, hooks: LauncherHooks) -> bool:
    """Reinforcement learning with the teacher in the loop (`rlad train`). False: told to stop before its end."""
    teacher = evaluate_teacher(config) if config.eval.teacher and not config.resume else {}
    with open_run(config, hooks) as run:
        if run.step == 0:
            run.log(evaluate(run) | teacher | {"data/dropped_prompts": run.dropped_prompts})
        while run.step < config.train.steps:
            if run.saved_to_stop():
                return False
            run.step += 1
            with run.timers("step"):
                metrics = train_step(run)
            metrics |= run.timers.pop()
            if is_due(run, config.eval.every):
                metrics |= evaluate(run)
            run.log(metrics)
            if is_due(run, config.checkpoint.every):
                run.save_checkpoint()
        run.finish()
    return True


def train_step(run: RlRun) -> dict[str, float]:
    """Rollouts, scores, optimizer updates and the sync of the new weights: one step, and what it measured."""
    config = run.config
    with run.timers("rollout"):
        prompts = run.prompts.next_batch(config.rollout.prompts_per_step)
        groups = run.fleet.generate(prompts, config.rollout.group_size, config.rollout.sampling, batch=run.step)
        run.fleet.sleep()
    with run.timers("reward"):
        run.add_rewards(groups)
        run.write_rollouts(groups)
    updates = [
        samples_from_rollouts(part, config.objective)
        for part in split_into_updates(groups, config.train.updates_per_rollout)
    ]
    everything = [sample for samples in updates for sample in samples]
    metrics = reward_metrics(groups, trained=len(everything))
    run.add_teacher_log_probs(everything)
    run.add_old_log_probs(everything)
    with run.timers("update"):
        metrics |= run.update(updates)
    with run.timers("weight_sync"):
        run.push_weights()
        metrics |= run.verify_weights()
    return metrics


def evaluate(run: RlRun) -> dict[str, float]:
    """Accuracy on the held-out prompts, with the weights that the servers hold."""
    config = run.config.eval
    with run.timers("eval"):
        groups = run.fleet.generate(run.eval_prompts, config.samples, config.sampling, batch=EVALUATION)
        run.add_rewards(groups)
    return accuracy_metrics(groups) | run.timers.pop()


def evaluate_teacher(config: RunConfig) -> dict[str, float]:
    """The teacher's accuracy on the same prompts, from servers that are stopped before the run starts."""
    metrics = on_first_rank(lambda: evaluate_model(config, config.teacher.path), dist.group.WORLD)
    return {"eval/teacher_accuracy": metrics["eval/accuracy"]}


def sft(config: RunConfig, hooks: LauncherHooks) -> bool:
    """Supervised fine-tuning on traces with the same trainer (`rlad sft`). Returns as `train` does."""
    with open_trainer(config, hooks) as run:
        traces = build_traces(config.data, config.sft, run.tokenizer)
        traces = fitting_traces(traces, config.data.max_prompt_tokens, run.actor.spec.max_position_embeddings)
        run.begin()
        while run.step < config.train.steps:
            if run.saved_to_stop():
                return False
            # Drawn from (seed, step), so a resumed run continues with the same batches.
            batch = random.Random(f"{config.train.seed}/{run.step}").sample(traces, config.sft.batch_size)
            run.step += 1
            with run.timers("step"):
                metrics = run.update([samples_from_traces(batch, config.objective.aggregation)])
            run.log(metrics | run.timers.pop())
            if is_due(run, config.checkpoint.every):
                run.save_checkpoint()
        run.finish()
    return True


def is_due(run: TrainerRun, every: int) -> bool:
    """True every `every` steps, and at the last one."""
    return run.step == run.config.train.steps or (every > 0 and run.step % every == 0)
