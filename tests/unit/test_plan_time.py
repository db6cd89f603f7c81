"""Seconds in the plan: cases that can be computed by hand, what must grow with what, measured rates, the best split."""

import json
import math
from dataclasses import replace

import pytest

from rlad_megatron.cli import main
from rlad_megatron.config import AHEAD, PHASED, STREAMING, LayoutConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import ConfigError
from rlad_megatron.plan.cost import forward_flops
from rlad_megatron.plan.count import make_plan
from rlad_megatron.plan.devices import DEVICES, assumed_name, bf16_flops, find_device
from rlad_megatron.plan.lengths import expected_lengths
from rlad_megatron.plan.rates import LINKS, PUSH_S, Measured, Rates, rates_for
from rlad_megatron.plan.simulate import Rounds, TrainerSpeed, simulate
from rlad_megatron.plan.simulated_servers import ServerSpeed
from rlad_megatron.plan.time import (
    bubble,
    finish_seconds,
    push_seconds,
    sample_flops,
    sent_seconds,
    step_time,
    trainer_speed,
)

RECIPE = "math_r1_distill_7b_from_32b"
H100 = Rates(DEVICES["H100"], Measured(), "H100")
SERVER = ServerSpeed(step_s=(0.5,) * 8, context_s=0.0, prefill_s=0.0, request_s=0.0, room=8)
# A token costs the update 0.1 s and the teacher 0.05 s.
TRAINER = TrainerSpeed(
    wave_tokens=20,
    teacher_s=lambda lengths: 0.05 * sum(lengths),
    score_s=lambda lengths: 0.0,
    update_s=lambda lengths: 0.1 * sum(lengths),
    finish_s=1.0,
    push_s=2.0,
)


def rounds(schedule=PHASED, **changed):
    return replace(Rounds(prompts=4, group_size=2, prompt_tokens=0, schedule=schedule), **changed)


def lengths_of(*groups):
    """Draws the same lengths in every round: those of each group's responses."""
    drawn = [length for group in groups for length in group]
    state = iter(range(10**6))
    return lambda count: [drawn[next(state) % len(drawn)] for _ in range(count)]


EQUAL = lengths_of(*[(10, 10)] * 4)


def test_equal_lengths_phased():
    found = simulate(rounds(), SERVER, TRAINER, EQUAL)
    # 8 responses of 10 tokens, each of whose steps takes 0.5 s; then 80 tokens in each pass.
    assert found.times == pytest.approx(
        {"time/rollout": 5, "time/teacher": 4, "time/update": 9, "time/weight_sync": 2, "time/step": 20}
    )
    assert found.idle == pytest.approx({"idle/trainer": 0.25, "idle/servers": 0.75, "idle/teacher": 0.8})
    assert found.tokens == 80


def test_servers_that_are_never_waited_for_leave_no_idle_trainer():
    ready = replace(SERVER, step_s=(1e-9,) * 8)
    found = simulate(rounds(), ready, TRAINER, EQUAL)
    assert found.idle["idle/trainer"] == pytest.approx(0, abs=1e-6)
    assert found.times["time/step"] == pytest.approx(15)


def test_one_straggler_is_waited_for_unless_work_goes_on_beside_it():
    straggler = ((10, 10), (10, 10), (10, 10), (10, 90))
    phased = simulate(rounds(), SERVER, TRAINER, lengths_of(*straggler))
    assert phased.times["time/rollout"] == pytest.approx(45)
    assert phased.times["time/step"] == pytest.approx(45 + 0.15 * 160 + 1 + 2)
    streaming = simulate(rounds(STREAMING), SERVER, TRAINER, lengths_of(*straggler))
    # Three groups fill a wave after 5 s, which takes 9 s; the fourth is there after 45 s.
    assert streaming.times["time/step"] == pytest.approx(45 + 0.15 * 100 + 1 + 2)
    assert streaming.times["time/rollout"] == pytest.approx(45 - 9)
    # The slowest is cancelled, and waits until four of its kind fill a round.
    assert simulate(rounds(overprovision=1, prompts=3), SERVER, TRAINER, lengths_of(*straggler)).times[
        "time/rollout"
    ] == pytest.approx((3 * 5 + 45) / 4)


def test_deferred_prompts_of_a_cycle_longer_than_is_simulated_are_counted():
    # One of 41 groups takes 45 s and is deferred; after 40 rounds of 5 s comes one of 45 s.
    rare = lengths_of(*[(10, 10)] * 40, (10, 90))
    found = simulate(rounds(prompts=40, overprovision=1), replace(SERVER, step_s=(0.5,) * 82, room=82), TRAINER, rare)
    assert found.times["time/rollout"] == pytest.approx((40 * 5 + 45) / 41)
    assert found.tokens == pytest.approx((40 * 800 + 40 * 100) / 41)


def test_several_updates_come_after_all_waves():
    straggler = ((10, 10), (10, 10), (10, 10), (10, 90))
    scores = replace(TRAINER, updates=2, score_s=lambda lengths: 0.02 * sum(lengths))
    found = simulate(rounds(STREAMING), SERVER, scores, lengths_of(*straggler))
    # Only scoring happens while the fourth is waited for: 0.07 s a token. Each update ends with sums, as a step does.
    assert found.times["time/rollout"] == pytest.approx(45 - 0.07 * 60)
    assert found.times["time/step"] == pytest.approx(45 + 0.07 * 100 + 0.1 * 160 + 2 * 1 + 2)
    # Groups end in this order, and each update has short and long ones.
    longest = replace(scores, update_s=lambda lengths: float(max(lengths)))
    found = simulate(rounds(), SERVER, longest, lengths_of(*[(length, length) for length in (10, 20, 30, 40)]))
    assert found.times["time/update"] == pytest.approx(0.02 * 200 + 30 + 40 + 2 * 1)


def test_ahead_hides_the_shorter_of_rollouts_and_training():
    ahead = rounds(AHEAD, ahead=1)
    trainer_bound = simulate(ahead, SERVER, TRAINER, EQUAL)
    assert trainer_bound.times["time/step"] == pytest.approx(4 + 9 + 2), "rollouts take 5 s, and 2 s of a pause"
    servers_bound = simulate(ahead, replace(SERVER, step_s=(2.5,) * 8), TRAINER, EQUAL)
    assert servers_bound.times["time/step"] == pytest.approx(25 + 2), "the pause is not hidden"
    assert servers_bound.idle["idle/servers"] == pytest.approx(0, abs=0.01)


def test_a_dedicated_teacher_scores_while_servers_go_on():
    apart = replace(TRAINER, teacher_apart=True)
    lengths = ((10, 10), (20, 20), (30, 30), (40, 40))
    shared = simulate(rounds(STREAMING), SERVER, TRAINER, lengths_of(*lengths))
    found = simulate(rounds(STREAMING), SERVER, apart, lengths_of(*lengths))
    # The last group ends after 20 s and is scored after 4 s more; its update takes 8 s.
    assert found.times["time/step"] == pytest.approx(20 + 4 + 8 + 1 + 2)
    assert found.times["time/step"] <= shared.times["time/step"]
    waited = simulate(rounds(), SERVER, apart, lengths_of(*lengths))
    assert waited.idle["idle/trainer"] == pytest.approx((20 + 10) / waited.times["time/step"]), (
        "with phased it is waited for"
    )


def test_groups_without_a_gradient_cost_only_their_rollouts():
    found = simulate(rounds(), SERVER, TRAINER, EQUAL, trained=0.5)
    assert found.times["time/teacher"] == pytest.approx(2) and found.times["time/update"] == pytest.approx(5)


def test_responses_beyond_the_slots_wait():
    found = simulate(rounds(), replace(SERVER, step_s=(0.5,) * 4), TRAINER, EQUAL)
    assert found.times["time/rollout"] == pytest.approx(10)
    asked = simulate(rounds(), replace(SERVER, prefill_s=0.1, request_s=0.25, room=4), TRAINER, EQUAL)
    # Two groups come together, and two more when those end together.
    assert asked.times["time/rollout"] == pytest.approx(2 * (5 + 0.25 + 2 * 0.1))
    two = simulate(rounds(servers=2), replace(SERVER, room=4), TRAINER, EQUAL)
    assert two.times["time/rollout"] == pytest.approx(5), "each server has half"


def test_the_cache_grows_token_by_token():
    speed = ServerSpeed(step_s=(1.0, 1.5), context_s=0.01, prefill_s=0.0, request_s=0.0, room=2)
    steps = sum(1.5 + 0.01 * (100 + 2 * (step + 0.5)) for step in range(20))
    assert speed.seconds(2, 100, 20) == pytest.approx(steps)
    assert speed.tokens(2, 100, steps) == pytest.approx(20)


def test_counts_of_samples_are_those_of_the_plan():
    for recipe in ("kk_qwen3_0p6b_from_8b", "math_qwen3_30b_a3b_from_235b", "math_qwen3p5_4b_from_35b_a3b"):
        spec = make_plan(load_run(recipe, [])).student.spec
        by_hand = forward_flops(spec, [700, 1300], 600 + 1200)
        assert sample_flops(spec, 100.0)([600, 1200]) == pytest.approx(by_hand)
        head = forward_flops(spec, [], 600 + 1200)
        assert sample_flops(spec, 100.0, 3.5, 2)([600, 1200]) == pytest.approx(3.5 * by_hand + 2 * head)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("with_means", ["objective.name=distilled_rl", "objective.ratio=sequence"])
def test_means_over_responses_cost_a_pass_over_the_head(with_means, updates):
    """Of pi_old, unless several updates need it anyway; of pi_S, only if it differs from pi_old."""
    words = ["objective.name=grpo", f"train.updates_per_rollout={updates}"]

    def update_s(*more):
        config = load_run(RECIPE, [*words, *more])
        return trainer_speed(make_plan(config), expected_lengths(config), H100).update_s([1000] * 8)

    costs = (updates == 1) == (with_means == "objective.name=distilled_rl")
    assert (update_s(with_means) > update_s() * 1.01) == costs


def test_bubble():
    plan = make_plan(load_run(RECIPE, []))
    staged = replace(plan.student, layout=LayoutConfig(1, 4))
    assert bubble(plan.student, 8) == 0
    assert bubble(staged, 8) == pytest.approx(3 / 8)  # (PP - 1) / micro-batches
    assert bubble(replace(staged, layout=LayoutConfig(1, 4, virtual_pipeline=2)), 8) == pytest.approx(3 / 16)


def test_bytes_over_links():
    plan = make_plan(load_run(RECIPE, []))
    seconds = push_seconds(plan, H100)
    assert seconds == pytest.approx(2 * plan.student.total_parameters / (LINKS * 50e9) + PUSH_S)
    shared = replace(
        plan, config=replace(plan.config, rollout=replace(plan.config.rollout, weight_transfer="shared_memory"))
    )
    measured = Rates(H100.device, Measured(push_s=3.0, push_bytes=plan.student.total_parameters), "")
    assert push_seconds(shared, measured) == pytest.approx(3 * 2 + PUSH_S)
    assert push_seconds(plan, measured) == seconds, "the network was not measured"
    # TP 4 within a node: 28 layers, two sums each, 5 copies of 3 / 4 ring parts of 3,584 values of 2 bytes on a rank.
    one = sent_seconds(plan.student, 32, 8, H100.device, trained=True)
    assert one == pytest.approx(28 * 2 * 5 * 3 * 3584 * 2 / 4 / (LINKS * 450e9))
    assert sent_seconds(plan.student, 32, 2, H100.device, trained=True) == pytest.approx(9 * one)
    hidden = replace(plan.config.optimizer, overlap_grad_reduce=True, overlap_param_gather=True)
    alone = finish_seconds(replace(plan, config=replace(plan.config, optimizer=hidden)), H100)
    elements = plan.student.parameters(0)  # padding aside
    sent = elements * 6 * 7 / 8 / (LINKS * 50e9)  # 4 bytes of a gradient, 2 of a weight, in a ring of 8 copies
    assert finish_seconds(plan, H100) - alone == pytest.approx(sent, rel=1e-3)


def timed(*overrides, rates=H100, responses=""):
    config = load_run(RECIPE, list(overrides))
    return step_time(make_plan(config), expected_lengths(config, responses), rates)


def test_what_grows_with_what():
    base = timed().times
    slower = Rates(H100.device._replace(memory=1e12), Measured(), "")
    assert timed(rates=slower).times["time/rollout"] > base["time/rollout"]
    weaker = Rates(H100.device._replace(bf16_flops=1e14), Measured(), "")
    assert timed(rates=weaker).times["time/update"] > base["time/update"]
    assert timed(rates=weaker).times["time/teacher"] > base["time/teacher"]
    assert timed("train.recompute=full").times["time/update"] > base["time/update"]
    assert timed("train.updates_per_rollout=2").times["time/update"] > base["time/update"]
    assert timed("objective.name=grpo").times["time/teacher"] == 0
    assert timed("checkpoint.every=5").times["time/checkpoint"] == pytest.approx(5 * base["time/checkpoint"])
    assert timed(responses="5000,0.7").times["time/step"] < base["time/step"]

    ahead = timed("rollout.schedule=ahead", "objective.mismatch_correction=truncated_is").times["time/step"]
    assert ahead < base["time/step"] < timed("rollout.schedule=phased").times["time/step"]


def test_passes_of_the_trainer():
    def speed(*overrides):
        config = load_run(RECIPE, list(overrides))
        return trainer_speed(make_plan(config), expected_lengths(config), H100)

    one, several, reference = speed(), speed("train.updates_per_rollout=2"), speed("objective.reference_kl=0.1")
    responses = [4000] * 64
    assert (one.updates, several.updates) == (1, 2)
    assert one.score_s(responses) == 0 < several.score_s(responses) == reference.score_s(responses)
    assert one.update_s(responses) == several.update_s(responses)
    # A third of the operations, and two of five sums of tensor-parallel ranks.
    assert 1 / 3 < several.score_s(responses) / one.update_s(responses) < 2 / 5


def bench_file(path, figures, device="CPU", **machine):
    path.write_text(json.dumps({"figures": figures, "machine": {"device": device, **machine}}))
    return path


def test_measured_rates_take_the_place_of_data_sheets(tmp_path):
    config = load_run("kk_tiny_cpu", [])
    trainer = {"perf/mfu": 0.5, "perf/mfu_teacher": 0.25, "sync/seconds": 0.01, "sync/bytes": 3e6}
    server = {
        "decode/step_s/8": 0.01,
        "decode/step_s/64": 0.017,
        "decode/step_s/256": 0.041,
        "prefill/tokens_per_s": 1e3,
        "prefill/request_s": 0.5,
    }
    first = bench_file(tmp_path / "a.json", trainer, flops_per_rank=1e10)
    second = bench_file(tmp_path / "b.json", server)
    measured = rates_for(config, [first, second]).measured
    assert (measured.update_flops, measured.teacher_flops, measured.prefill_s) == (5e9, 2.5e9, 1e-3)
    steps = measured.step_s(300)
    assert [steps[n - 1] for n in (8, 36, 64, 256)] == pytest.approx([0.01, 0.0135, 0.017, 0.041])
    assert steps[299] == pytest.approx(0.041 + 44 * 0.024 / 192) and all(step > 0 for step in steps)

    found = step_time(make_plan(config), expected_lengths(config, "30,0"), rates_for(config, [first, second]))
    spec = make_plan(config).student.spec
    operations = 3 * 256 * forward_flops(spec, [30 + expected_lengths(config).prompt], 30)
    assert found.times["time/update"] == pytest.approx(operations / (2 * 5e9)), "over two ranks"
    # 256 responses of 30 tokens, and the prompts of 32 groups, which each delay them and come together.
    assert found.times["time/rollout"] == pytest.approx(30 * 0.041 + 32 * expected_lengths(config).prompt * 1e-3 + 0.5)
    twice = bench_file(tmp_path / "c.json", {"perf/mfu": 0.5}, flops_per_rank=2e10)
    assert rates_for(config, [first, second, twice]).measured.update_flops == 1e10, "the last one counts"


def test_files_that_are_refused(tmp_path):
    config = load_run("kk_tiny_cpu", [])
    trainer = bench_file(tmp_path / "a.json", {"perf/mfu": 0.5, "perf/mfu_teacher": 0.25}, flops_per_rank=1e10)
    with pytest.raises(ConfigError, match=r"lacks a server \(`rlad bench RECIPE --servers-only`\)"):
        rates_for(config, [trainer])
    with pytest.raises(ConfigError, match="was measured on CPU, but train.gpus_per_node=8"):
        rates_for(load_run(RECIPE, []), [trainer])
    other = bench_file(tmp_path / "d.json", {"decode/step_s/8": 0.01}, device="NVIDIA A100-SXM4-80GB")
    h100 = bench_file(tmp_path / "e.json", {"decode/step_s/8": 0.01}, device="NVIDIA H100 80GB HBM3")
    with pytest.raises(ConfigError, match="was measured on NVIDIA H100 80GB HBM3, --bench=.* on NVIDIA A100"):
        rates_for(load_run(RECIPE, []), [h100, other])
    (tmp_path / "b.json").write_text("[]")
    no_rate = bench_file(tmp_path / "c.json", {"perf/mfu": 0.5})
    for file in (tmp_path / "b.json", no_rate, tmp_path / "none.json"):
        with pytest.raises(ConfigError, match="is no file of `rlad bench`"):
            rates_for(config, [file])


def test_devices():
    assert find_device("NVIDIA H100 80GB HBM3") == DEVICES["H100"] != find_device("NVIDIA H100 NVL")
    assert bf16_flops("NVIDIA A100-SXM4-80GB") == 312e12 and bf16_flops("CPU") is None
    assert [assumed_name(size) for size in (48, 80, 141, 180)] == ["H100", "H100", "H200", "B200"]


def test_a_large_run_is_simulated_in_part():
    eight = ["train.nodes=32", "rollout.nodes=32", "rollout.servers=256", "rollout.prompts_per_step=256"]
    for schedule in ("phased", "streaming"):
        config = load_run(RECIPE, [*eight, f"rollout.schedule={schedule}"])
        plan, lengths = make_plan(config), expected_lengths(config)
        whole, part = (step_time(plan, lengths, H100, most) for most in (2048, 256))
        assert part.tokens == pytest.approx(whole.tokens, rel=0.05)
        for phase in ("time/update", "time/teacher", "time/step"):
            assert part.times[phase] == pytest.approx(whole.times[phase], rel=0.08)


def test_the_command(capsys):
    assert main(["plan", "kk_qwen3_0p6b_from_8b", "--responses=2000,0.5"]) == 0
    said = capsys.readouterr().out
    assert "Time of a step, estimated (streaming)" in said and "tokens per GPU-hour" in said
    assert "mean 2000, spread 0.5 (given)" in said and "H100's data sheet" in said
    assert main(["plan", "kk_tiny_cpu"]) == 0
    assert "Time of a step" not in capsys.readouterr().out, "nothing is known of CPUs without --bench"
    assert main(["plan", "kk_tiny_cpu", "--responses=30"]) == 2
    assert "give --bench FILE" in capsys.readouterr().err
    assert main(["plan", RECIPE, "student.layout.sequence_parallel=false", "--bench=/nonexist"]) == 2
    assert "--bench=/nonexist is no file" in capsys.readouterr().err, "although it does not fit"
    assert main(["plan", "kk_tiny_cpu", "objective.name=cross_entropy", "--responses=20"]) == 2
    assert "samples no responses" in capsys.readouterr().err


def test_a_step_is_the_sum_of_its_parts():
    found = timed("rollout.schedule=phased")
    parts = sum(seconds for name, seconds in found.times.items() if name != "time/step")
    assert found.times["time/step"] == pytest.approx(parts)
    assert found.tokens_per_hour == pytest.approx(3600 * found.tokens / found.times["time/step"] / 64)
    assert all(0 <= share <= 1 for share in found.idle.values()) and math.isfinite(found.tokens)
