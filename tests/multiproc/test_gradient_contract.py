"""Gradients, their norm and updated weights of the trainer against float64 autograd of the transformers model.

Other tests of the trainer compare layouts with each other, so an error that all layouts share passes there. The oracle
(gradient_oracle.py) shares no code with the trainer.
"""

import math
import random
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from gradient_oracle import Oracle, Response
from harness import run_ranks
from tiny_models import HAS_GATED_DELTA_NETS, make_model

from rlad_megatron.config import OBJECTIVES, LayoutConfig, ObjectiveConfig, OptimizerConfig

pytestmark = pytest.mark.multiproc

# Of each tensor: max |ours - oracle| / max |oracle|. The trainer runs in float32, whose rounding error of 6e-8 grows to
# 9e-6 over layers and tokens. A wrong factor, slice or token makes 1e-2 or more.
BOUND = 2e-5
# Of each tensor's change: |ours - oracle| / |oracle|, Euclidean. Rounding the weights to float32 makes 2e-5.
WEIGHTS_BOUND = 1e-4
HYBRID_WEIGHTS_BOUND = 5e-4  # Adam divides by the small gradients of decays
# Between sums in two orders. Up to 1e-6 on the CPUs seen.
WAVES_BOUND = 5e-6

VOCAB = 203  # padded to 256
SIZES = {
    "hidden_size": 54,
    "num_hidden_layers": 3,
    "num_attention_heads": 18,
    "num_key_value_heads": 6,
    "head_dim": 14,
    "intermediate_size": 74,
    "vocab_size": VOCAB,
}
FAMILIES = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    "qwen3_moe": {"tie_word_embeddings": False, "num_experts": 5, "moe_intermediate_size": 22},
}
# With more layers, for layouts that deal chunks of layers to stages or experts to ranks.
DEEP = {
    "qwen3-deep": {"tie_word_embeddings": True, "num_hidden_layers": 6},
    "qwen3_moe-deep": {
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "num_experts": 6,
        "moe_intermediate_size": 22,
    },
}
# Of two kinds of layers.
GATED_DELTA_NETS = {
    "tie_word_embeddings": False,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "initializer_range": 0.07,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6},
}
HYBRIDS = {
    "qwen3_5_text": GATED_DELTA_NETS,
    "qwen3_5_moe_text": GATED_DELTA_NETS
    | {"num_experts": 6, "moe_intermediate_size": 22, "shared_expert_intermediate_size": 26},
}
TEMPERATURE = 0.7
BUDGET = 48  # tokens of a micro-batch
# Per group: prompt tokens, and response tokens of each member. The second group has equal rewards and is dropped.
# One of the others has a sequence that is shorter than the chunks of context parallelism are many.
LENGTHS = [(5, (7, 12, 3)), (1, (4, 9, 2)), (11, (1, 6, 17)), (2, (13, 1, 10))]
LONGEST = 50  # at least as long as any response
REWARDS = [(1.0, 0.0, 0.25), (0.1, 0.1, 0.1), (-1.0, 2.0, 0.5), (3.0, 0.0, 3.0)]

# Not the defaults: no two factors are equal, and every term of a loss counts.
OBJECTIVE = {"alpha": 0.6, "teacher_clamp": 0.9, "eps_low": 0.15, "eps_high": 0.25, "kl_coefficient": 0.3}
# Adam ignores the scale of gradients unless they are as small as its epsilon. Clipping brings them there, so that the
# weights show whether clipping and its factor are right.
OPTIMIZER = OptimizerConfig(lr=1e-2, beta1=0.85, beta2=0.97, weight_decay=0.2, clip_grad=1e-6)

MODELS = FAMILIES | DEEP | (HYBRIDS if HAS_GATED_DELTA_NETS else {})

# Ranks, layout. These with every objective: the vocabulary or the tokens with loss are cut.
LAYOUTS = {
    "tp1": (1, LayoutConfig()),
    "tp2-sp": (2, LayoutConfig(tensor_parallel=2, sequence_parallel=True)),
    "dp2": (2, LayoutConfig()),
    "cp2": (2, LayoutConfig(context_parallel=2)),
}
# These with one objective and in waves: the loss does not see how they differ from those above.
MORE = {
    "tp2": (2, LayoutConfig(tensor_parallel=2)),
    "pp2": (2, LayoutConfig(pipeline_parallel=2)),
    "tp2-sp-dp2": (4, LayoutConfig(tensor_parallel=2, sequence_parallel=True)),
    "tp2-pp2": (4, LayoutConfig(tensor_parallel=2, pipeline_parallel=2)),
    "pp2-dp2": (4, LayoutConfig(pipeline_parallel=2)),
}
PAIRS = {
    "cp2-tp2": (4, LayoutConfig(tensor_parallel=2, context_parallel=2)),
    "cp2-tp2-sp": (4, LayoutConfig(tensor_parallel=2, sequence_parallel=True, context_parallel=2)),
    "cp2-pp2": (4, LayoutConfig(pipeline_parallel=2, context_parallel=2)),
    "cp2-dp2": (4, LayoutConfig(context_parallel=2)),
}
STAGES = {
    "pp2-vpp2-uneven": (2, LayoutConfig(1, 2, virtual_pipeline=2, first_stage_layers=2)),
    "pp2-uneven": (2, LayoutConfig(1, 2, last_stage_layers=2)),
    "pp4-uneven": (4, LayoutConfig(1, 4, first_stage_layers=1, last_stage_layers=1)),
    "pp2-vpp3-dp2": (4, LayoutConfig(1, 2, virtual_pipeline=3)),
    "tp2-sp-pp2-vpp3": (4, LayoutConfig(2, 2, True, virtual_pipeline=3)),
    "cp2-pp2-vpp3": (4, LayoutConfig(1, 2, context_parallel=2, virtual_pipeline=3)),
}
EXPERTS = {
    "ep2": (2, LayoutConfig(expert_parallel=2)),
    "ep2-dp4": (4, LayoutConfig(expert_parallel=2)),
    "ep2-etp2": (4, LayoutConfig(expert_parallel=2, expert_tensor_parallel=2)),
    "cp2-ep2": (2, LayoutConfig(context_parallel=2, expert_parallel=2)),
    "ep2-pp2": (4, LayoutConfig(1, 2, expert_parallel=2)),
    "ep2-pp2-vpp2": (4, LayoutConfig(1, 2, virtual_pipeline=2, expert_parallel=2)),
    "ep2-tp2-sp": (4, LayoutConfig(2, 1, True, expert_parallel=2)),
    "ep2-etp1-tp2-sp": (4, LayoutConfig(2, 1, True, expert_parallel=2, expert_tensor_parallel=1)),
    "ep2-etp1-tp2-sp-pp2-vpp2": (
        8,
        LayoutConfig(2, 2, True, virtual_pipeline=2, expert_parallel=2, expert_tensor_parallel=1),
    ),
}
IN_WAVES = ("trrd-sequence_mean", "trrd-token_mean")
LAYOUTS_OF = {
    **dict.fromkeys(("qwen2", *IN_WAVES), LAYOUTS | MORE),
    **dict.fromkeys(("qwen3", "qwen3_moe"), LAYOUTS | MORE | PAIRS),
    "qwen3-deep": STAGES,
    "qwen3_moe-deep": EXPERTS,
    "qwen3_5_text": LAYOUTS | MORE | PAIRS,
    "qwen3_5_moe_text": LAYOUTS | EXPERTS,
}


@dataclass(frozen=True)
class Workload:
    """What is trained. The oracle computes it once, for every layout."""

    family: str
    objective: ObjectiveConfig
    updates: int = 1
    old: bool = False  # pi_old is given; otherwise it is the detached pi_S of the same forward


@dataclass(frozen=True)
class Case:
    workload: str
    layout: str
    fused: bool = True
    waves: int = 0  # groups arrive in any order, and the update is accumulated over so many waves of them
    overlap: bool = False

    @property
    def is_scored(self) -> bool:
        """Whether log-probs are computed. They do not depend on the objective."""
        return self.workload in MODELS or not self.fused


def objective_config(**changes):
    return ObjectiveConfig(**(OBJECTIVE | changes))


# Adam's moments show in a second update. test_trainer.py has more, with experts and chunks over ranks too.
TWICE = ("qwen3", "qwen2", "qwen3_moe")
WORKLOADS = {model: Workload(model, objective_config(), 2 if model in TWICE else 1) for model in MODELS}
# How tokens are weighed does not depend on the objective: each objective with one way, and the other way with one.
for objective, aggregation in (*product(OBJECTIVES, ("sequence_mean",)), ("trrd", "token_mean")):
    config = objective_config(name=objective, aggregation=aggregation)
    WORKLOADS[f"{objective}-{aggregation}"] = Workload("qwen2", config)
    if objective != "cross_entropy":
        WORKLOADS[f"{objective}-{aggregation}-old"] = Workload("qwen2", config, old=True)
WORKLOADS["gspo-old"] = Workload(
    "qwen2", objective_config(name="grpo", ratio="sequence", eps_low=0.01, eps_high=0.02), old=True
)
WORKLOADS["kl-and-entropy"] = Workload(
    "qwen2", objective_config(name="kdrl", reference_kl=0.4, entropy_coefficient=0.3)
)
for correction in ("truncated_is", "icepop"):
    config = objective_config(mismatch_correction=correction, mismatch_cap=1.3)
    WORKLOADS[correction] = Workload("qwen2", config)
    WORKLOADS[f"{correction}-old"] = Workload("qwen2", config, old=True)

CASES = {
    f"{workload}-{layout}": Case(workload, layout)
    for workload in WORKLOADS
    for layout in LAYOUTS_OF.get(workload, LAYOUTS)
    # Refused: experts over ranks need sequence parallelism.
    if workload != "qwen3_moe" or layout not in ("tp2", "cp2-tp2", "tp2-pp2")
}
CASES |= {
    f"{workload}-{layout}-waves{suffix}": Case(workload, layout, waves=3, overlap=bool(suffix))
    for workload in IN_WAVES
    for layout in LAYOUTS | MORE
    for suffix in (("", "-overlap") if layout in ("dp2", "cp2") else ("",))
}
CASES |= {
    f"all-logits-{workload}-{layout}": Case(workload, layout, fused=False)
    for workload, layout in (
        *product(("trrd-sequence_mean-old",), ("tp1", "tp2-sp", "cp2")),
        ("kl-and-entropy", "tp2-sp"),
        ("distilled_rl-sequence_mean", "tp2-sp"),
    )
}
CASES["distilled_rl-sequence_mean-cp2-pp2"] = Case("distilled_rl-sequence_mean", "cp2-pp2")
CASES |= {
    f"{workload}-{layout}-waves-overlap": Case(workload, layout, waves=3, overlap=True)
    for workload, layout in (("qwen3-deep", "pp2-vpp3-dp2"), ("qwen3_moe-deep", "ep2-pp2-vpp2"))
}
LAYOUTS = LAYOUTS | MORE | PAIRS | STAGES | EXPERTS


def make_batches(oracle, workload):
    """Groups for each update. Given log-probs are near the student's, so that clip and clamp bind on some tokens."""
    generator = torch.Generator().manual_seed(7)

    def noisy(log_probs, scale):
        noise = torch.randn(len(log_probs), generator=generator)
        return (torch.as_tensor(log_probs) + scale * noise).float().tolist()

    def make_response(prompt, length, reward):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        response = Response(prompt, tokens, reward)
        with torch.no_grad():
            log_pi = oracle.log_probs(response)
        old = noisy(log_pi, 0.4)
        response.teacher, response.sampler = noisy(log_pi, 1.0), noisy(old, 0.3)
        response.reference = noisy(log_pi, 0.7) if workload.objective.reference_kl else []
        response.old = old if workload.old else None
        response.log_pi = log_pi.tolist()
        return response

    batches = []
    for _ in range(workload.updates):
        groups = []
        for (prompt_length, lengths), rewards in zip(LENGTHS, REWARDS, strict=True):
            prompt = torch.randint(0, VOCAB, (prompt_length,), generator=generator).tolist()
            groups.append([make_response(prompt, *each) for each in zip(lengths, rewards, strict=True)])
        batches.append(groups)
    return batches


def build(folder, case, workload, groups):
    """The actor of a case. The only function here that knows how a trainer is built."""
    from rlad_megatron.config import LossConfig, ModelConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig
    from rlad_megatron.models.config_json import read_model_spec
    from rlad_megatron.models.shard_plan import build_shard_plan
    from rlad_megatron.parallel.groups import seed_everything
    from rlad_megatron.trainer.actor import Actor

    student = ModelConfig(path=folder, layout=LAYOUTS[case.layout][1], precision="fp32")
    config = RunConfig(
        student=student,
        objective=workload.objective,
        optimizer=OPTIMIZER,
        rollout=RolloutConfig(sampling=SamplingConfig(temperature=TEMPERATURE)),
        train=TrainConfig(steps=workload.updates, microbatch_tokens=BUDGET),
        loss=LossConfig(fused=case.fused),
    )
    if case.overlap:
        config = replace(config, optimizer=replace(OPTIMIZER, overlap_grad_reduce=True))
    seed_everything(0, groups)
    spec = read_model_spec(folder)
    return Actor(config, spec, groups, build_shard_plan(spec, student.layout))


def make_samples(groups, objective, whole=None):
    """The samples of one update, or of a part of it, from the functions that a run uses."""
    from rlad_megatron.data.samples import samples_from_rollouts, samples_from_traces
    from rlad_megatron.types import Prompt, Rollout

    def prompt(response):
        return Prompt(id="", tokens=tuple(response.prompt), answer="", subset="", text="")

    if objective.name == "cross_entropy":
        traces = [(prompt(response), response.tokens) for group in groups for response in group]
        return samples_from_traces(traces, objective.aggregation)
    rollouts = [
        [Rollout(prompt(r), r.tokens, r.sampler, "stop", [], reward=r.reward) for r in group] for group in groups
    ]
    samples = samples_from_rollouts(rollouts, objective, whole)
    told = {response.sequence: response for group in groups for response in group}
    for sample in samples:
        response = told[tuple(sample.tokens.tolist())]
        sample.teacher_log_probs = torch.tensor(response.teacher)
        sample.reference_log_probs = torch.tensor(response.reference) if response.reference else None
        sample.old_log_probs = None if response.old is None else torch.tensor(response.old)
    return samples


def gather_gradients(chunk):
    """Make `main_grad` whole on every rank: after Megatron's reduce-scatter each rank holds one valid shard."""
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = shard_buffer(bucket.grad_data, ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def pieces_of(actor, values):
    """This rank's values as (Hugging Face name, slices in that tensor, value). Checks that vocabulary padding is 0."""
    found = []
    for entry in actor.entries:
        padding = values[entry.name].clone()
        for piece in entry.pieces:
            local = tuple(slice(*ends) for ends in piece.local_slices)
            found.append((piece.hf_name, piece.hf_slices, values[entry.name][local].clone()))
            padding[local] = 0
        assert not padding.any(), entry.name
    return found


def update(actor, groups, case, objective):
    """One update, at once or in waves."""
    if not case.waves:
        return actor.update(make_samples(groups, objective))
    from rlad_megatron.objectives.aggregate import wave_scale

    lengths = [len(response.tokens) for group in groups for response in group]
    shuffled = random.Random(1).sample(groups, len(groups))  # each wave has a group that is kept
    waves = [make_samples(shuffled[i :: case.waves], objective, (len(lengths), LONGEST)) for i in range(case.waves)]
    for i, samples in enumerate(waves):
        actor.accumulate(samples, last=case.overlap and i == case.waves - 1)
    return actor.finish_update(wave_scale(lengths, objective.aggregation, LONGEST))


def run_case(actor, case, workload, batches):
    """The first update's gradients, the norm of each update, and the weights after the last, as pieces.

    And before the first: the first batch's log-probs, by sequence, of a case that is scored.
    """
    from rlad_megatron.objectives.entropy import EntropyBonus

    actor.config = replace(actor.config, objective=workload.objective)
    actor.entropy_bonus = EntropyBonus(workload.objective)
    log_probs = {}
    if case.is_scored:
        scored = make_samples(batches[0], workload.objective)
        log_probs = dict(zip([tuple(it.tokens.tolist()) for it in scored], actor.log_probs(scored), strict=True))
    gradients = []
    step = actor.optimizer.step

    def step_on_whole_gradients():
        if not gradients:
            for chunk in actor.chunks:
                gather_gradients(chunk)
            grads = {name: parameter.main_grad for name, parameter in actor.parameters().items()}
            gradients.extend(pieces_of(actor, grads))
        return step()

    actor.optimizer.step = step_on_whole_gradients
    norms = [update(actor, groups, case, workload.objective).metrics["grad_norm"] for groups in batches]
    actor.optimizer.step = step
    weights = pieces_of(actor, {name: parameter.detach() for name, parameter in actor.parameters().items()})
    return gradients, norms, weights, log_probs


def exports_its_folder(actor, folder):
    """Whether every tensor, put together from the ranks' slices, is bit-equal to the one that was loaded."""
    from safetensors.torch import load_file

    loaded, whole = load_file(f"{folder}/model.safetensors"), dict(actor.weights)
    return {name: torch.equal(tensor, loaded[name]) for name, tensor in whole.items()}


def run_cases(rank, world_size, name_of_layout, folders, batches):
    """The cases of a layout.

    Those of one update share an actor, whose first weights are put back after each: to build one takes longest.
    """
    from rlad_megatron import platform
    from rlad_megatron.parallel.groups import build_groups
    from rlad_megatron.parallel.place import place_of

    platform.setup()
    layout = LAYOUTS[name_of_layout][1]
    groups = build_groups(layout)
    assert groups.place == place_of(rank, layout, world_size)
    found, actors = {}, {}
    for name, case in CASES.items():
        if case.layout != name_of_layout:
            continue
        workload = WORKLOADS[case.workload]
        key = (workload.family, workload.updates, case.fused, case.overlap)
        if key not in actors:
            actor = build(folders[workload.family], case, workload, groups)
            actors[key] = actor, {name: parameter.detach().clone() for name, parameter in actor.parameters().items()}
            assert all(exports_its_folder(actor, folders[workload.family]).values()), name
        actor, first = actors[key]
        found[name] = run_case(actor, case, workload, batches[case.workload])
        for parameter, value in zip(actor.parameters().values(), first.values(), strict=True):
            parameter.detach().copy_(value)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        model: make_model(tmp_path_factory.mktemp(model), model.removesuffix("-deep"), **SIZES | changes)
        for model, changes in MODELS.items()
    }


@pytest.fixture(scope="module")
def expected(folders):
    """(batches, the oracle's results) of each workload."""
    found = {}
    for name, workload in WORKLOADS.items():
        oracle = Oracle(folders[workload.family], TEMPERATURE)
        batches = make_batches(oracle, workload)
        found[name] = batches, oracle.updates(batches, workload.objective, OPTIMIZER)
    return found


@pytest.fixture(scope="module")
def results(folders, expected):
    """What each rank returned, by case.

    Processes are started for each layout: gloo has three threads for each of its some fifteen groups.
    """
    found = {}
    for layout, (ranks, _) in LAYOUTS.items():
        batches = {case.workload: expected[case.workload][0] for case in CASES.values() if case.layout == layout}
        by_rank = run_ranks(run_cases, ranks, layout, folders, batches)
        found |= {name: [results[name] for results in by_rank] for name in by_rank[0]}
    return found


def assert_same_copies(ranks):
    """Copies of a piece on several ranks are bit-identical. Otherwise replicated weights would drift apart."""
    first = {}
    for name, slices, value in (piece for pieces in ranks for piece in pieces):
        assert torch.equal(value, first.setdefault((name, slices), value)), (name, slices)


def assembled(ranks, shapes):
    """Whole tensors from the pieces of all ranks, NaN where no rank has a piece."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for name, slices, value in (piece for pieces in ranks for piece in pieces):
        whole[name][tuple(slice(*ends) for ends in slices)] = value
    return whole


def largest_error(ours, theirs, norm):
    """(relative error, name) of the worst tensor."""
    # No token chose some of the experts: their gradient is 0 exactly.
    errors = {
        name: (norm(ours[name] - value) / (norm(value) if value.any() else 1)).item() for name, value in theirs.items()
    }
    assert not any(math.isnan(error) for error in errors.values()), errors
    return max((error, name) for name, error in errors.items())


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_their_norm(results, expected, name):
    oracle = expected[CASES[name].workload][1]
    gradients, norms, *_ = zip(*results[name], strict=True)
    assert_same_copies(gradients)
    whole = assembled(gradients, {name: value.shape for name, value in oracle.gradients.items()})
    error, worst = largest_error(whole, oracle.gradients, lambda value: value.abs().max())
    assert error <= BOUND, f"{worst}: off by {error:.2g} of its largest gradient"
    for of_rank in norms:
        assert of_rank == pytest.approx(oracle.norms, rel=BOUND)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.waves])
def test_waves_give_the_gradients_of_the_whole(results, expected, name):
    shapes = {name: value.shape for name, value in expected[CASES[name].workload][1].gradients.items()}
    waves, whole = (
        torch.cat([value.flatten() for value in assembled([ranks[0] for ranks in results[case]], shapes).values()])
        for case in (name, f"{CASES[name].workload}-{CASES[name].layout}")
    )
    assert torch.linalg.vector_norm(waves - whole) <= WAVES_BOUND * torch.linalg.vector_norm(whole)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.workload in MODELS])
def test_weights_after_clipped_updates(results, expected, name):
    oracle = expected[CASES[name].workload][1]
    weights = [weights for _, _, weights, _ in results[name]]
    assert_same_copies(weights)
    assert min(oracle.norms) > 100 * OPTIMIZER.clip_grad
    whole = assembled(weights, {name: value.shape for name, value in oracle.weights.items()})
    ours, theirs = (
        {name: weights[name] - before for name, before in oracle.before.items()} for weights in (whole, oracle.weights)
    )
    error, worst = largest_error(ours, theirs, torch.linalg.vector_norm)
    bound = HYBRID_WEIGHTS_BOUND if CASES[name].workload in HYBRIDS else WEIGHTS_BOUND
    assert error <= bound, f"{worst}: off by {error:.2g} of its change"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_scored])
def test_log_probs(results, expected, name):
    batches, _ = expected[CASES[name].workload]
    theirs = {response.sequence: response.log_pi for group in batches[0] for response in group}
    for *_, ours in results[name]:
        assert ours
        for sequence, log_probs in ours.items():
            torch.testing.assert_close(log_probs, torch.tensor(theirs[sequence]), rtol=0, atol=BOUND)


def test_clip_and_clamp_bind_on_some_tokens(expected):
    for name, workload in WORKLOADS.items():
        oracle = expected[name][1]
        objective = workload.objective.name
        if objective == "trrd" or (objective in ("grpo", "kdrl", "distilled_rl") and workload.old):
            assert 0.1 < oracle.clipped < 0.9, name
        if objective in ("trrd", "distilled_rl"):
            assert 0.1 < oracle.clamped < 0.9, name


def test_micro_batches_hold_several_samples():
    from rlad_megatron.data.packing import assign_microbatches

    kept = [prompt + length for i, (prompt, lengths) in enumerate(LENGTHS) if i != 1 for length in lengths]
    for dp_size in (1, 2):
        for microbatches in assign_microbatches(kept, BUDGET, dp_size):
            assert len(microbatches) > 1 and max(len(members) for members in microbatches) > 1
