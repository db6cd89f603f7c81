"""The trainer: one loss curve for every layout and every packing, and resume equal to no interruption."""

import functools

import pytest
import torch
from harness import run_ranks
from tiny_models import HAS_GATED_DELTA_NETS, make_model
from transformers import AutoModelForCausalLM, Qwen3Config

pytestmark = pytest.mark.multiproc

VOCAB = 203
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, hidden in (("student", 64), ("teacher", 96)):
        torch.manual_seed(len(name))
        config = Qwen3Config(
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=112,
            vocab_size=VOCAB,
            max_position_embeddings=256,
            tie_word_embeddings=name == "student",
            initializer_range=0.1,
        )
        made[name] = str(tmp_path_factory.mktemp(name))
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def make_samples(step, long=True):
    """long: one has more tokens than a micro-batch's budget."""
    from rlad_megatron.objectives.aggregate import token_weights
    from rlad_megatron.types import Sample

    generator = torch.Generator().manual_seed(100 + step)
    lengths = torch.randint(1, 30, (8, 2), generator=generator).tolist()
    lengths[4] = [31, 70] if long else lengths[4]
    weights = token_weights([response for _, response in lengths], "sequence_mean")
    return [
        Sample(
            tokens=torch.randint(0, VOCAB, (prompt + response,), generator=generator),
            prompt_length=prompt,
            weight=weight,
            advantage=float(torch.randn((), generator=generator)),
            sampler_log_probs=-torch.rand(response, generator=generator) * 6,
            solved=response % 3 == 0,
        )
        for (prompt, response), weight in zip(lengths, weights, strict=True)
    ]


def build(folders, layout, budget, teacher_layout, precision="fp32", fused=True, options=()):
    from rlad_megatron import platform
    from rlad_megatron.config import (
        LayoutConfig,
        LossConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        TeacherConfig,
        TrainConfig,
    )
    from rlad_megatron.config.recipe import apply_overrides
    from rlad_megatron.models.config_json import read_model_spec
    from rlad_megatron.models.shard_plan import build_shard_plan
    from rlad_megatron.parallel.groups import build_groups, seed_everything
    from rlad_megatron.teacher.teacher import build_teacher
    from rlad_megatron.trainer.actor import Actor

    platform.setup()
    student = ModelConfig(folders["student"], LayoutConfig(*layout), precision)
    teacher_model = TeacherConfig(folders["teacher"], LayoutConfig(*teacher_layout), "fp32")
    config = RunConfig(
        student=student,
        teacher=teacher_model,
        optimizer=OptimizerConfig(lr=2e-3, clip_grad=1.0, weight_decay=0.01, decay="cosine", warmup_steps=1),
        train=TrainConfig(steps=STEPS, microbatch_tokens=budget),
        loss=LossConfig(fused=fused),
    )
    config = apply_overrides(config, list(options))
    teacher_groups = build_groups(teacher_model.layout)
    groups = build_groups(student.layout)
    seed_everything(0, groups)
    spec = read_model_spec(student.path)
    actor = Actor(config, spec, groups, build_shard_plan(spec, student.layout))
    return actor, build_teacher(config, config.teacher, read_model_spec(folders["teacher"]), teacher_groups)


def one_step(actor, teacher, step, waves=1, record=None):
    """record: before the first step, the student's log-probs of its samples."""
    samples = make_samples(step)
    for sample, log_probs in zip(samples, teacher.log_probs(samples), strict=True):
        sample.teacher_log_probs = log_probs
    samples[1].watched = samples[-1].watched = record is not None
    for i in range(waves):
        actor.accumulate(samples[i::waves], last=i == waves - 1)
    metrics = actor.finish_update().metrics
    if record is not None and step == 0:
        the_watched_are_recorded(samples, record)
    return metrics


def the_watched_are_recorded(samples, log_probs):
    """On rank 0: at each token what the loss computed, however the layout spread the tokens."""
    for i, sample in enumerate(samples):
        if torch.distributed.get_rank() or not sample.watched:
            assert sample.token_stats is None
            continue
        stats = sample.token_stats
        torch.testing.assert_close(stats["log_probs"], log_probs[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(stats["teacher_gap"], log_probs[i] - sample.teacher_log_probs, atol=1e-5, rtol=0)
        assert stats["clamped"].tolist() == (stats["teacher_gap"].abs() > 1).tolist()


def curve(rank, world_size, folders, layout, budget, teacher_layout, fused=True, options=()):
    actor, teacher = build(folders, layout, budget, teacher_layout, fused=fused, options=options)
    first = actor.log_probs(make_samples(9))
    loaded = [tensor for _, tensor in actor.weights]  # as servers get them: whole, from one copy
    with actor.perturbed(bit=2):  # before any training: the weights are the same in every layout, to the bit
        perturbed = actor.log_probs(make_samples(9))
    assert min((one - other).abs().max().item() for one, other in zip(first, perturbed, strict=True)) > 1e-3
    assert all(map(torch.equal, actor.log_probs(make_samples(9)), first))
    before = actor.log_probs(make_samples(0))
    metrics = [one_step(actor, teacher, step, record=before) for step in range(STEPS)]
    log_probs = actor.log_probs(make_samples(9))
    before = {name: value.clone() for name, value in actor.parameters().items()}
    actor.wait_for_param_gather()
    # The pass has waited for all of them, the head's too.
    assert all(torch.equal(before[name], value) for name, value in actor.parameters().items())
    return metrics, log_probs, perturbed, loaded


def assert_same_curve(ours, reference, atol=1e-4):
    for ours_step, reference_step in zip(ours[0], reference[0], strict=True):
        assert set(ours_step) == set(reference_step)
        for key, value in reference_step.items():
            if key != "tokens/padding_share":  # depends on the packing
                assert ours_step[key] == pytest.approx(value, abs=atol, rel=1e-4), key
    for our_values, reference_values in zip(ours[1:], reference[1:], strict=False):
        for a, b in zip(our_values, reference_values, strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def reference(folders):
    """One process, one micro-batch, and the loss from the logits of all tokens; the cases below use the fused one."""
    (result,) = run_ranks(curve, 1, folders, (1, 1), 4096, (1, 1), False)
    return result


def test_reference_learns(reference):
    metrics = reference[0]
    assert metrics[0]["grad_norm"] > 1e-3
    assert metrics[0]["ratio/clip_fraction"] > 0 and metrics[0]["trrd/clamp_fraction"] > 0
    assert metrics[0]["trrd/teacher_gap_mean"] != metrics[1]["trrd/teacher_gap_mean"]


# Options that change how it is computed, and not what comes out.
FULL, SELECTIVE, OFFLOAD = "train.recompute=full", "train.recompute=selective", "teacher.offload=true"
FIRST, ATTENTION = "train.recompute_layers=1", "train.recompute_modules=[core_attn]"
OVERLAP = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")

# Ranks, LayoutConfig of student and teacher (its first fields: TP, PP, whether SP, CP), fused, options.
LAYOUTS = {
    "many-microbatches-full-recompute": (1, (1, 1), (1, 1), True, (FULL, OFFLOAD)),
    "pp2-teacher-dp2-selective-recompute-overlap": (2, (1, 2), (1, 1), True, (SELECTIVE, *OVERLAP)),
    "dp2-teacher-tp2-offload-overlap": (2, (1, 1), (2, 1), True, (OFFLOAD, *OVERLAP)),
    "tp2-sp-both-recompute-of-a-layer": (2, (2, 1, True), (2, 1, True), True, (FULL, FIRST)),
    "dp2-teacher-cp2": (2, (1, 1), (1, 1, False, 2)),
    "cp2-teacher-dp2-selective-recompute-overlap": (2, (1, 1, False, 2), (1, 1), True, (SELECTIVE, *OVERLAP)),
    "tp2-sp-all-logits": (2, (2, 1, True), (2, 1), False),
    "tp2-dp2-teacher-pp2-dp2-full-recompute-offload": (4, (2, 1), (1, 2), True, (FULL, OFFLOAD)),
    "tp2-pp2-both-recompute-of-attention": (4, (2, 2), (2, 2), True, (SELECTIVE, ATTENTION)),
    "tp2-pp2-sp-both": (4, (2, 2, True), (2, 2, True)),
}


def curves(rank, world_size, folders):
    found = {
        name: curve(rank, world_size, folders, layout, 64, teacher_layout, *others)
        for name, (ranks, layout, teacher_layout, *others) in LAYOUTS.items()
        if ranks == world_size
    }
    if world_size == 2:
        found["parameters"] = [parameters_after_a_step(folders, options) for options in ((), OVERLAP)]
    return found


def parameters_after_a_step(folders, options):
    """This data-parallel rank's parameters as whoever reads them after `TrainerRun.finish_update` finds them.

    Also the metrics of the step, by a clock on which a forward pass takes the second rank twice as long as the first
    and the sum of gradients longer still, and the rank's bytes by part.
    """
    from rlad_megatron.perf import Performance
    from rlad_megatron.run import TrainerRun

    actor, teacher = build(folders, (1, 1), 64, (1, 1), options=options)
    others = dict.fromkeys(("tokenizer", "hooks", "metrics", "timeline"))
    samples = make_samples(0)
    for sample, log_probs in zip(samples, teacher.log_probs(samples), strict=True):
        sample.teacher_log_probs = log_probs
    perf = Performance(actor.config, actor.spec, None, rate=1e9)
    run = TrainerRun(config=actor.config, actor=actor, perf=perf, **others)
    (chunk,) = actor.chunks
    seconds, sum_gradients = 0, chunk.finish_grad_sync

    def take(duration):
        nonlocal seconds
        seconds += duration

    def take_long_to_sum(*arguments, **named):
        take(100)
        return sum_gradients(*arguments, **named)

    actor.stopwatch._now = lambda: seconds
    chunk.register_forward_pre_hook(lambda *_: take(1 + torch.distributed.get_rank()))
    chunk.finish_grad_sync = take_long_to_sum
    with run.timers("step"):
        run.accumulate(samples, last=True)
        run.finish_update()
    parameters = {name: parameter.detach().clone() for name, parameter in actor.parameters().items()}
    return parameters, run.step_times(), run.memory()


@pytest.fixture(scope="module")
def curves_on(folders):
    return functools.cache(lambda ranks: run_ranks(curves, ranks, folders))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_curve(curves_on, reference, name):
    for results in curves_on(LAYOUTS[name][0]):
        assert_same_curve(results[name], reference)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_is_counted_over_all_ranks(curves_on, name):
    from rlad_megatron.config import LayoutConfig
    from rlad_megatron.data.packing import pack

    ranks, sizes, *_ = LAYOUTS[name]
    layout = LayoutConfig(*sizes)
    dp_size, cp_size = ranks // layout.model_ranks, layout.context_parallel
    samples, multiple = make_samples(0), 16 * layout.tensor_parallel * cp_size
    packed = [
        pack(samples, budget_tokens=64, multiple=multiple, dp_rank=dp, dp_size=dp_size, cp_rank=cp, cp_size=cp_size)
        for dp in range(dp_size)
        for cp in range(cp_size)
    ]
    computed = sum(microbatch.tokens.numel() for rank in packed for microbatch in rank)
    needed = sum(sample.tokens.numel() for sample in samples)
    for results in curves_on(ranks):
        assert results[name][0][0]["tokens/padding_share"] == pytest.approx(1 - needed / computed)


def test_after_a_step_every_rank_holds_the_new_parameters(curves_on):
    for results in curves_on(2):
        at_once, overlapped = (parameters for parameters, _, _ in results["parameters"])
        for name, parameter in at_once.items():
            torch.testing.assert_close(overlapped[name], parameter, atol=1e-6, rtol=0, msg=name)


def test_the_rank_that_the_others_wait_for_is_named(curves_on):
    told = [metrics for results in curves_on(2) for _, metrics, _ in results["parameters"]]
    for metrics in told:
        assert metrics["slowest/update"] == 1 and metrics["slowest/update_over_mean"] == pytest.approx(4 / 3), metrics
        assert metrics["perf/mfu"] > 0 and metrics["perf/tokens_per_s"] > 0


def test_memory_by_part_in_float32(curves_on):
    for results in curves_on(2):
        parameters, _, memory = results["parameters"][0]
        size = sum(parameter.nbytes for parameter in parameters.values())
        assert memory["weights"] == memory["gradients"] == pytest.approx(size, rel=0.01)  # buffers are padded
        assert memory["optimizer"] == pytest.approx(size, rel=0.01), "two moments, cut over two ranks"


def train_save(rank, world_size, folders, checkpoints, layout):
    from pathlib import Path

    from rlad_megatron.trainer import checkpoint

    actor, teacher = build(folders, layout, 64, (1, 1))
    for step in range(2):
        one_step(actor, teacher, step)
        checkpoint.save(Path(checkpoints), step + 1, actor, {"step": step + 1}, run="a", keep=1)
        # As left by a run that went on to step 9 and was then set back.
        (Path(checkpoints) / "step_00000009").mkdir(exist_ok=True)
        torch.distributed.barrier()
    checkpoint.save(Path(checkpoints), 3, actor, {"step": 3}, run="another", keep=1)  # of which this one removes none


def resume(rank, world_size, folders, checkpoints, layout):
    from pathlib import Path

    from rlad_megatron.errors import CheckpointError
    from rlad_megatron.trainer import checkpoint

    actor, teacher = build(folders, layout, 64, (1, 1))
    source = Path(checkpoints) / "step_00000002"
    state = checkpoint.load(source, actor)["loop"]
    metrics, log_probs = one_step(actor, teacher, 2), actor.log_probs(make_samples(9))
    changed, _ = build(folders, layout, 64, (1, 1), options=["optimizer.lr=1e-3", "optimizer.beta1=0.8"])
    checkpoint.load(source, changed)
    group = changed.optimizer.param_groups[0]
    meta, weights = source / "run.json", sorted(source.glob("*.distcp"))[-1]
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    torch.distributed.barrier()
    if rank == 0:
        weights.write_bytes(flipped)
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match=f"{weights}: damaged.*no earlier checkpoint is sound"):
        checkpoint.load(source, actor)
    later = source.with_name("step_00000003")
    torch.distributed.barrier()
    if rank == 0:
        source.joinpath("digests.json").unlink()
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match="digests.json: not found, though .* no earlier checkpoint is sound"):
        checkpoint.load(source, actor)
    torch.distributed.barrier()
    if rank == 0:  # as of an earlier version
        text = meta.read_text().replace('"run"', '"by"')
        meta.write_text(text.replace('"local"', '"transformer_engine"'))
        (later / "run.json").write_text("{}")
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match="transformer_impl=local, but .* saved with transformer_engine; "):
        checkpoint.load(source, actor)
    with pytest.raises(CheckpointError, match=f"{later / 'run.json'}: damaged.* resume_step=2$"):
        checkpoint.load(later, actor)
    return state, metrics, log_probs, (group["lr"], group["betas"][0])


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [((2, 1), (1, 2)), ((1, 1), (2, 1)), ((1, 1, False, 2), (1, 2))],
    ids=["tp2-pp2", "dp2-tp2", "cp2-pp2"],
)
def test_resume_in_another_layout_equals_no_interruption(folders, reference, tmp_path, saved, resumed):
    run_ranks(train_save, 2, folders, str(tmp_path), saved)
    kept = ["latest", "step_00000002", "step_00000003", "step_00000009.abandoned1", "step_00000009.abandoned2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    for state, metrics, log_probs, changed in run_ranks(resume, 2, folders, str(tmp_path), resumed):
        assert state == {"step": 2}
        assert_same_curve(([metrics], log_probs), ([reference[0][2]], reference[1]))
        assert changed == pytest.approx((metrics["lr"] / 2, 0.8))  # the configuration decides, not the checkpoint


def timeouts(rank, world_size):
    from rlad_megatron.config import LayoutConfig
    from rlad_megatron.parallel.groups import build_groups

    groups = build_groups(LayoutConfig(2, 1), timeout_s=7.0).collection
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in (groups.tp, groups.pp, groups.dp_cp)]


def test_collectives_of_the_models_groups_have_the_runs_timeout():
    """A rank that is stopped is only named when the others' collective ends (launch/heartbeat.py)."""
    assert run_ranks(timeouts, 2) == [[7.0] * 3] * 2


def poisoned_update(rank, world_size, folders):
    from rlad_megatron.trainer.setup import gradients_are_finite

    actor, teacher = build(folders, (2, 1), 64, (2, 1))
    metrics = [one_step(actor, teacher, 0)]
    before = {name: value.clone() for name, value in actor.parameters().items()}
    samples = make_samples(1)
    for sample, log_probs in zip(samples, teacher.log_probs(samples), strict=True):
        sample.teacher_log_probs = log_probs
    samples[3].teacher_log_probs[0] = float("nan")
    result = actor.update(samples)
    unchanged = all(torch.equal(before[name], value) for name, value in actor.parameters().items())
    metrics += [one_step(actor, teacher, step) for step in (1, 2)]
    finite = [gradients_are_finite(actor.chunks)]
    if rank == 1:
        actor.chunks[0].buffers[0].grad_data[5] = float("inf")
    finite.append(gradients_are_finite(actor.chunks))
    return result.skipped and unchanged, finite, (metrics, actor.log_probs(make_samples(9)))


def test_a_non_finite_update_is_skipped_and_leaves_no_trace(folders, reference):
    # This is also the case of plain TP 2.
    for skipped, finite, afterwards in run_ranks(poisoned_update, 2, folders):
        assert skipped
        assert_same_curve(afterwards, reference)
        assert finite == [True, False]  # on every rank, though one alone holds the infinity


def explicit_old(rank, world_size, folders):
    """A first step with pi_old from a separate pass; updates in bf16, fp16, with overlap, delayed scaling."""
    actor, teacher = build(folders, (1, 1), 64, (1, 1))
    samples = make_samples(0)
    for name, values in (
        ("teacher_log_probs", teacher.log_probs(samples)),
        ("old_log_probs", actor.log_probs(samples)),
    ):
        for sample, log_probs in zip(samples, values, strict=True):
            setattr(sample, name, log_probs)
    first = actor.update(samples).metrics
    second = actor.update(samples).metrics
    half, teacher = build(folders, (1, 1), 64, (1, 1), precision="bf16")
    dtypes = {str(parameter.dtype) for parameter in half.parameters().values()}
    untied = [untied_step(folders, options) for options in ((), OVERLAP)]
    return first, second, dtypes, one_step(half, teacher, 0), in_fp16(folders), untied, under_delayed_scaling(folders)


class DelayedScale:
    """What Transformer Engine does to one tensor of a product: FP8 at a scale that follows from earlier passes."""

    def __init__(self, dtype):
        self.dtype, self.scale, self.amax = dtype, 1.0, 0.0

    def __call__(self, values):
        self.amax = max(self.amax, values.abs().max().item())
        largest = torch.finfo(self.dtype).max
        return (values * self.scale).clamp(-largest, largest).to(self.dtype).to(values.dtype) / self.scale

    def renew(self):
        if self.amax:
            self.scale = torch.finfo(self.dtype).max / self.amax


def scale_with_delay(gpt):
    """Give each product of the layers FP8 inputs and output gradients; returns the inputs' scales."""
    inputs, gradients = [], []

    def renew(scales):
        for scale in scales:
            scale.renew()

    for name, module in gpt.decoder.named_modules():
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
            taken, given = DelayedScale(torch.float8_e4m3fn), DelayedScale(torch.float8_e5m2)
            inputs.append(taken)
            gradients.append(given)
            # The input's rounding has the gradient of the input itself.
            module.register_forward_pre_hook(lambda _, args, q=taken: (args[0] + (q(args[0]) - args[0]).detach(),))
            module.register_full_backward_pre_hook(lambda _, outputs, q=given: (q(outputs[0]), *outputs[1:]))
    gpt.register_forward_hook(lambda *_: renew(inputs) if torch.is_grad_enabled() else None)
    first = gpt.decoder.layers[0].self_attention.linear_qkv
    first.weight.register_post_accumulate_grad_hook(lambda *_: renew(gradients))  # the last of a backward pass
    return inputs


def under_delayed_scaling(folders):
    """Of first updates whose gradients are as small as those of long responses: how far off the layers' are.

    With the roundings of delayed scaling, as it is and where nothing is done about scales of 1.
    """
    exact = first_update(folders, "none", rounds=False)[0]
    found = []
    for recipe in ("delayed", "none"):
        layers, *others = first_update(folders, recipe, rounds=True)
        found.append(([((layers[name] - it).norm() / it.norm()).item() for name, it in exact.items()], *others))
    return found


def first_update(folders, recipe, *, rounds):
    """The layers' gradients, which scales of inputs a scoring pass had set before, and the passes of two updates."""
    from megatron.core.utils import unwrap_model

    actor, teacher = build(folders, (1, 1), 200, (1, 1), options=[f"student.fp8.recipe={recipe}"])
    scales = scale_with_delay(unwrap_model(actor.chunks[0])) if rounds else []
    samples = make_samples(0, long=False)  # gradients of one size
    for sample, log_probs in zip(samples, teacher.log_probs(samples), strict=True):
        sample.teacher_log_probs, sample.weight = log_probs, sample.weight * 1e-6
    actor.log_probs(samples)
    set_before = [scale.scale != 1 for scale in scales]
    passes, backward = [], actor._backward

    def counted(microbatches, *others, **recorded):
        passes.append(len(microbatches))
        return backward(microbatches, *others, **recorded)

    actor._backward = counted
    actor.update(samples)
    layers = {name: it.main_grad.clone() for name, it in actor.parameters().items() if "linear_" in name}
    actor.update(samples)
    return layers, set_before, passes


def in_fp16(folders):
    """Of two updates: gradient norm, loss scale afterwards. Before the second, in two waves, it is far too high."""
    results = []
    actor, teacher = build(folders, (1, 1), 64, (1, 1), precision="fp16")
    (scaler,) = [part.grad_scaler for part in actor.optimizer.chained_optimizers]
    for step, scale in ((0, None), (1, 2.0**40)):
        if scale:
            scaler._scale.fill_(scale)
        results.append((one_step(actor, teacher, step, waves=step + 1)["grad_norm"], scaler.scale.item()))
    # A teacher that is broken is not the scale's fault.
    samples = make_samples(2)
    for sample in samples:
        sample.teacher_log_probs = torch.full((sample.response_length,), float("nan"))
    broken = actor.update(samples)
    dtypes = {str(parameter.dtype) for parameter in actor.parameters().values()}
    return results, (broken.skipped, scaler.scale.item()), dtypes


def untied_step(folders, options):
    """An update of a student with an untied head; under overlap DDP waits for its gradient."""
    untied, teacher = build(folders | {"student": folders["teacher"]}, (1, 1), 4096, (1, 1), options=options)
    return one_step(untied, teacher, 0), untied.log_probs(make_samples(9))


def test_old_log_probs_of_their_own_pass_bf16_fp16_and_overlap(folders, reference):
    ((first, second, dtypes, half, fp16, (untied, overlapped), delayed),) = run_ranks(explicit_old, 1, folders)
    for key, value in reference[0][0].items():
        if key != "tokens/padding_share":  # the reference packs all into one micro-batch
            assert first[key] == pytest.approx(value, abs=1e-4, rel=1e-4), key
    assert second["ratio/mean"] != pytest.approx(first["ratio/mean"], abs=1e-4)  # pi_S has moved away from pi_old
    assert dtypes == {"torch.bfloat16"}
    assert half["grad_norm"] == pytest.approx(reference[0][0]["grad_norm"], rel=0.1)
    assert_same_curve(([overlapped[0]], overlapped[1]), ([untied[0]], untied[1]))

    ((norm, scale), (next_norm, next_scale)), broken, dtypes = fp16
    assert norm == pytest.approx(reference[0][0]["grad_norm"], rel=0.02) and scale == 2.0**16
    # It was lowered until the same update was finite, and no update was lost.
    assert next_norm == pytest.approx(reference[0][1]["grad_norm"], rel=0.02) and 1 < next_scale < 2.0**40
    assert broken == (True, next_scale)
    assert dtypes == {"torch.float16"}

    (errors, set_before, passes), (errors_at_1, unset, passes_at_1) = delayed
    # What the roundings alone leave; about as much as after ten passes.
    assert len(errors) == 8 and max(errors) < 0.45 and min(errors_at_1) > 0.6, (errors, errors_at_1)
    assert all(set_before) and not any(unset)
    update, again = passes_at_1
    assert update == again > 1 and passes == [1, 1, 1, update, update]


def curves_with_experts(rank, world_size, folders):
    return [curve(rank, world_size, folders, layout, 60, (1, 1)) for layout in ((1, 2), (2, 1, True))]


def test_a_student_with_experts_learns_the_same_in_two_stages_and_over_two_ranks(folders, tmp_path):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    student = make_model(tmp_path, "qwen3_moe", initializer_range=0.1, tie_word_embeddings=True, **sizes)
    folders = folders | {"student": student}
    (reference,) = run_ranks(curve, 1, folders, (1, 1), 4096, (1, 1))
    assert reference[0][0]["grad_norm"] > 1e-3
    for two_stages, two_shares in run_ranks(curves_with_experts, 2, folders):
        assert_same_curve(two_stages, reference)
        assert_same_curve(two_shares, reference)


def one_step_in_each_layout(rank, world_size, folders, checkpoints, layouts, precision="fp32"):
    from pathlib import Path

    from rlad_megatron.trainer import checkpoint

    metrics = []
    for step, layout in enumerate(layouts):
        actor, teacher = build(folders, layout, 64, (1, 1), precision)
        if step:
            checkpoint.load(Path(checkpoints) / f"step_{step:08d}", actor)
        metrics.append(one_step(actor, teacher, step))
        checkpoint.save(Path(checkpoints), step + 1, actor, {"step": step + 1}, run="a", keep=9)
    return metrics, actor.log_probs(make_samples(9))


def test_experts_and_chunks_resume_in_other_layouts(folders, tmp_path):
    """Megatron has a second optimizer for experts over ranks, of which a checkpoint in another layout knows nothing."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    student = make_model(tmp_path / "model", "qwen3_moe", initializer_range=0.1, tie_word_embeddings=True, **sizes)
    folders = folders | {"student": student}
    ep2, vpp2, dp2 = (1, 1, False, 1, "p2p", 1, 0, 0, 2), (1, 2, False, 1, "p2p", 2), (1, 1)
    (reference,) = run_ranks(curve, 1, folders, (1, 1), 4096, (1, 1))
    for layouts in ((ep2, vpp2, ep2), (dp2, ep2, dp2)):
        checkpoints = str(tmp_path / f"from_{layouts.index(ep2)}")
        for results in run_ranks(one_step_in_each_layout, 2, folders, checkpoints, layouts):
            assert_same_curve(results, reference)


@pytest.mark.skipif(not HAS_GATED_DELTA_NETS, reason="needs Megatron-Core 0.19")
def test_states_of_two_dtypes_resume_in_other_layouts(folders, tmp_path):
    """Gated delta nets keep some parameters in float32, next to bf16 ones in the same group of the optimizer."""
    sizes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "vocab_size": VOCAB}
    student = make_model(tmp_path / "model", "qwen3_5_text", initializer_range=0.05, **sizes)
    folders = folders | {"student": student}
    stay, move = [(1, 1)] * 3, [(1, 1), (2, 1), (1, 2)]
    kept, moved = (
        run_ranks(one_step_in_each_layout, 2, folders, str(tmp_path / name), layouts, "bf16")
        for name, layouts in (("stay", stay), ("move", move))
    )
    for ours, reference in zip(moved, kept, strict=True):
        for one, other in zip(ours[1], reference[1], strict=True):
            torch.testing.assert_close(one, other, atol=0.05, rtol=0)  # bf16 in another layout


class EngineProduct(torch.autograd.Function):
    """The product of Transformer Engine's linear layers, as far as it matters to gradients (2.11, module/linear.py)."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.weight, ctx.fused, ctx.first = layer.weight, layer.fuse_wgrad_accumulation, layer.is_first_microbatch
        layer.is_first_microbatch = False  # as Megatron's wrapper does
        return x @ layer.weight.t()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        assert ctx.fused
        if ctx.first:
            ctx.weight.main_grad.copy_(of_weight)
        else:
            ctx.weight.main_grad.add_(of_weight)
        return gradient @ ctx.weight, None


def gradients_in_waves(rank, world_size, folders, like_engine):
    """The gradients of an update in three waves, and what layers and configurations say of fusion."""
    import copy

    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    if like_engine:
        for layer in (ColumnParallelLinear, RowParallelLinear):
            layer.fuse_wgrad_accumulation, layer.is_first_microbatch = False, True
            layer.forward = lambda self, x, *_, **__: (EngineProduct.apply(x, self), None)
    actor, teacher = build(folders, (1, 1), 64, (1, 1))
    (chunk,) = actor.chunks
    if like_engine:
        chunk.config = copy.copy(chunk.config)
        chunk.config.fp8 = "hybrid"  # of DDP alone, which then marks the first micro-batch
    found = {}
    actor.optimizer.step = lambda: (
        found.update({name: parameter.main_grad.clone() for name, parameter in actor.parameters().items()})
        or (True, 0.0, 0)
    )
    one_step(actor, teacher, 0, waves=3)
    told = [
        (model.config.gradient_accumulation_fusion, {getattr(each, "fuse_wgrad_accumulation", None) for each in linear})
        for model in (chunk.module, teacher.chunks[0])
        if (linear := [each for each in model.modules() if isinstance(each, ColumnParallelLinear | RowParallelLinear)])
    ]
    return found, told


def test_layers_that_add_into_the_float32_buffer_are_fused_and_keep_earlier_waves(folders):
    """Megatron's output layer, which refuses fusion without apex, is built all the same."""
    ((expected, plain),) = run_ranks(gradients_in_waves, 1, folders, False)
    ((found, told),) = run_ranks(gradients_in_waves, 1, folders, True)
    assert plain == [(False, {None}), (False, {None})]
    assert told == [(True, {True}), (False, {False})], "student, teacher"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
