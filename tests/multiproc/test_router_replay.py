"""A student with given experts against float64 autograd of the transformers model, whose top-k is made to find them.

The experts are random, so hardly a token has those that its router would choose.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from gradient_oracle import Oracle, Response
from harness import run_ranks
from test_gradient_contract import (
    BOUND,
    DEEP,
    LENGTHS,
    OPTIMIZER,
    REWARDS,
    SIZES,
    TEMPERATURE,
    VOCAB,
    assembled,
    assert_same_copies,
    gather_gradients,
    largest_error,
    objective_config,
    pieces_of,
)
from tiny_models import make_model
from torch.overrides import TorchFunctionMode

from rlad_megatron.config import LayoutConfig, ModelConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig

pytestmark = pytest.mark.multiproc

BUDGET = 30  # tokens of a micro-batch: more of them than pipeline stages
OBJECTIVE = objective_config()
MODEL = DEEP["qwen3_moe-deep"]
LAYERS, EXPERTS, PER_TOKEN = MODEL["num_hidden_layers"], MODEL["num_experts"], 2
MODELS = {"normalised": MODEL, "plain": MODEL | {"norm_topk_prob": False}}


@dataclass(frozen=True)
class Case:
    ranks: int
    layout: LayoutConfig
    model: str = "normalised"
    recompute: str = "none"
    recompute_layers: int = 0


CASES = {
    "tp1": Case(1, LayoutConfig()),
    "tp1-plain": Case(1, LayoutConfig(), "plain"),
    "tp1-recompute": Case(1, LayoutConfig(), recompute="full"),
    "ep2": Case(2, LayoutConfig(expert_parallel=2)),
    "tp2-sp": Case(2, LayoutConfig(tensor_parallel=2, sequence_parallel=True)),
    "cp2": Case(2, LayoutConfig(context_parallel=2)),
    "pp2": Case(2, LayoutConfig(pipeline_parallel=2)),
    "pp2-recompute": Case(2, LayoutConfig(pipeline_parallel=2), recompute="full"),
    "pp2-recompute-of-a-layer": Case(2, LayoutConfig(pipeline_parallel=2), recompute="full", recompute_layers=1),
    "pp2-vpp2-recompute": Case(2, LayoutConfig(1, 2, virtual_pipeline=2), recompute="selective"),
}


class _Given(TorchFunctionMode):
    """`torch.topk` finds the given experts [P + R - 1, L, K], one layer at each call. The last token keeps its own."""

    def __init__(self, experts_TLK):
        super().__init__()
        self.layers = iter(experts_TLK.unbind(1))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is not torch.topk:
            return found
        indices = torch.cat([next(self.layers), found.indices[-1:]])
        return args[0].gather(-1, indices), indices


class ReplayOracle(Oracle):
    def __init__(self, folder, temperature, experts):
        super().__init__(folder, temperature)
        self.experts = experts  # by sequence

    def log_probs_and_entropy(self, response):
        with _Given(self.experts[response.sequence]):
            return super().log_probs_and_entropy(response)


def make_groups():
    """Responses, and the experts of each sequence: int64 [P + R - 1, L, K]."""
    generator = torch.Generator().manual_seed(5)

    def tokens(length):
        return torch.randint(0, VOCAB, (length,), generator=generator).tolist()

    groups, experts = [], {}
    for (prompt_length, lengths), rewards in zip(LENGTHS, REWARDS, strict=True):
        prompt = tokens(prompt_length)
        group = [Response(prompt, tokens(length), reward) for length, reward in zip(lengths, rewards, strict=True)]
        for response in group:
            scores = torch.rand(len(response.sequence) - 1, LAYERS, EXPERTS, generator=generator)
            experts[response.sequence] = scores.argsort(dim=-1)[..., :PER_TOKEN]
        groups.append(group)
    return groups, experts


def add_log_probs(groups, oracle):
    """The sampler's are the student's; the teacher's are near them."""
    generator = torch.Generator().manual_seed(6)
    for response in (response for group in groups for response in group):
        with torch.no_grad():
            log_pi = oracle.log_probs(response)
        response.sampler = response.log_pi = log_pi.tolist()
        response.teacher = (log_pi + torch.randn(len(log_pi), generator=generator)).float().tolist()


def make_samples(groups, experts):
    from rlad_megatron.data.samples import samples_from_rollouts
    from rlad_megatron.types import Prompt, Rollout

    def rollout(response):
        prompt = Prompt(id="", tokens=tuple(response.prompt), answer="", subset="", text="")
        chosen = experts[response.sequence].to(torch.uint8).numpy()
        return Rollout(prompt, response.tokens, response.sampler, "stop", [], reward=response.reward, experts=chosen)

    samples = samples_from_rollouts([[rollout(response) for response in group] for group in groups], OBJECTIVE)
    told = {response.sequence: response for group in groups for response in group}
    for sample in samples:
        sample.teacher_log_probs = torch.tensor(told[tuple(sample.tokens.tolist())].teacher)
    return samples


def run_case(folder, case, groups, experts):
    """Gradients as pieces, and log-probs by sequence: with the given experts, and afterwards with the router's own.

    And those of a teacher of the same folder, which is told the student's experts too.
    """
    from rlad_megatron import platform
    from rlad_megatron.models.config_json import read_model_spec
    from rlad_megatron.models.shard_plan import build_shard_plan
    from rlad_megatron.parallel.groups import build_groups, seed_everything
    from rlad_megatron.teacher.teacher import build_teacher
    from rlad_megatron.trainer.actor import Actor

    platform.setup()
    student = ModelConfig(path=folder, layout=case.layout, precision="fp32")
    config = RunConfig(
        student=student,
        objective=OBJECTIVE,
        optimizer=OPTIMIZER,
        rollout=RolloutConfig(sampling=SamplingConfig(temperature=TEMPERATURE), router_replay=True),
        train=TrainConfig(
            steps=1, microbatch_tokens=BUDGET, recompute=case.recompute, recompute_layers=case.recompute_layers
        ),
    )
    spec = read_model_spec(folder)
    teacher = build_teacher(
        config, replace(config.teacher, path=folder, precision="fp32"), spec, build_groups(LayoutConfig())
    )
    layout_groups = build_groups(case.layout)
    seed_everything(0, layout_groups)
    actor = Actor(config, spec, layout_groups, build_shard_plan(spec, case.layout))

    samples, gradients = make_samples(groups, experts), []
    sequences = [tuple(sample.tokens.tolist()) for sample in samples]
    of_teacher = teacher.log_probs(samples)
    replayed = actor.log_probs(samples)
    step = actor.optimizer.step

    def keep_gradients():
        for chunk in actor.chunks:
            gather_gradients(chunk)
        grads = {name: parameter.main_grad for name, parameter in actor.parameters().items()}
        gradients.extend(pieces_of(actor, grads))
        return step()

    actor.optimizer.step = keep_gradients
    before = {name: parameter.detach().clone() for name, parameter in actor.parameters().items()}
    norm = actor.update(samples).metrics["grad_norm"]
    for name, parameter in actor.parameters().items():
        parameter.detach().copy_(before[name])
    own = actor.log_probs([replace(sample, experts=None) for sample in samples])
    by_sequence = [dict(zip(sequences, values, strict=True)) for values in (replayed, own, of_teacher)]
    return gradients, norm, *by_sequence


def run_cases(rank, world_size, folders, given):
    return {
        name: run_case(folders[case.model], case, *given[case.model])
        for name, case in CASES.items()
        if case.ranks == world_size
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """By model: its folder, (groups, experts), the oracle's result, and log-probs with the router's own experts."""
    found = {}
    for name, changes in MODELS.items():
        folder = make_model(tmp_path_factory.mktemp(name), "qwen3_moe", **SIZES | changes)
        groups, experts = make_groups()
        oracle = ReplayOracle(folder, TEMPERATURE, experts)
        add_log_probs(groups, oracle)
        with torch.no_grad():
            own = {r.sequence: Oracle.log_probs_and_entropy(oracle, r)[0].float() for group in groups for r in group}
        found[name] = folder, (groups, experts), oracle.updates([groups], OBJECTIVE, OPTIMIZER), own
    return found


@pytest.fixture(scope="module")
def results(expected):
    folders = {name: folder for name, (folder, *_) in expected.items()}
    given = {name: given for name, (_, given, *_) in expected.items()}
    found = {}
    for ranks in (1, 2):
        by_rank = run_ranks(run_cases, ranks, folders, given)
        found |= {name: [results[name] for results in by_rank] for name in by_rank[0]}
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients(results, expected, name):
    _, _, oracle, _ = expected[CASES[name].model]
    gradients, norms, *_ = zip(*results[name], strict=True)
    assert_same_copies(gradients)
    whole = assembled(gradients, {name: value.shape for name, value in oracle.gradients.items()})
    error, worst = largest_error(whole, oracle.gradients, lambda value: value.abs().max())
    assert error <= BOUND, f"{worst}: off by {error:.2g} of its largest gradient"
    assert norms == pytest.approx(oracle.norms * len(norms), rel=BOUND)


@pytest.mark.parametrize("name", CASES)
def test_log_probs_of_student_and_teacher(results, expected, name):
    """The student's with the given experts, then its own; the teacher's with its own."""
    _, (groups, _), _, own = expected[CASES[name].model]
    given = {response.sequence: torch.tensor(response.log_pi) for group in groups for response in group}
    for _, _, *ours in results[name]:
        for found, theirs in zip(ours, (given, own, own), strict=True):
            for sequence, log_probs in found.items():
                torch.testing.assert_close(log_probs, theirs[sequence], rtol=0, atol=BOUND)


def test_the_experts_make_a_difference(expected):
    for _, (groups, _), _, own in expected.values():
        gaps = [torch.tensor(r.log_pi) - own[r.sequence] for group in groups for r in group]
        assert torch.cat(gaps).abs().mean() > 0.1
