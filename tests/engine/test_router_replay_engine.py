"""A trainer that replays the experts of a real server, over two pushes.

vLLM captures experts in its Model Runner V2 only, whose kernels are Triton's. On a CPU Triton interprets them.
"""

import os
from dataclasses import replace

import pytest
import torch
from harness import run_ranks
from tiny_models import make_model
from tiny_servers import EOS, MAX_MODEL_LEN, PROMPT, VOCAB, rollout_config

from rlad_megatron.config import ModelConfig, ObjectiveConfig, RunConfig, SamplingConfig
from rlad_megatron.types import EVALUATION, Prompt

pytestmark = pytest.mark.engine

# vLLM takes Triton for a CPU's if it has a backend of that name.
TRITON_ON_CPUS = """
from types import SimpleNamespace

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=None)
"""
LONG_PROMPT = PROMPT * 6  # more than a block of the KV cache, which the group's second member finds there


def rollouts_and_scores(rank, world_size, folder, other, run_dir):
    """For each of two versions: what a round brought, and the trainer's log-probs with and without its experts."""
    from rlad_megatron import platform
    from rlad_megatron.data.samples import samples_from_rollouts
    from rlad_megatron.models.config_json import read_model_spec
    from rlad_megatron.models.load import load_weights, open_checkpoint
    from rlad_megatron.models.shard_plan import build_shard_plan
    from rlad_megatron.parallel.groups import build_groups, seed_everything
    from rlad_megatron.servers.fleet import ServerFleet
    from rlad_megatron.servers.stream import Round
    from rlad_megatron.trainer.actor import Actor

    (run_dir / "sitecustomize.py").write_text(TRITON_ON_CPUS)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(run_dir), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    platform.setup()
    config = RunConfig(
        student=ModelConfig(path=folder, precision="fp32"),
        rollout=rollout_config(router_replay=True, sampling=SamplingConfig(max_tokens=9)),
    )
    groups, spec = build_groups(config.student.layout), read_model_spec(folder)
    seed_everything(0, groups)
    actor = Actor(config, spec, groups, build_shard_plan(spec, config.student.layout))
    prompts = [Prompt(str(i), tuple(tokens), "", "", "") for i, tokens in enumerate((PROMPT, LONG_PROMPT))]
    found = []
    with ServerFleet(
        config,
        model_path=folder,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB,
        replay=spec,
        eos_ids=[EOS],
        run_dir=run_dir,
        student=actor,
        probe=[PROMPT, PROMPT[::-1]],
    ) as fleet:
        for version, weights in enumerate((folder, other)):
            load_weights(actor.parameters(), actor.entries, open_checkpoint(weights, spec))
            fleet.push(version)
            gaps = fleet.verify()
            batch = Round(version, prompts, 2, config.rollout.sampling, needed=2, experts=True)
            fleet.submit(batch)
            rollouts = [group.rollouts for group in fleet.collect(batch)]
            for i, rollout in enumerate(rollout for group in rollouts for rollout in group):
                rollout.reward = float(i)
            samples = samples_from_rollouts(rollouts, ObjectiveConfig(name="on_policy_kl"))
            own = [replace(sample, experts=None) for sample in samples]
            found.append((gaps, rollouts, actor.log_probs(samples), actor.log_probs(own)))
        evaluated = fleet.generate(prompts[:1], 1, config.rollout.sampling, batch=EVALUATION)
    return found, evaluated


def test_the_trainer_takes_the_experts_that_the_server_chose(tmp_path):
    sizes = {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 3, "vocab_size": VOCAB, "num_experts": 6}
    folder, other = (
        make_model(tmp_path / name, "qwen3_moe", initializer_range=scale, **sizes)
        for name, scale in (("first", 0.1), ("other", 0.3))
    )
    ((found, evaluated),) = run_ranks(rollouts_and_scores, 1, folder, other, tmp_path)
    for gaps, groups, replayed, own in found:
        assert gaps["sync/probe_abs_max"] < 1e-3
        rollouts = [rollout for group in groups for rollout in group]
        for rollout, *ours in zip(rollouts, replayed, own, strict=True):
            assert rollout.experts.shape == (len(rollout.prompt.tokens) + len(rollout.tokens) - 1, 3, 2)
            # In float32 both engines choose the same.
            for log_probs in ours:
                torch.testing.assert_close(log_probs, torch.tensor(rollout.log_probs), rtol=0, atol=1e-3)
    (before, after) = (groups[1][0].experts[: len(LONG_PROMPT)] for _, groups, *_ in found)
    assert (before != after).any()  # the same prompt, other weights
    assert evaluated[0][0].experts is None
