"""Other splits of a run's GPUs: which there are, and which of them has the most tokens per GPU-hour."""

from dataclasses import replace

from rlad_megatron.config import validate
from rlad_megatron.config.placement import total_gpus
from rlad_megatron.config.recipe import load_run
from rlad_megatron.plan import split
from rlad_megatron.plan.count import make_plan
from rlad_megatron.plan.devices import DEVICES
from rlad_megatron.plan.lengths import expected_lengths
from rlad_megatron.plan.rates import Measured, Rates
from rlad_megatron.plan.split import best_split, splits
from rlad_megatron.plan.time import step_time

RECIPE = "math_r1_distill_7b_from_32b"
H100 = Rates(DEVICES["H100"], Measured(), "H100")


def test_the_best_split_is_that_of_brute_force():
    apart = ["train.ranks_per_node=3", "teacher.ranks_per_node=1", "train.gpu_memory_gb=60"]
    short = ["rollout.sampling.max_tokens=1024", "eval.sampling.max_tokens=1024"]
    config = load_run("kk_qwen3_0p6b_from_8b", [*apart, *short])
    plan, lengths = make_plan(config), expected_lengths(config, "300,0.7")
    best, found, count = best_split(plan, lengths, H100)
    every = []
    for ranks in range(1, 8):
        for teachers in range(0, 8 - ranks):
            candidate = replace(
                config,
                train=replace(config.train, ranks_per_node=ranks),
                teacher=replace(config.teacher, ranks_per_node=teachers),
                rollout=replace(config.rollout, servers=8 - ranks - teachers),
            )
            validate(candidate)
            if not (planned := make_plan(candidate)).shortage:
                every.append((step_time(planned, lengths, H100).tokens_per_hour, ranks, teachers))
    most, ranks, teachers = max(every)
    assert count == len(every) < len(list(splits(config))), "a teacher on the trainer's ranks does not fit"
    assert found.tokens_per_hour == most
    assert (best.train.ranks_per_node, best.teacher.ranks_per_node) == (ranks, teachers)


def test_splits_take_the_same_gpus_and_keep_servers_whole(monkeypatch):
    config = load_run(RECIPE, ["rollout.tensor_parallel=2", "rollout.servers=16"])
    found = list(splits(config))
    assert {total_gpus(candidate) for candidate in found} == {64}
    assert {candidate.rollout.servers for candidate in found} == {4 * nodes for nodes in range(1, 8)}
    assert len({(c.train.nodes, c.teacher.nodes) for c in found}) == len(found) == 7 + 21
    for alone in ("rollout.colocate=true", "rollout.urls=[http://a:1]"):
        assert not list(splits(load_run("kk_qwen3_0p6b_from_8b", [alone])))
    # A teacher on nodes of its own stays there, and the trainer's nodes are split.
    apart = load_run(
        RECIPE,
        [
            *["rollout.nodes=0", "rollout.servers=16", "train.ranks_per_node=4"],
            *["teacher.nodes=2", "teacher.ranks_per_node=8"],
        ],
    )
    kept = list(splits(apart))
    assert {total_gpus(candidate) for candidate in kept} == {total_gpus(apart)} == {48}
    assert {candidate.teacher for candidate in kept} == {apart.teacher}
    assert [candidate.rollout.servers for candidate in kept] == [4 * served for served in range(7, 0, -1)]
    monkeypatch.setattr(split, "MOST", 2)
    assert len(list(splits(config))) < 10
