"""`rlad plan`: every recipe plans without torch, what cannot fit is refused with a change that fits."""

import importlib
import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import recipes
from rlad_megatron.cli import main
from rlad_megatron.config import Fp8Config, LayoutConfig, LossConfig, OptimizerConfig, TrainConfig, validate
from rlad_megatron.config.placement import place, total_gpus
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import CheckpointError, ConfigError, RladError
from rlad_megatron.launch.preflight import check_sft
from rlad_megatron.models.config_json import read_model_spec, read_or_known_spec
from rlad_megatron.models.known import KNOWN_MODELS
from rlad_megatron.models.registry import as_model_spec
from rlad_megatron.models.shard_plan import build_shard_plan
from rlad_megatron.models.spec import FULL_ATTENTION
from rlad_megatron.parallel.loss_memory import loss_bytes
from rlad_megatron.parallel.place import Place
from rlad_megatron.plan import activations, memory
from rlad_megatron.plan.advice import cheapest_change
from rlad_megatron.plan.cost import forward_flops, recomputed_share, sent_bytes
from rlad_megatron.plan.count import make_plan, plan_models
from rlad_megatron.plan.memory import Model
from rlad_megatron.plan.plan import gb
from rlad_megatron.plan.table import layout_text, print_plan

ASSETS = Path(recipes.__path__[0]) / "assets"
CLUSTER = sorted(
    file.stem
    for file in Path(recipes.__path__[0]).glob("*.py")
    if ("qwen3" in file.stem or "r1" in file.stem) and "tiny" not in file.stem
)
SFT = ["kk_tiny_teacher_sft", "kk_tiny_student_sft", "kk_tiny_qwen3p5_student_sft"]

# Parameters as the safetensors files on the Hugging Face hub add up to (tied heads counted once).
PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-8B-Base": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
}


def planned(name, *overrides):
    config = load_run(name, list(overrides))
    validate(config)
    return make_plan(config)


@pytest.mark.parametrize("name", CLUSTER)
def test_what_is_known_to_need_the_reserve_fits_into_it(name):
    assert "beyond the reserve" not in {item.name for item in planned(name).fullest.items}


def test_what_the_reserve_cannot_hold_is_added():
    """By hand: Qwen3-1.7B on four GPUs, each with a server that opens the rank's memory, and a teacher in the ranks."""
    options = ("teacher.layout.tensor_parallel=2", "rollout.colocate=true", "rollout.gpu_memory_utilization=0.2")
    plan = planned("kk_qwen3_1p7b_from_8b", *options, "train.microbatch_tokens=65536", "train.gpu_memory_gb=400")
    items = {item.name: item for item in plan.fullest.items}
    layers = [2048 * (16 + 16) * 128, 2048 * 16 * 128, 2048 * 2 * 6144, 6144 * 2048, 2048, 128]  # distinct sizes
    groups = 1 + 1 + 1  # the world, the student's data parallelism, the teacher's tensor parallelism
    update = ("largest gradient", "activations", "loss")
    known = 0.8e9 + groups * 24 * (4 * 2**20 + 4_915_200 + 524_288) + 65536 * 16 * 128 * 4 + 2 * sum(layers)
    known += 0.05 * sum(items[name].size for name in update)
    assert items["beyond the reserve"].size == pytest.approx(known - 4e9, abs=10)
    assert "NCCL's buffers of 3 groups" in items["beyond the reserve"].why


@pytest.mark.parametrize(("limit", "warned"), [(160, True), (200, False)])
def test_requests_that_time_out_for_sure_are_told(limit, warned):
    plan = planned("kk_qwen3_0p6b_from_8b", "rollout.max_concurrency=128", f"rollout.request_timeout_s={limit}")
    weights, _, cache = (item.size for item in plan.server.items)
    assert plan.server.responses == 63
    # Three turns of at most 63; each of the 8,192 tokens reads the weights and half of the cache.
    needed = 3 * 8192 * (weights + cache / 2) / 4.8e12
    assert 160 < needed < 200
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=400))
    assert (f"rollout.request_timeout_s={limit} is too short if responses are long" in text.getvalue()) == warned


# Of the text model alone, in billions: the files on the hub also hold a vision tower.
NOMINAL = {"Qwen3.5-2B": 2, "Qwen3.5-4B": 4, "Qwen3.5-27B": 27, "Qwen3.5-35B-A3B": 35}


def test_known_models_have_their_published_parameters():
    specs = {name: read_or_known_spec(name, "student") for name in KNOWN_MODELS}
    found = {name: Model(spec, LayoutConfig(), "bf16").total_parameters for name, spec in specs.items()}
    assert {name: count for name, count in found.items() if name not in NOMINAL} == PUBLISHED
    assert {name: found[name] / 1e9 for name in NOMINAL} == pytest.approx(NOMINAL, rel=0.07)
    for name in NOMINAL:
        fields = {key: value for key, value in KNOWN_MODELS[name].items() if key != "model_type"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(KNOWN_MODELS[name]["model_type"], **fields))
        assert sum(parameter.numel() for parameter in model.parameters()) == found[name], name


def test_there_are_recipes_for_clusters():
    assert len(CLUSTER) == 9


@pytest.mark.parametrize(("name", "method"), [*product(CLUSTER, ["trrd", "grpo", "kdrl"])])
def test_every_cluster_recipe_and_its_twins_fit(name, method):
    no_teacher = ["teacher.nodes=0", "teacher.ranks_per_node=0"] if method == "grpo" else []
    plan = planned(name, f"objective.name={method}", *no_teacher)
    assert plan.shortage == ""
    assert (plan.teacher is None) == (method == "grpo")
    assert plan.server.responses >= 8  # a server that holds fewer would mostly wait


@pytest.mark.parametrize("name", CLUSTER)
def test_docstrings_of_recipes_say_what_the_planner_says(name):
    plan = planned(name)
    text = " ".join(importlib.import_module(f"recipes.{name}").__doc__.split())
    parts = {item.name: gb(item.size) for item in plan.fullest.items}
    assert f"Memory: {gb(plan.fullest.size)} GB of 80 on the fullest rank" in text
    if plan.teacher_ranks:
        assert f"(activations {parts['activations']}), {gb(plan.fullest_teacher.size)} on the teacher's;" in text
    else:
        assert f"(activations {parts['activations']}, teacher {parts['teacher weights']})" in text
    assert f"{plan.server.responses} responses" in text


def test_the_table_of_layouts_says_what_the_planner_says():
    text = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
    rows = [line for line in text.splitlines() if re.match(rf"\| `({'|'.join(CLUSTER)})", line)]
    assert {re.search(r"`(\w+)", row)[1] for row in rows} == set(CLUSTER)
    for row in rows:
        assert row == table_row(re.search("`(.*?)`", row)[1]), row


def table_row(run):
    plan = planned(*run.split())
    student, train, items = plan.student, plan.config.train, {item.name: item for item in plan.fullest.items}
    share = recomputed_share(student, train, plan.longest)
    sent = sum(sent_bytes(student, trained=True).values()) / 1e6
    shared = ", sequence" * student.layout.sequence_parallel
    cells = [
        f"`{run}`",
        f"{plan.longest:,}",
        layout_text(student.layout, train.world_size) + shared,
        gb(items["activations"].size),
        gb(plan.fullest.size),
        f"{share:.0%}",
        f"{sent:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", [name for name in CLUSTER if "r1_distill" in name or "30b_a3b" in name])
def test_long_responses_leave_room(name):
    plan = planned(name)
    assert plan.fullest.size <= 0.85 * plan.gpu_limit


def test_a_teacher_on_ranks_of_its_own_takes_its_memory_there():
    name = "math_r1_distill_7b_from_32b"
    shared, apart = planned(name), planned(name, "teacher.ranks_per_node=8", "teacher.nodes=2")
    of_teacher = [item for item in shared.fullest.items if item.name.startswith("teacher")]
    assert apart.fullest.items == tuple(item for item in shared.fullest.items if item not in of_teacher)
    assert [item.name for item in apart.fullest_teacher.items] == ["teacher weights", "teacher's pass", "reserve"]
    assert apart.fullest_teacher.items[:2] == tuple(of_teacher) and shared.teacher_ranks == ()
    assert (total_gpus(shared.config), total_gpus(apart.config)) == (64, 80)
    staged = planned(name, "teacher.ranks_per_node=8", "teacher.nodes=8", "teacher.layout.pipeline_parallel=8")
    assert [rank.rank for rank in staged.teacher_ranks] == [8 * stage for stage in range(8)]
    assert all(f" stage {stage}, " in rank.items[0].why for stage, rank in enumerate(staged.teacher_ranks))
    console = Console(width=110, record=True, file=io.StringIO())
    print_plan(apart, console)
    text = console.export_text()
    assert "teacher ranks 0-15: teacher" in text and "80 GPUs on 10 nodes" in text
    assert "Memory of the teacher's fullest rank (0)" in text


def test_the_cheapest_change_for_a_teacher_that_does_not_fit_on_its_own_ranks():
    one = ["teacher.ranks_per_node=8", "teacher.nodes=1", "teacher.layout.tensor_parallel=1", "train.gpu_memory_gb=70"]
    plan = planned("math_r1_distill_7b_from_32b", *one)
    assert plan.trainer_shortage == "" and plan.shortage.startswith("teacher rank 0 needs 78.")
    assert cheapest_change(plan) == "teacher.layout.pipeline_parallel=2"  # sends less than tensor parallelism


def test_the_memory_of_a_run_on_cpus_says_what_it_leaves_out(capsys):
    assert main(["plan", "kk_tiny_cpu"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2048 bytes a token: 682 requests of 192 tokens fit (rollout.max_concurrency=256)" in text
    assert "Not counted: interpreter and libraries, about 0.6 GB for each rank" in text


def test_fine_tuning_that_does_not_fit_is_advised_to_shorten_its_micro_batches():
    """Traces are not read here: the longest sample is unknown."""
    plan = planned("kk_qwen3_0p6b_from_8b", "objective.name=cross_entropy", "train.gpu_memory_gb=20")
    assert plan.longest == 0 and "train.microbatch_tokens=4096" in cheapest_change(plan)


@pytest.mark.parametrize("name", SFT)
def test_fine_tuning_plans_without_servers_and_teacher(name):
    plan = planned(name, f"student.path={ASSETS / 'kk_tiny_teacher'}")
    assert (plan.server, plan.teacher, plan.tokens) == (None, None, 640)


def test_planning_is_quick_and_needs_no_torch():
    code = f"""
import sys, time
from rlad_megatron.cli import main
fit = [([name], 0) for name in {["kk_tiny_cpu", *CLUSTER]!r}]
for words, code in [*fit, (["math_qwen3_8b_base_from_32b", "train.gpu_memory_gb=12"], 2)]:
    begun = time.process_time()
    assert main(["plan", *words]) == code
    assert time.process_time() - begun < 2, words
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


REFUSED = {
    "whole sequences": ("math_r1_distill_7b_from_32b", "student.layout.sequence_parallel=false"),
    "teacher": ("math_qwen3_8b_base_from_32b", "teacher.layout.tensor_parallel=1"),
    "small GPU": ("kk_qwen3_0p6b_from_8b", "train.gpu_memory_gb=40"),
    "micro-batch": ("kk_qwen3_1p7b_from_8b", "train.microbatch_tokens=32768"),
    "server": ("math_qwen3_8b_base_from_32b", "rollout.gpu_memory_utilization=0.25"),
    "colocated": ("kk_qwen3_1p7b_from_8b", "train.ranks_per_node=8", "rollout.colocate=true"),
    "half the GPU": ("math_r1_distill_7b_from_32b", "train.gpu_memory_gb=40"),
    "a quarter": ("math_qwen3_1p7b_base_from_8b", "train.gpu_memory_gb=20"),
    "trainer and servers": ("math_qwen3_8b_base_from_32b", "train.gpu_memory_gb=12"),
    "everything": ("kk_qwen3_0p6b_from_8b", "train.gpu_memory_gb=8"),
    "trainer and small servers": (
        "math_qwen3_8b_base_from_32b",
        "train.gpu_memory_gb=24",
        "rollout.gpu_memory_utilization=0.1",
    ),
    # What the optimizer's offload does not go together with.
    "moments in bf16": (
        "math_r1_distill_7b_from_32b",
        "optimizer.precision_aware=true",
        "optimizer.moments=bf16",
        "train.gpu_memory_gb=12",
    ),
    "FP8 weights": (
        "math_qwen3_8b_base_from_32b",
        "student.fp8.recipe=blockwise",
        "student.fp8.param_gather=true",
        "train.gpu_memory_gb=16",
    ),
    "experts": (
        *("math_qwen3_30b_a3b_from_235b", "train.gpu_memory_gb=40"),
        *("teacher.nodes=0", "teacher.ranks_per_node=0"),
    ),
    "fp16": ("math_qwen3_8b_base_from_32b", "student.precision=fp16", "train.gpu_memory_gb=24"),
    # What the teacher's offload does not go together with.
    "teacher apart": (
        "math_r1_distill_7b_from_32b",
        "teacher.ranks_per_node=8",
        "teacher.nodes=1",
        "train.gpu_memory_gb=12",
    ),
}


@pytest.mark.parametrize("overrides", REFUSED.values(), ids=REFUSED)
def test_what_cannot_fit_is_refused_with_a_change_that_fits(overrides, capsys):
    assert main(["plan", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rlad: {overrides[0]} does not fit: ")
    change = line.split("the cheapest change that fits: ")[1].split()
    assert planned(*overrides).shortage and not planned(*overrides, *change).shortage


COLOCATED = ["train.ranks_per_node=8", "rollout.colocate=true"]
# Savings enough for ranks of 24 GB.
SHARED = ["student.layout.sequence_parallel=true", "teacher.layout.sequence_parallel=true", "teacher.offload=true"]
SHARED += ["train.recompute=selective"]

FULL = "rollout.sampling.max_tokens=15360"  # a sample may fill a micro-batch, which then cannot be smaller

# What is chosen, and what would fit too but comes after it.
CHEAPEST = {
    "fewest GPUs": (
        ["math_qwen3_8b_base_from_32b", "objective.name=grpo", "train.nodes=1", "train.gpu_memory_gb=69"],
        ["student.layout.sequence_parallel=true"],
        ["train.nodes=4"],
    ),
    "least slowdown": (
        ["kk_qwen3_1p7b_from_8b", "train.gpu_memory_gb=60", FULL],
        ["teacher.offload=true"],
        ["train.recompute=selective"],
    ),
    "savings before a layout": (
        ["kk_qwen3_1p7b_from_8b", "train.gpu_memory_gb=40", FULL],
        ["teacher.offload=true", "train.recompute=selective"],
        ["student.layout.tensor_parallel=4", "teacher.layout.pipeline_parallel=2"],
    ),
    "a layout before full recompute": (
        ["math_qwen3_1p7b_base_from_8b", "train.gpu_memory_gb=24"],
        [
            "student.layout.pipeline_parallel=2",
            "student.layout.sequence_parallel=true",
            "teacher.offload=true",
            "train.recompute=selective",
        ],
        ["teacher.offload=true", "train.recompute=full"],
    ),
    "fewest fields of layouts": (
        ["kk_qwen3_1p7b_from_8b", "train.gpu_memory_gb=20", FULL],
        [
            "student.layout.tensor_parallel=4",
            "student.layout.sequence_parallel=true",
            "teacher.layout.pipeline_parallel=4",
            "teacher.offload=true",
            "loss.memory_mb=256",
            "optimizer.precision_aware=true",
        ],
        [
            "student.layout.tensor_parallel=2",  # sends less
            "student.layout.pipeline_parallel=2",
            "student.layout.sequence_parallel=true",
            "teacher.layout.pipeline_parallel=4",
            "teacher.offload=true",
            "loss.memory_mb=256",
            "optimizer.precision_aware=true",
            "train.recompute=selective",
        ],
    ),
    "sequence parallelism with a layout": (
        ["kk_qwen3_1p7b_from_8b", "train.gpu_memory_gb=18", FULL],
        [
            "student.layout.tensor_parallel=4",
            "student.layout.sequence_parallel=true",
            "teacher.layout.pipeline_parallel=4",
            "teacher.offload=true",
            "loss.memory_mb=256",
            "optimizer.precision_aware=true",
            "train.recompute=selective",
        ],
        [
            "student.layout.tensor_parallel=4",
            "teacher.layout.pipeline_parallel=4",
            "teacher.offload=true",
            "loss.memory_mb=256",
            "optimizer.precision_aware=true",
            "train.recompute=full",
        ],
    ),
    "sequence parallelism with both layouts": (
        ["kk_qwen3_1p7b_from_8b", "train.gpu_memory_gb=16"],
        [
            "student.layout.tensor_parallel=4",
            "student.layout.sequence_parallel=true",
            "teacher.layout.tensor_parallel=4",
            "teacher.layout.sequence_parallel=true",
            "teacher.offload=true",
            "loss.memory_mb=256",
            "optimizer.precision_aware=true",
            "train.recompute=selective",
        ],
        [
            "student.layout.tensor_parallel=4",
            "teacher.layout.pipeline_parallel=4",
            "teacher.offload=true",
            "loss.memory_mb=256",
            "optimizer.precision_aware=true",
            "optimizer.offload=0.5",
            "train.recompute=full",
        ],
    ),
    "least communication": (
        ["kk_qwen3_1p7b_from_8b", "train.gpu_memory_gb=14", FULL],
        [
            "student.layout.tensor_parallel=4",
            "student.layout.sequence_parallel=true",
            "teacher.layout.pipeline_parallel=4",
            "teacher.offload=true",
            "loss.memory_mb=256",
            "optimizer.precision_aware=true",
            "optimizer.offload=1.0",
            "train.recompute=selective",
        ],
        [
            "student.layout.pipeline_parallel=4",
            "teacher.layout.tensor_parallel=4",
            "teacher.offload=true",
            "optimizer.precision_aware=true",
            "optimizer.offload=1.0",
            "train.recompute=full",
        ],
    ),
    "fewest savings of layouts that send the same": (
        ["kk_qwen3_1p7b_from_8b", "train.gpu_memory_gb=37", FULL],
        ["student.layout.pipeline_parallel=2", "teacher.offload=true", "train.recompute=selective"],
        [
            "teacher.layout.pipeline_parallel=2",
            "teacher.offload=true",
            "optimizer.precision_aware=true",
            "train.recompute=selective",
        ],
    ),
    "no more tokens than the longest sample": (
        ["kk_qwen3_0p6b_from_8b", "train.gpu_memory_gb=40"],
        ["train.microbatch_tokens=9216"],
        ["teacher.offload=true", "train.recompute=selective"],
    ),
    "most tokens": (
        ["kk_qwen3_0p6b_from_8b", "train.microbatch_tokens=131072"],
        ["train.microbatch_tokens=32768"],
        ["train.microbatch_tokens=16384"],
    ),
    "memory that the servers may have": (
        ["math_qwen3_8b_base_from_32b", "rollout.gpu_memory_utilization=0.25"],
        ["rollout.gpu_memory_utilization=0.9"],
        ["rollout.tensor_parallel=2", "rollout.servers=16"],
    ),
    "that memory, and more GPUs for a server": (
        ["math_qwen3_8b_base_from_32b", "train.gpu_memory_gb=24", "rollout.gpu_memory_utilization=0.3", *SHARED],
        ["rollout.servers=16", "rollout.tensor_parallel=2", "rollout.gpu_memory_utilization=0.9"],
        ["rollout.servers=4", "rollout.tensor_parallel=8"],
    ),
    "the least share of colocated servers": (
        ["kk_qwen3_1p7b_from_8b", *COLOCATED, "rollout.gpu_memory_utilization=0.05"],
        ["rollout.gpu_memory_utilization=0.2"],
        ["rollout.gpu_memory_utilization=0.3"],
    ),
    "more GPUs for a colocated server": (
        ["math_qwen3_8b_base_from_32b", "rollout.nodes=0", "rollout.colocate=true", "train.gpu_memory_gb=32"],
        [
            "student.layout.sequence_parallel=true",
            "teacher.offload=true",
            "rollout.servers=16",
            "rollout.tensor_parallel=2",
            "rollout.gpu_memory_utilization=0.5",
            "train.recompute=selective",
        ],
        [
            "student.layout.sequence_parallel=true",
            "teacher.offload=true",
            "rollout.servers=8",
            "rollout.tensor_parallel=4",
            "rollout.gpu_memory_utilization=0.5",
            "train.recompute=selective",
        ],
    ),
    "tensor parallelism within a node": (
        [
            *("kk_qwen3_1p7b_from_8b", "objective.name=grpo", "train.gpu_memory_gb=12"),
            *("train.nodes=2", "train.ranks_per_node=6", "rollout.servers=4"),
        ],
        [
            "student.layout.tensor_parallel=2",
            "student.layout.pipeline_parallel=2",
            "student.layout.sequence_parallel=true",
            "train.recompute=full",
        ],
        ["student.layout.tensor_parallel=4", "student.layout.sequence_parallel=true", "train.recompute=full"],
    ),
}


@pytest.mark.parametrize(("overrides", "chosen", "other"), CHEAPEST.values(), ids=CHEAPEST)
def test_the_cheapest_change(overrides, chosen, other):
    plan = planned(*overrides)
    assert plan.shortage and not planned(*overrides, *other).shortage
    assert cheapest_change(plan) == " ".join(chosen)


def documented_order(config):
    """docs/parallelism.md, the dearest step first: of two changes that fit the lesser is the cheapest."""
    layouts = (
        (config.student.layout, 2048, 28, 2),
        (config.teacher.layout, 4096, 36, 1),
    )  # with hidden, layers, passes
    sizes = [
        size
        for layout, *_ in layouts
        for size in (layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel)
    ]
    # Ring sums after attention and feed-forward of each layer, and what each stage hands on. Keys and values of 8 heads
    # of 128 to the other context-parallel ranks, in backward again and with gradients.
    sent = [
        passes
        * hidden
        * (4 * layers * (layout.tensor_parallel - 1) + layout.tensor_parallel * (layout.pipeline_parallel - 1))
        + (2 * passes - 1) * layers * 2 * 1024 * (layout.context_parallel - 1)
        for layout, hidden, layers, passes in layouts
    ]
    return (
        config.optimizer.offload,
        config.train.recompute == "full",
        sum(size > 1 for size in sizes),
        sum(sent),
        config.train.recompute == "selective",
        config.teacher.offload,
        config.loss.memory_mb < 2048,
        config.optimizer.precision_aware,
        config.teacher.layout.sequence_parallel,
        config.student.layout.sequence_parallel,
    )


def test_no_change_that_fits_comes_earlier_in_the_documented_order():
    overrides = ["kk_qwen3_1p7b_from_8b", "rollout.sampling.max_tokens=30000"]
    config = load_run(overrides[0], overrides[1:])
    specs = read_or_known_spec(config.student.path, "student"), read_or_known_spec(config.teacher.path, "teacher")
    layouts = [
        LayoutConfig(tensor, pipeline, shared, context)
        for tensor, pipeline, shared, context in product((1, 2, 4), (1, 2, 4), (False, True), (1, 2, 4))
        if tensor * pipeline * context <= 4 and shared <= (tensor > 1)
    ]
    optimizers = [replace(config.optimizer, precision_aware=True, offload=share) for share in (0.0, 0.5, 1.0)]
    grid = [
        replace(
            config,
            student=replace(config.student, layout=student),
            teacher=replace(config.teacher, layout=teacher, offload=offload),
            loss=LossConfig(memory_mb=memory_mb),
            optimizer=optimizer,
            train=replace(config.train, recompute=recompute),
        )
        for student, teacher, offload, memory_mb, optimizer, recompute in product(
            layouts, layouts, (False, True), (2048, 256), [config.optimizer, *optimizers], ("none", "selective", "full")
        )
    ]
    needed = sorted((documented_order(each), plan_models(each, *specs).fullest.size) for each in grid)
    orders = []
    for size in (12.5, 14.5, 15.5, 16.5, 17.5, 19, 20, 21, 24, 28, 34, 44, 60, 80):
        short = [*overrides, f"train.gpu_memory_gb={size}"]
        found = planned(*short, *cheapest_change(planned(*short)).split()).config
        orders.append(next(order for order, bytes_needed in needed if bytes_needed <= size * 1e9))
        assert (size, documented_order(found)) == (size, orders[-1])
    assert all(len(set(step)) > 1 for step in zip(*orders, strict=True))  # they differ in every step


# config.json of Qwen3-30B-A3B, as far as sizes go.
WITH_EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


@pytest.fixture
def with_experts(tmp_path):
    """A run whose student has experts and does not fit."""
    (tmp_path / "config.json").write_text(json.dumps(WITH_EXPERTS))
    layout = ["student.layout.tensor_parallel=1", "student.layout.pipeline_parallel=8"]
    return ["math_qwen3_8b_base_from_32b", "objective.name=grpo", f"student.path={tmp_path}", *layout]


def test_a_student_with_experts_is_advised_what_its_run_accepts(with_experts):
    begun = time.process_time()
    assert cheapest_change(planned(*with_experts)) == ("student.layout.context_parallel=2 train.recompute=selective")
    assert time.process_time() - begun < 2
    refused = "student.layout.tensor_parallel=2: a student with experts needs student.layout.sequence_parallel=true"
    whole = [*with_experts, "student.layout.tensor_parallel=2", "objective.name=cross_entropy"]
    for check in (make_plan, check_sft):
        with pytest.raises(ConfigError, match=refused):
            check(load_run(whole[0], whole[1:]))
    assert make_plan(load_run(whole[0], [*whole[1:], "student.layout.sequence_parallel=true"])).server is None


@pytest.mark.parametrize("layout", [LayoutConfig(), LayoutConfig(2, 3, True), LayoutConfig(2, 1, expert_parallel=3)])
def test_experts_are_counted_as_they_are_planned(layout):
    spec = as_model_spec({**WITH_EXPERTS, "num_hidden_layers": 5, "num_experts": 6})
    plan, model = build_shard_plan(spec, layout), Model(spec, layout, "bf16")
    assert model.total_parameters == sum(math.prod(shape) for shape in plan.hf_shapes.values())
    for stage in range(layout.pipeline_parallel):
        entries = plan.entries(Place(pp_rank=stage))
        assert sum(found.number for found in model.parameter_sizes(stage)) == len(entries)
        assert model.parameters(stage) == sum(math.prod(entry.shape) for entry in entries)


def test_what_no_layout_fits_is_said(capsys):
    overrides = ["train.gpu_memory_gb=3", "objective.name=grpo"]
    assert main(["plan", "kk_qwen3_0p6b_from_8b", *overrides]) == 2
    assert "no change fits, even on 8 times the nodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.tensor_parallel=3"], "tensor_parallel=3 does not divide the 16 attention .*; use 1, 2, 4, 8 or 16$"),
        (
            ["student.layout.tensor_parallel=32", "train.ranks_per_node=32", "train.gpus_per_node=36"],
            "student.layout.tensor_parallel=32 does not divide the 16 attention heads of this model; use 1, 2, 4 or 8$",
        ),
        (
            ["student.layout.pipeline_parallel=29", "train.ranks_per_node=29", "train.gpus_per_node=33"],
            "student.layout.pipeline_parallel=29 exceeds the model's 28 layers; use at most 28$",
        ),
        (
            [
                "student.layout.context_parallel=3",
                "student.layout.cp_comm_type=a2a",
                "student.layout.tensor_parallel=2",
                "train.ranks_per_node=6",
                "train.gpus_per_node=16",
            ],
            "context_parallel=3 does not divide the 4 that tensor_parallel=2 leaves on a rank; use 1, 2 or 4, or cp_",
        ),
        (["student.path=elsewhere/mine"], "student.path=elsewhere/mine: no config.json there, and 'mine' is not"),
        (["teacher.path=elsewhere/mine"], "teacher.path=elsewhere/mine: no config.json"),
        (
            ["student.path=models/DeepSeek-R1-Distill-Qwen-7B"],
            "student's vocabulary of 152064 exceeds the teacher's 151936: .* use another teacher.path or student.path$",
        ),
        (["rollout.sampling.max_tokens=40960"], "rollout.sampling.max_tokens=40960 .* 40960 positions of the student"),
        (
            ["train.recompute=full", "train.recompute_layers=29"],
            "train.recompute_layers=29 exceeds the 28 layers of a pipeline stage; use at most 28, or 0 for all$",
        ),
        (["train.offload_layers=28"], "train.offload_layers=28: .* the student has 28 layers; use at most 27$"),
        (
            ["train.recompute=selective", "train.recompute_modules=[moe_act]"],
            "train.recompute_modules has moe_act, but this model has no experts; use mlp$",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[mlp, core_attn]"],
            "train.recompute_modules has core_attn, but Transformer Engine's attention keeps nothing .*; use mlp$",
        ),
        (["rollout.servers=5"], "rollout.servers=5 .* do not fit on the 4 GPUs that the ranks leave"),
        (["rollout.colocate=true", "rollout.nodes=1"], "use one of the two"),
    ],
)
def test_bad_input_is_one_line(overrides, message, capsys):
    with pytest.raises(ConfigError, match=message) as caught:
        planned("kk_qwen3_0p6b_from_8b", "rollout.servers=1", *overrides)
    assert main(["plan", "kk_qwen3_0p6b_from_8b", "rollout.servers=1", *overrides]) == 2
    assert capsys.readouterr().err == f"rlad: {caught.value}\n"


@pytest.mark.parametrize("recipe", ["kk_tiny_student_sft", "kk_tiny_teacher_sft"])
def test_a_model_that_a_script_makes_is_asked_of_that_script(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without it
    config = load_run(recipe, [])
    for refuse in (lambda: make_plan(config), lambda: read_model_spec(config.student.path)):
        with pytest.raises(RladError, match=r"make it with tools/make_model.py .*recipes/assets/README.md"):
            refuse()
    # That text names them both; and the script would put the model where the recipe looks for it.
    readme = Path(recipes.__path__[0], "assets", "README.md").read_text()
    assert f"python tools/make_model.py {config.student.path} " in readme


def test_a_folder_speaks_for_itself(tmp_path):
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    facts = {**KNOWN_MODELS["Qwen3-0.6B"], "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(facts))
    assert read_or_known_spec(str(folder), "student").num_layers == 2
    (folder / "config.json").write_text(json.dumps({**facts, "intermediate_size": 3000}))
    with pytest.raises(ConfigError, match="student.fp8.recipe=mxfp8 needs multiples of 32, .* width on a rank is 3000"):
        planned("kk_qwen3_0p6b_from_8b", f"student.path={folder}", "student.fp8.recipe=mxfp8")
    del facts["hidden_size"]
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        read_or_known_spec(str(folder), "student")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_or_known_spec(str(folder), "student")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="model_type='gpt2' .* is unknown"):
        read_or_known_spec(str(folder), "student")


def test_bytes_of_a_known_model_by_hand():
    model = Model(read_or_known_spec("Qwen3-8B", "student"), LayoutConfig(), "bf16")
    assert model.vocab_columns == 151_936  # 1187 * 128: nothing to pad
    parameters = PUBLISHED["Qwen3-8B"]
    assert memory.weight_bytes(model, 0, 1) == 2 * parameters
    assert memory.gradient_bytes(model, 0, 1) == 4 * parameters
    assert memory.optimizer_bytes(model, 0, 8, OptimizerConfig()) == 12 * parameters // 8
    assert memory.kv_bytes_per_token(model.spec, 1, "bfloat16") == 2 * 36 * 8 * 128 * 2
    assert memory.kv_bytes_per_token(model.spec, 16, "bfloat16") == 2 * 36 * 1 * 128 * 2
    # 1F1B: the first of two stages holds two micro-batches of half the layers, and the last also the final norm's.
    halves = replace(model, layout=LayoutConfig(1, 2))
    layer = activations.activation_bytes(halves, 0, 100, attention="fused") // (2 * 18)
    assert activations.activation_bytes(halves, 1, 100, attention="fused") == 18 * layer + 2 * 100 * 4096 * 2


# Qwen3-8B: hidden 4096, 32 query and 8 key-value heads of 128, feed-forward 12288, 36 layers.
QKV, PROJECTION, GATE_UP, DOWN = 6144 * 4096, 4096 * 4096, 24576 * 4096, 4096 * 12288
PRODUCTS = QKV + PROJECTION + GATE_UP + DOWN  # of a layer


def qwen3_8b(**fp8):
    return Model(read_or_known_spec("Qwen3-8B", "student"), LayoutConfig(), "bf16", Fp8Config(**fp8))


def test_weights_in_fp8_by_hand():
    parameters, layers = PUBLISHED["Qwen3-8B"], 36 * PRODUCTS
    for recipe, scales in (("tensorwise", 0), ("mxfp8", 1 / 32), ("blockwise", 4 / 128**2)):
        frozen = memory.frozen_weight_bytes(qwen3_8b(recipe=recipe), 0)
        assert frozen == (parameters - layers) * 2 + int(layers * (1 + scales))
        gathered = qwen3_8b(recipe=recipe, param_gather=True)
        assert memory.weight_bytes(gathered, 0, 1) == (parameters - layers) * 2 + int(2 * layers * (1 + scales))
        assert (memory.fp8_copy_bytes(gathered, 0), memory.fp8_copy_bytes(qwen3_8b(), 0)) == (0, 0)
    assert memory.weight_bytes(qwen3_8b(recipe="delayed"), 0, 1) == 2 * parameters
    assert memory.fp8_copy_bytes(qwen3_8b(recipe="delayed"), 0) == 2 * layers
    ends = qwen3_8b(recipe="tensorwise", first_last_layers_bf16=True)
    assert ends.fp8_parameters(0) == 34 * PRODUCTS
    stages = replace(ends, layout=LayoutConfig(1, 4))
    assert [stages.fp8_parameters(stage) // PRODUCTS for stage in range(4)] == [8, 9, 9, 8]


@pytest.mark.parametrize(
    ("precision", "fp8", "optimizer", "each"),
    [
        ("fp32", {}, {}, 8),
        ("bf16", {}, {}, 12),
        ("fp16", {}, {}, 12),
        ("bf16", {}, {"precision_aware": True}, 10),  # of the float32 copy only what bf16 lacks
        ("bf16", {}, {"precision_aware": True, "moments": "bf16"}, 6),
        ("bf16", {"recipe": "delayed"}, {"precision_aware": True}, 10),
        # Under the other recipes Megatron holds the float32 copy itself.
        ("bf16", {"recipe": "tensorwise"}, {"precision_aware": True, "moments": "bf16"}, 8),
        ("bf16", {}, {"precision_aware": True, "offload": 0.75}, 3),
    ],
)
def test_bytes_of_the_optimizer_by_hand(precision, fp8, optimizer, each):
    model = replace(qwen3_8b(**fp8), precision=precision)
    assert memory.optimizer_bytes(model, 0, 8, OptimizerConfig(**optimizer)) == PUBLISHED["Qwen3-8B"] * each // 8


def test_activations_of_fused_layers_by_hand():
    def layer(model, recompute):
        """Bytes of a token in a layer, without what all layers share: the final norm, what backward computes again."""
        asked = {"attention": "fused", "train": TrainConfig(recompute=recompute)}
        total = activations.activation_bytes(model, 0, 1, **asked) - activations.recomputed_bytes(
            model, 1, FULL_ATTENTION, **asked
        )
        return (total - 2 * 4096 * 2) / 36

    bf16, fp8 = qwen3_8b(), qwen3_8b(recipe="mxfp8")
    small = (32 + 2) * 4  # log-sum-exp of each head, scale of each norm
    assert layer(bf16, "none") == 2 * (2 * 4096 + 6144 + 5120 + 4096 + 2 * 4096 + 3 * 12288) + small
    assert layer(bf16, "selective") == 2 * (2 * 4096 + 6144 + 5120 + 4096 + 4096) + small
    assert layer(bf16, "full") == layer(fp8, "full") == 2 * 4096
    # Inputs of products in one byte; attention's result in three, since its own backward reads it too.
    bytes_fp8 = 3 * 4096 + 2 * 6144 + 2 * 5120 + 3 * 4096 + 3 * 4096 + 5 * 12288
    assert layer(fp8, "none") == bytes_fp8 + small
    assert layer(fp8, "selective") == bytes_fp8 - 4096 - 5 * 12288 + small


# Qwen3-30B-A3B: hidden 2048, 32 query and 4 key-value heads of 128, 8 of 128 experts of width 768, 48 layers.
def experts_30b(**layout):
    return Model(read_or_known_spec("Qwen3-30B-A3B", "student"), LayoutConfig(**layout), "bf16")


def kept_bytes(model, tokens=64, **train):
    """Of a layer, after forward; without the final norm, which all layers share."""
    asked = {"attention": "fused", "train": TrainConfig(**train)}
    total = activations.activation_bytes(model, 0, tokens, **asked)
    total -= activations.recomputed_bytes(model, tokens, FULL_ATTENTION, **asked)
    return (total - activations.own_tokens(model, tokens) * 2 * 2048 * 2) / 48


def test_activations_of_experts_by_hand():
    model, some = experts_30b(), {"recompute": "selective"}
    attention = 2 * (2 * 2048 + 4096 + 2 * 512 + 4096 + 512 + 4096) + 2 * 2048 * 2 + (32 + 2) * 4
    # Weights of the chosen experts; of all, and which are chosen; the chosen ones and the places of the copies.
    router = 8 * 4 + 128 * 5 + 8 * 16
    copies = 8 * (2 * 2048 + 2 * (2 * 768 + 768) + 4)  # input; gate and up; their product; weight
    assert kept_bytes(model) == 64 * (attention + router + copies)
    assert kept_bytes(model, **some) == 64 * attention
    assert kept_bytes(model) - kept_bytes(model, **some, recompute_modules=["moe_act"]) == 64 * 8 * 768 * 2
    assert kept_bytes(model) - kept_bytes(model, **some, recompute_modules=["layernorm"]) == 64 * 2048 * 2
    # Balanced experts get as many tokens from other ranks as the rank sends, and no more memory.
    assert kept_bytes(experts_30b(expert_parallel=8)) == kept_bytes(model)
    # Of two ranks with half of the tokens each: each expert whole on one of them, or half an expert and all tokens.
    two = {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2}
    whole, halves = experts_30b(**two, expert_tensor_parallel=1), experts_30b(**two)
    assert activations.received_tokens(halves, 64) == 2 * activations.received_tokens(whole, 64) == 64 * 8
    assert kept_bytes(halves) - kept_bytes(whole) == 32 * 8 * (2 * 2048 + 4)  # the inputs of twice as many copies


def test_activations_of_some_layers_by_hand():
    model = qwen3_8b()

    def total(model, stage=0, **train):
        return activations.activation_bytes(model, stage, 64, attention="fused", train=TrainConfig(**train))

    layer = total(model, offload_layers=2) - total(model, offload_layers=3)
    block = 64 * 4096 * 2  # a layer's input
    assert total(model) - total(model, recompute="full", recompute_layers=5) == 5 * (layer - block)
    # Only with all layers recomputed is one of them there again at the peak.
    assert total(model, recompute="full", recompute_layers=36) == total(model, recompute="full")
    assert total(model) - total(model, recompute="full") == 35 * (layer - block)
    chunks = replace(model, layout=LayoutConfig(1, 2, virtual_pipeline=3))  # of 6 layers each
    saved = total(chunks) - total(chunks, recompute="full", recompute_layers=2)
    assert saved == pytest.approx(3 * 2 * (layer - block) * chunks.in_flight(0), abs=1)
    # Two of the offloaded layers are on their way.
    assert total(model, offload_layers=2) == total(model) == total(model, offload_layers=12) + 10 * layer


def test_what_layouts_and_recompute_cost_by_hand():
    model = qwen3_8b()
    layer = 2 * PRODUCTS + 2 * 1000 * 4096  # products, and attention over 1000 tokens
    update = 3 * (36 * layer + 2 * 4096 * 151_936)
    for train, again in (
        ({}, 0),
        ({"recompute": "full"}, 36 * layer),
        ({"recompute": "full", "recompute_layers": 9}, 9 * layer),
        ({"recompute": "selective"}, 36 * 2 * (GATE_UP + DOWN)),
    ):
        assert recomputed_share(model, TrainConfig(**train), 1000) == pytest.approx(again / update)

    def sent(model, *, trained=True, **layout):
        moved = sent_bytes(replace(model, layout=LayoutConfig(**layout)), trained=trained)
        return {kind: size for kind, size in moved.items() if size}

    assert sent(model) == {}
    assert sent(model, tensor_parallel=4) == {"TP": 2 * 36 * 2 * 2 * 3 * 4096 * 2}
    assert sent(model, tensor_parallel=4, sequence_parallel=True) == {"TP": (2 * 2 + 1) * 36 * 2 * 3 * 4096 * 2}
    assert sent(model, pipeline_parallel=4, tensor_parallel=2, trained=False)["PP"] == 3 * 2 * 4096 * 2
    shared = sent(model, pipeline_parallel=4, tensor_parallel=2, sequence_parallel=True, trained=False)
    assert shared == {"TP": 36 * 2 * 2 * 4096 * 2, "PP": 3 * 4096 * 2}
    assert sent(model, context_parallel=4) == {"CP": 3 * 36 * 2 * 1024 * 3 * 2}
    assert sent(model, context_parallel=4, cp_comm_type="a2a") == {"CP": 2 * 36 * 2 * (4096 + 1024) * 3 // 4 * 2}
    assert sent(experts_30b(), expert_parallel=8) == {"EP": 2 * 48 * 8 * 2048 * 2 * 7 // 8 * 2}
    both = sent(experts_30b(), trained=False, tensor_parallel=2, sequence_parallel=True, expert_parallel=2)
    assert both == {"TP": 48 * 2 * 2048 * 2, "EP": 48 * 8 * 2048 * 2, "ETP": 48 * 8 * 2048 * (2 + 4)}
    twice = sent(experts_30b(), trained=False, tensor_parallel=2, expert_parallel=2)
    assert twice == {"TP": both["TP"], "EP": 2 * both["EP"], "ETP": 2 * both["ETP"]}


def test_a_plan_follows_the_options():
    name = "math_qwen3_8b_base_from_32b"

    def items(*overrides):
        return {item.name: item for item in planned(name, *overrides).fullest.items}

    plain = items()
    assert (plain["teacher weights"].phase, plain["teacher weights"].how) == ("", "exact")
    offloaded = items("teacher.offload=true", "teacher.fp8.recipe=mxfp8")
    assert offloaded["teacher weights"].phase == "teacher" and "mxfp8" in offloaded["teacher weights"].why
    assert 0.5 < offloaded["teacher weights"].size / plain["teacher weights"].size < 0.56
    # The teacher is no longer there during the update.
    resting = planned(name, "teacher.offload=true").fullest
    assert resting.size == planned(name).fullest.size - plain["teacher weights"].size
    assert items("train.recompute=full")["activations"].size < plain["activations"].size / 4
    assert "FP8 copies" in items("student.fp8.recipe=tensorwise")
    local = items("student.transformer_impl=local")["activations"]
    assert "local layers" in local.why and local.size > 2 * plain["activations"].size
    assert planned(name, "student.fp8.recipe=mxfp8", "train.microbatch_tokens=31750").tokens % (32 * 8) == 0
    shared = ["teacher.fp8.recipe=blockwise", "teacher.layout.sequence_parallel=true"]
    assert planned(name, *shared, "train.microbatch_tokens=31750").tokens == 32768  # of blocks of 128 on 8 ranks


def operations(capsys, *words):
    """The line of a plan that counts them."""
    main(["plan", *words])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("A step of")]
    return line.strip()


def test_a_plan_counts_the_operations_of_a_step(capsys):
    """Of the demo: 256 samples of 192 tokens, 96 of which have loss."""
    found = []
    for model in ("student", "teacher"):
        spec = read_model_spec(f"recipes/assets/kk_tiny_{model}")
        hidden, query, kv = spec.hidden_size, spec.size("query"), spec.size("kv")
        layer = 2 * hidden * (2 * query + 2 * kv + 3 * spec.ffn_size) + 2 * 192 * query
        found.append(256 * (192 * spec.num_layers * layer + 96 * 2 * hidden * spec.vocab_size))
    student, teacher = found
    text = f"{3 * student:.2e} operations in the update, {teacher:.2e} operations in the teacher's pass."
    assert operations(capsys, "kk_tiny_cpu") == f"A step of 256 samples of 192 tokens: {text}"


def test_a_pass_over_the_head_before_the_loss_is_counted(capsys):
    name = "kk_qwen3_0p6b_from_8b"
    plan = planned(name)
    spec, tokens = plan.student.spec, plan.config.rollout.sampling.max_tokens
    responses = plan.config.rollout.prompts_per_step * plan.config.rollout.group_size
    update = 3 * forward_flops(spec, [plan.longest] * responses, tokens * responses)
    head = 2 * spec.hidden_size * spec.vocab_size * tokens * responses
    assert head > 0.02 * update  # enough to be seen in three digits
    for objective, expected in (("trrd", update), ("distilled_rl", update + head)):
        assert f" {expected:.2e} operations in the update" in operations(capsys, name, f"objective.name={objective}")


def test_a_reference_is_planned_as_a_frozen_copy_of_the_student():
    name, kl = "math_qwen3_8b_base_from_32b", "objective.reference_kl=0.01"
    plain, kept = planned(name).fullest, planned(name, kl).fullest
    away = planned(name, kl, "objective.reference_offload=true", "rollout.schedule=phased").fullest
    items = {item.name: item for item in kept.items}
    weights = items["reference weights"]
    assert weights.size == memory.frozen_weight_bytes(planned(name).student, 0) and weights.how == "exact"
    assert kept.size == plain.size + weights.size and away.size == plain.size
    assert kept.held("reference") == items["reference's pass"].size > 0
    assert away.held("reference") == kept.held("reference") + weights.size


def test_a_plan_says_what_fp8_needs(capsys):
    assert main(["plan", "kk_qwen3_0p6b_from_8b", "student.fp8.recipe=blockwise", "teacher.fp8.recipe=mxfp8"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if ".fp8.recipe=" in line]
    assert notes[0].startswith(
        "student.fp8.recipe=blockwise needs compute capability 9.0 or higher, Transformer Engine 2.3 ("
    )
    assert notes[1].startswith("teacher.fp8.recipe=mxfp8 needs compute capability 10.0 or higher and below 12.0, Trans")


def test_a_rank_has_what_a_colocated_server_leaves_asleep_and_awake():
    name = "kk_qwen3_1p7b_from_8b"
    colocated = ["train.ranks_per_node=8", "rollout.colocate=true", "rollout.gpu_memory_utilization=0.5"]
    plan = planned(name, *colocated)
    phases = {phase: sum(item.size for item in plan.fullest.items if item.phase == phase) for phase in ("", "update")}
    assert (plan.fullest.resting, plan.fullest.size) == (phases[""], phases[""] + phases["update"])
    assert plan.fullest.size > 40e9 > plan.fullest.resting  # an update has more than the server's other half
    assert (plan.shortage, plan.resting_limit, plan.trainer_limit) == ("", 40e9, 76e9)
    # Level 1 differs on the host alone.
    assert planned(name, *colocated, "rollout.sleep_level=1").shortage == ""
    awake = planned(name, *colocated, "rollout.sleep_level=0")
    assert awake.trainer_limit == 40e9 and "and has 40.0 GB next to a server that stays awake" in awake.shortage
    greedy = planned(name, *colocated, "rollout.gpu_memory_utilization=0.6")
    assert greedy.resting_limit == 32e9 and greedy.trainer_limit == 76e9
    assert f"needs {gb(greedy.fullest.resting)} GB (teacher weights" in greedy.shortage
    assert "32.0 GB next to a server with rollout.gpu_memory_utilization=0.6 while it generates" in greedy.shortage
    assert cheapest_change(greedy) == "teacher.offload=true"
    assert cheapest_change(awake) == "rollout.sleep_level=2"
    working = planned(name, *colocated, "train.microbatch_tokens=65536")
    assert "activations" in working.shortage and "has 76.0 GB next to a sleeping server" in working.shortage
    apart = planned(name)
    assert (apart.resting_limit, apart.trainer_limit) == (None, 80e9)


def test_sequence_parallelism_shares_out_what_lies_between_the_cut_layers():
    model = Model(read_or_known_spec("Qwen3-8B", "student"), LayoutConfig(4, 1), "bf16")
    shared = replace(model, layout=LayoutConfig(4, 1, sequence_parallel=True))
    saved = activations.activation_bytes(model, 0, 100, attention="fused")
    saved -= activations.activation_bytes(shared, 0, 100, attention="fused")
    layer = 4 * 4096 * 2 + 2 * 4  # in and out of two norms, and their scales
    assert saved == 75 * (36 * layer + 2 * 4096 * 2)  # three quarters of 100 tokens, and the final norm
    less = activations.forward_bytes(model, 100) - activations.forward_bytes(shared, 100)
    assert less == 75 * 2 * 4096 * 2


def test_context_parallelism_shares_out_tokens_and_the_optimizers_state():
    model = Model(read_or_known_spec("Qwen3-8B", "student"), LayoutConfig(4, 2), "bf16")
    shared = replace(model, layout=replace(model.layout, context_parallel=4))
    for recompute in ("none", "selective", "full"):
        asked = {"attention": "fused", "train": TrainConfig(recompute=recompute)}
        for stage in (0, 1):
            whole = activations.activation_bytes(model, stage, 4096, **asked)
            assert activations.activation_bytes(shared, stage, 4096, **asked) == whole / 4
    assert activations.forward_bytes(shared, 4096) == activations.forward_bytes(model, 4096) / 4

    def items(*overrides):
        plan = planned("math_r1_distill_7b_from_32b", *overrides)
        return plan, {item.name: item for item in plan.fullest.items}

    one, ours = items()
    two, halves = items("student.layout.context_parallel=2", "teacher.layout.context_parallel=2")
    assert two.tokens == one.tokens
    assert halves["activations"].size == ours["activations"].size / 2
    for name in ("student weights", "student gradients", "student optimizer", "teacher weights"):
        assert halves[name].size == ours[name].size, name
    assert f"{two.tokens // 2} tokens of {two.tokens} (CP 2), " in halves["activations"].why
    assert "cut over DP x CP " in halves["student optimizer"].why
    # The loss keeps hidden states and their gradient for half of the tokens less; a chunk's logits are as many.
    losses = [item.size for plan in (one, two) for rank in plan.ranks for item in rank.items if item.name == "loss"]
    assert losses[0] - losses[1] == 2 * (one.tokens // 2) * one.student.spec.hidden_size * 2
    console = Console(width=160, record=True, file=io.StringIO())
    print_plan(two, console)
    text = console.export_text()
    assert " CP 2 DP 4 " in text and " CP 2 DP 2 " in text


def test_a_change_that_fits_keeps_context_parallelism():
    own = ["student.layout.context_parallel=2", "teacher.layout.context_parallel=4", "train.gpu_memory_gb=40"]
    own += ["student.layout.tensor_parallel=1", "student.layout.sequence_parallel=false"]
    plan = planned("math_r1_distill_7b_from_32b", *own)
    change = cheapest_change(plan)
    fitting = planned("math_r1_distill_7b_from_32b", *own, *change.split())
    assert plan.shortage and not fitting.shortage
    assert "student.layout.pipeline_parallel=8" in change and "context_parallel" not in change
    layouts = [fitting.config.student.layout, fitting.config.teacher.layout]
    assert [layout.context_parallel for layout in layouts] == [2, 4]


def test_a_change_that_fits_may_cut_sequences_or_deal_experts():
    long = ["objective.name=grpo", "student.layout.context_parallel=1", "train.recompute=selective"]
    assert cheapest_change(planned("math_r1_distill_7b_from_32b_64k", *long, "train.gpu_memory_gb=30")) == (
        "student.layout.context_parallel=4"
    )
    name, one = "math_qwen3_30b_a3b_from_235b", ["teacher.layout.expert_parallel=1"]
    change = cheapest_change(planned(name, *one))
    assert change == "teacher.layout.expert_parallel=4" and not planned(name, *one, change).shortage


def test_a_change_that_fits_keeps_virtual_stages_where_they_are_valid():
    staged = ["objective.name=grpo", "student.layout.pipeline_parallel=2", "student.layout.virtual_pipeline=7"]
    staged += ["train.recompute=selective"]
    kept, dropped = (
        cheapest_change(planned("math_r1_distill_7b_from_32b", *staged, f"train.gpu_memory_gb={size}"))
        for size in (16, 12)
    )
    assert "student.layout.context_parallel=4" in kept and "virtual_pipeline" not in kept
    # 28 layers on 8 stages are no 7 chunks each.
    assert "student.layout.pipeline_parallel=8 student.layout.virtual_pipeline=1" in dropped


def test_a_change_that_fits_keeps_sequence_parallelism(capsys):
    overrides = ["math_qwen3_8b_base_from_32b", "teacher.layout.sequence_parallel=true", "train.gpu_memory_gb=60"]
    assert main(["plan", *overrides]) == 2
    change = capsys.readouterr().err.split("that fits: ")[1].split()
    assert planned(*overrides, *change).config.teacher.layout.sequence_parallel
    assert not planned(*overrides, *change).shortage


def test_tied_embeddings_on_two_stages_have_a_bucket_of_their_own():
    model = Model(read_or_known_spec("Qwen3-0.6B", "student"), LayoutConfig(1, 2), "bf16")
    embedding = 151_936 * 1024
    layers = model.parameters(1) - embedding  # 14 of them and the final norm
    assert (embedding % 896, layers % 896) == (128, 128)  # lcm(7, 128): together they would need less padding
    assert memory.gradient_bytes(model, 1, 7) == 4 * (embedding + layers + 2 * (896 - 128))


def test_loss_stays_within_its_budget():
    loss, plain = LossConfig(memory_mb=4), LossConfig(fused=False)

    def logits(columns, tokens, itemsize, loss, gradients=True):
        return loss_bytes(columns, 0, tokens, itemsize, loss, gradients=gradients)

    assert logits(1000, 10**6, 4, loss) == logits(1000, 10**6, 2, loss, False) == 4_000_000
    assert logits(1000, 10, 2, loss) == 20_000  # no more than there are tokens
    assert logits(2_000_000, 10, 4, loss) == 8_000_000  # one token at least
    assert logits(1000, 10, 2, plain) == 80_000 and logits(1000, 10, 2, plain, False) == 60_000
    for kind, gradients in product((loss, plain), (True, False)):
        hidden = loss_bytes(1000, 64, 10, 2, kind, gradients=gradients) - logits(1000, 10, 2, kind, gradients)
        assert hidden == (2 if gradients else 1) * 10 * 64 * 2  # each token's hidden state, and its gradient


@pytest.mark.parametrize(
    "overrides",
    [
        ("math_r1_distill_7b_from_32b",),
        ("kk_qwen3_0p6b_from_8b",),
        ("kk_qwen3_0p6b_from_8b", "rollout.tensor_parallel=2", "rollout.servers=2"),
        ("math_qwen3_8b_base_from_32b", "rollout.tensor_parallel=4", "rollout.servers=8"),
    ],
)
def test_no_two_tasks_share_a_gpu(overrides):
    config = load_run(overrides[0], list(overrides[1:]))
    tasks = place(config)
    taken = [(task.node, gpu) for task in tasks for gpu in task.gpus]
    assert (
        len(taken)
        == len(set(taken))
        == config.train.world_size + config.rollout.servers * config.rollout.tensor_parallel
    )
    assert all(gpu < config.train.gpus_per_node for _, gpu in taken)
    assert {task.node for task in tasks} == set(range(config.train.nodes + config.rollout.nodes))


def test_colocated_servers_share_the_ranks_gpus():
    config = load_run(
        "kk_qwen3_0p6b_from_8b", ["rollout.colocate=true", "rollout.servers=2", "rollout.tensor_parallel=2"]
    )
    servers = [task.gpus for task in place(config) if task.role == "server"]
    assert servers == [(0, 1), (2, 3)]
